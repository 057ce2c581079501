"""`RunReport`: for each role and block of a run the backend, calls, time, and the reason of a fallback."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from ..config import AttentionConfig
from ..measure.device_clock import DeviceClock
from ..values.counted import counted
from ..values.grid import Kept
from ..values.reasons import Reason
from . import outcome, split
from .audit import BY_ANOTHER as BY_ANOTHER
from .audit import asked_and_ran
from .findings import Findings, worst_first
from .kept import expected_gain
from .timeline import Timeline, Window, milliseconds
from .tuning import Tuning

if TYPE_CHECKING:
    import torch

log = logging.getLogger("attention_backends")

VARIABLE = "ATTENTION_BACKENDS_TRACE"
MODES = ("full", "sampled", "off")
"""`full`: every call is timed. `sampled`: calls of some model calls. `off`: no times and no timeline. Every report has
kernels, calls and reasons."""
SAMPLED_EACH = 7
"""Distance of timed model calls, beginning with the second, since the first loads kernels. Coprime with the one to four
model calls per step of samplers, so that each of them is timed."""


def trace_mode(environ: Mapping[str, str] = os.environ) -> str:
    """The mode of a run that begins now, by the environment; one of `MODES`."""
    mode = environ.get(VARIABLE, "").strip().lower()
    if mode in MODES or not mode:
        return mode or MODES[0]
    log.warning("%s=%s is not one of %s, so it is %s", VARIABLE, mode[:40], ", ".join(MODES), MODES[0])
    return MODES[0]


@dataclass(slots=True)
class Row:
    """Calls of one role and block with one decision. Counted by `engine/session.py`, timed by `timed_kernel.py`."""

    role: str
    block: str
    backend: str
    source: str
    mask: str
    """Kind of mask, and the strategy of its plan: `none`; `bool`; `key_padding, trimmed`."""
    reason: str | None = None
    """Reason of a fallback; None: the backend that was asked for ran."""
    asked: str | None = None
    member: str | None = None
    """The kernel of a backend group; None where the backend is one kernel."""
    calls: int = 0
    launches: int = 0
    """Calls of the kernel; more than `calls` with sub-calls."""
    timed: int = 0
    """Launches with a known time."""
    nanoseconds: int = 0
    """Device time of the timed launches, without the guard and planning."""
    guard: Findings | None = None
    """The guard's figures; None if no call was checked."""
    kept: Kept | None = None
    """How much of its work a sparse backend computed; None for others."""
    expected: bool = False
    """The backend that was asked for in all roles is for no calls of this one: with a reason, and no fallback."""
    card: str = ""
    """The device that ran the calls, where the host divides its model calls over several; else empty."""

    @property
    def by_another(self) -> bool:
        """Whether another pack computed these calls; `member`: its name."""
        return self.backend == BY_ANOTHER

    def add_time(self, milliseconds: float) -> None:
        """Add the device time of one launch."""
        self.nanoseconds += int(milliseconds * 1e6)
        self.timed += 1


class Recorder(Protocol):
    """What a run report uses of a recorder; it is an `engine/observer.Observer` too."""

    not_repeated: dict[str, None]
    """Events that a replay cannot reproduce."""

    def begin_model_call(self, number: int, window: Hashable) -> None:
        """A model call begins, while these windows of the schedules hold."""


@dataclass(repr=False)
class RunReport:
    """Rows and notes of one run."""

    model: str = ""
    device: str = "cpu"
    steps: int = 0
    seconds: float | None = None
    """Wall time from the first model call to the end of the run, synchronised; without loading and decoding."""
    bypass: str = ""
    """Attention of this model family that does not reach the hook and is not counted."""
    rows: dict[tuple[str | None, ...], Row] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    """Note -> how often it occurred."""
    layers: tuple[AttentionConfig, ...] = ()
    """The configurations of the whole run, highest first; empty if they changed."""
    categories: dict[str, str] = field(default_factory=dict)
    """Role -> category, of every role that was called."""
    timeline: Timeline = field(default_factory=Timeline)
    another: dict[str, str] = field(default_factory=dict)
    """Other pack that computed calls -> `after this node`, `before this node`, or empty."""
    unseen: dict[str, None] = field(default_factory=dict)
    """Other packs that ran in a compiled model and may have computed attention."""
    unused: str = ""
    """Why no attention call of this run was counted; empty if any was."""
    stopped: outcome.Outcome | None = None
    """Why it did not finish, or that it is not over; None for a finished run."""
    tuning: Tuning = field(default_factory=Tuning)
    """States of the kinds of call that asked for `autotune`."""
    node_id: str = ""
    """Id of the sampling node of the graph; empty if unknown."""
    recorder: Recorder | None = None
    """Records the decisions; None if they are not recorded."""
    mode: str = field(default_factory=trace_mode)
    """One of `MODES`, for the whole run."""
    clocks: list[DeviceClock] = field(default_factory=list)
    """One per session that times calls."""
    started: float | None = None
    """`perf_counter()` at the first model call; None before it."""
    size: tuple[tuple[int, ...], ...] = ()
    """Shape of each tensor that is sampled; empty if unknown."""
    cards: dict[str, RunReport] = field(default_factory=dict)
    """What other cards computed of this run's calls, by their names; empty without them."""
    card: str = ""
    """The device of this report, where the host divides its model calls over several; else empty."""
    split: dict[str, RunReport] = field(default_factory=dict)
    """Reports of the model calls that the host makes on the other devices, by their names; see `split.py`."""
    last_step: int | None = None
    """The sampler's step of the last finished model call, from 0, if the host knows it."""
    last_time: float | None = None
    """`perf_counter()` after the last model call; the device may still compute it."""

    def __repr__(self) -> str:
        """What ran, without waiting for a device; all data is in `as_dict`."""
        return f"<run report of {self.model or 'no run'}: {self.summary()}>"

    def new_clock(self, kind: str) -> DeviceClock | None:
        """A clock for a session on this kind of device; None if nothing is timed."""
        if self.mode == "off":
            return None
        clock = DeviceClock(kind)
        if not clock.measures_device_time:
            return None
        clock.paused = self._is_left_out(self.timeline.model_calls + 1)
        self.clocks.append(clock)
        return clock

    def _is_left_out(self, model_call: int) -> bool:
        return self.mode == "sampled" and model_call % SAMPLED_EACH != 2

    def row(
        self, role: str, block: str, backend: str, source: str, mask: str, reason: str | None, asked: str | None
    ) -> Row:
        """The row of this decision, created if new."""
        key = (role, block, backend, mask, reason, source)
        row = self.rows.get(key)
        if row is None:
            row = self.rows[key] = Row(role, block, backend, source, mask, reason, asked, card=self.card)
        return row

    def note(self, text: str) -> bool:
        """Count a note; True if it is new, so that the caller logs it once."""
        self.notes[text] = self.notes.get(text, 0) + 1
        return self.notes[text] == 1

    def end_of_model_call(
        self,
        clock: DeviceClock | None = None,
        device: torch.device | None = None,
        sigma: torch.Tensor | None = None,
        schedule: torch.Tensor | None = None,
        step: int | None = None,
    ) -> None:
        """Add the counts since the last model call to the timeline, without synchronisation.

        Args:
            clock: of the session that ran it, on `device`.
            sigma: of the model call, (batch,); `schedule`: the sampler's sigmas, (steps + 1,).
            step: of the model call; None: derived from the sigmas.
        """
        # A copy: threads of other devices may add a row.
        timeline, rows = self.timeline, list(self.rows.values())
        self.last_step, self.last_time = step, perf_counter()
        if self.mode == "off":
            timeline.model_calls += 1
            return
        window = timeline.end_of_model_call(rows)
        number = timeline.model_calls
        timeline.steps.add(number, sigma, schedule, step)
        if clock is not None and clock.has_events:
            if window is not None:
                clock.mark(partial(self._reach, window), device)
            clock.collect()
        elif clock is not None and window is not None:
            window.add_times(rows)
        if self.mode == "sampled":
            for session_clock in self.clocks:
                session_clock.paused = self._is_left_out(number + 1)

    def _reach(self, window: Window) -> None:
        """The device has finished all work up to the end of `window`."""
        window.add_times(list(self.rows.values()))
        self.timeline.steps.settle(window.last)

    def collect(self) -> None:
        """Add the times of this device that are ready, without waiting."""
        for clock in self.clocks:
            clock.collect()

    def end_of_run(self) -> None:
        """Add all pending times; waits for the devices."""
        for part in split.parts(self):
            for clock in part.clocks:
                clock.collect(wait=True)
            part.timeline.steps.settle(part.timeline.model_calls, at_rest=True)

    def windows(self) -> list[dict[str, Any]]:
        """The timeline as plain data (`Timeline.as_list`, `split.windows`); empty in mode `off`."""
        return [] if self.mode == "off" else split.windows(self, live=self.is_live)

    def steps_reached(self) -> int | None:
        """Number of the step, from 1, of the last finished model call; None if unknown."""
        if self.last_step is not None:
            return self.last_step + 1
        number = self.timeline.model_calls
        known = self.timeline.steps.between(number, number) if number else None
        return None if known is None else known[1] + 1

    @property
    def calls(self) -> int:
        """Number of routed attention calls, without those of the other devices of a split."""
        return sum(row.calls for row in self.rows.values())

    def as_dict(self) -> dict[str, object]:
        """The run as plain data.

        `card`, only where the host divides its model calls over several devices: the device of a row.
        `ms`: device time of all calls of a row, extrapolated from the timed ones; None if none was timed. `expected`,
        only where true: the backend that was asked for in all roles is not for this one (`audit.fell_back`).
        `kept`, of sparse backends: mean share of query-key pairs that was computed by calls with a map. `dense`: reason
        -> calls that were computed whole. `executors`: what computed the others -> calls. `read_back`: how many of them
        waited to read from their device. `expected_gain`: 1 / `kept`; `measured_gain`: time of a call that was computed
        whole over that of one with a map, None unless this run timed both. While a run goes on, what only its device
        knows is None.
        """
        whole, live = split.whole(self), self.is_live
        rows = [row for part in split.parts(self) for row in part.own_rows(live)]
        notes = [text if count == 1 else Reason("times", text=text, count=count) for text, count in whole.notes.items()]
        notes += self.of_cards()
        return {
            "model": self.model,
            "device": self.device,
            "trace": self.mode,
            "steps": self.steps,
            "seconds": self.seconds,
            "bypass": self.bypass,
            "rows": rows,
            "guard": worst_first(whole.rows.values()),
            "tuning": whole.tuning.as_dict(),
            "outcome": outcome.of_run_report(whole).as_dict(),
            "audit": [finding.as_dict() for finding in asked_and_ran(whole)],
            "notes": notes,
        }

    def own_rows(self, live: bool = False) -> list[dict[str, object]]:
        """The rows of this device alone, as in `as_dict`; `live`: without what only the device knows."""
        gains = self._gains(live)
        return [
            ({"card": row.card} if row.card else {})
            | {
                "role": row.role,
                "block": row.block,
                "backend": row.backend,
                "member": row.member,
                "calls": row.calls,
                "ms": milliseconds(row.nanoseconds, row.timed, row.launches),
                "timed": round(row.calls * min(row.timed / max(row.launches, 1), 1)),
                "mask": row.mask,
                "asked": row.asked,
                "source": row.source,
                "reason": row.reason,
            }
            | ({"expected": True} if row.expected else {})
            | ({} if row.kept is None else self._kept(row.kept, gains.get(number), live))
            for number, row in enumerate(list(self.rows.values()))
            if row.calls
        ]

    def of_cards(self) -> list[Reason]:
        """What several cards computed: `cuda:1: sage_attn 400 calls`.

        Each card of a split; else the other cards, which computed some heads of calls.
        """
        totals: dict[tuple[str, str, str | None], int] = {}
        for card, report in (split.by_card(self) or self.cards).items():
            for row in list(report.rows.values()):
                key = card, row.member or row.backend, row.reason
                if row.calls or not self.split:
                    totals[key] = totals.get(key, 0) + row.calls
        made = []
        for (card, backend, reason), calls in totals.items():
            ran = Reason("cards.ran", card=card, backend=backend, calls=calls)
            made.append(ran if reason is None else Reason("named", name=ran, reason=reason))
        return made

    def _gains(self, live: bool) -> dict[int, float | None]:
        if self.mode == "off" or not any(row.kept for row in list(self.rows.values())):
            return {}
        return self.timeline.gains(list(self.rows.values()), live=live)

    @property
    def is_live(self) -> bool:
        """Whether this is a copy of a run that goes on, read by another thread, which is not to wait for a device."""
        return self.stopped is not None and self.stopped.kind == outcome.RUNNING

    def _kept(self, kept: Kept, gain: float | None, live: bool) -> dict[str, object]:
        if live and not isinstance(kept.total, float) and not kept.total.is_cpu:
            # It is known when the run is over.
            kept = Kept(0, kept.dense, 0.0, kept.executors, kept.read_back)
        fraction = kept.fraction
        return kept.as_dict() | {"expected_gain": expected_gain(fraction), "measured_gain": gain}

    def summary(self) -> str:
        """One line: each role with its backends and calls, then how many calls fell back."""
        totals: dict[tuple[str, str], int] = {}
        fallbacks = others = 0
        whole = split.whole(self)
        for row in whole.rows.values():
            if row.calls:
                totals[row.role, row.backend] = totals.get((row.role, row.backend), 0) + row.calls
                others += row.calls if row.by_another else 0
                fallbacks += row.calls if row.reason and not row.by_another and not row.expected else 0
        parts = [f"{role} {backend} {counted(calls, 'call')}" for (role, backend), calls in totals.items()]
        ended = [counted(fallbacks, "fallback")] if fallbacks else []
        sentence = outcome.of_run_report(whole).text
        return "; ".join(
            [
                ", ".join(parts or ["no attention call reached us"]),
                *self.of_cards(),
                *ended,
                *([sentence] if sentence else []),
            ]
        )
