"""The account of one run: what ran for each role and block, how often, how long, and why not something else."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from ..config import AttentionConfig
from ..measure.device_clock import DeviceClock
from . import outcome
from .audit import BY_ANOTHER as BY_ANOTHER
from .audit import asked_and_ran
from .findings import Findings, worst_first
from .timeline import Timeline, Window, milliseconds
from .tuning import Tuning

if TYPE_CHECKING:
    import torch

    from .recorder import Recorder

log = logging.getLogger("attention_backends")

VARIABLE = "ATTENTION_BACKENDS_TRACE"
MODES = ("full", "sampled", "off")
"""`full`: every call is timed. `sampled`: those of some model calls. `off`: no times and no timeline; which kernel ran,
how often and why not another one is in the account all the same."""
SAMPLED_EACH = 7
"""Model calls from one that is timed to the next, beginning with the second: the first one loads kernels. Samplers make
one to four of them per step, so that none of these is always left out."""


def trace_mode(environ: Mapping[str, str] = os.environ) -> str:
    """What a run that begins now keeps of times, by the environment; one of `MODES`."""
    said = environ.get(VARIABLE, "").strip().lower()
    if said in MODES or not said:
        return said or MODES[0]
    log.warning("%s=%s is not one of %s, so it is %s", VARIABLE, said[:40], ", ".join(MODES), MODES[0])
    return MODES[0]


@dataclass(slots=True)
class Row:
    """Calls of one role in one block that took the same path. Counted by `engine/session.py`, timed by
    `timed_kernel.py`."""

    role: str
    block: str
    backend: str
    source: str
    mask: str
    """The kind of mask, and how it was honoured: `none`; `bool`, passed on; `key_padding, trimmed`; and so on."""
    reason: str | None = None
    """Why this backend ran instead of the one that was asked for; None when it was the one."""
    asked: str | None = None
    member: str | None = None
    """Which kernel of a backend group ran; None where the backend is one kernel."""
    calls: int = 0
    launches: int = 0
    """Calls of the kernel: more than `calls` where a mask divides them."""
    timed: int = 0
    """Launches whose time is known by now."""
    nanoseconds: int = 0
    """What the timed launches took on their device; without the guard and the choice of the kernel."""
    guard: Findings | None = None
    """What the guard found; None where it looked at no call."""

    @property
    def by_another(self) -> bool:
        """Whether another pack computed these calls; `member` is its name."""
        return self.backend == BY_ANOTHER

    def add_time(self, milliseconds: float) -> None:
        """Take the time of one launch."""
        self.nanoseconds += int(milliseconds * 1e6)
        self.timed += 1


@dataclass
class RunReport:
    """Rows and notes of one run."""

    model: str = ""
    device: str = "cpu"
    steps: int = 0
    seconds: float | None = None
    """From the first model call to the end of the run, the device synchronised; loading and decoding left out."""
    bypass: str = ""
    """Attention of this model family that never reaches the hook, so that nothing here can count it."""
    rows: dict[tuple[str, str, str, str, str | None, str], Row] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    """What else a person should know, each with how often it happened."""
    layers: tuple[AttentionConfig, ...] = ()
    """The configurations that held for the whole of it, highest first; empty where they changed."""
    categories: dict[str, str] = field(default_factory=dict)
    """The category of each role that was called, whoever computed it."""
    timeline: Timeline = field(default_factory=Timeline)
    another: dict[str, str] = field(default_factory=dict)
    """Who else computed calls, each with where it stands: `after this node`, `before this node`, or empty."""
    unseen: dict[str, None] = field(default_factory=dict)
    """Who else ran in a compiled model, where it is not seen whether they computed attention."""
    unused: str = ""
    """Why no attention call of this run is known; empty where one is."""
    stopped: outcome.Outcome | None = None
    """How it ended before its end, or that it still goes on; None for a run that is over and whole."""
    tuning: Tuning = field(default_factory=Tuning)
    """What became of the calls for which `autotune` was asked for."""
    node_id: str = ""
    """The node of the graph that samples; empty where there is none, or it is not known."""
    recorder: Recorder | None = None
    """The decisions, kind of call by kind of call; None where nobody records them."""
    mode: str = field(default_factory=trace_mode)
    """One of `MODES`, for the whole of it."""
    clocks: list[DeviceClock] = field(default_factory=list)
    """One for each session that times calls."""

    def new_clock(self, kind: str) -> DeviceClock | None:
        """The clock of a session on a kind of device; None where nothing is timed."""
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
        """The row for this path, made when it is new."""
        key = (role, block, backend, mask, reason, source)
        row = self.rows.get(key)
        if row is None:
            row = self.rows[key] = Row(role, block, backend, source, mask, reason, asked)
        return row

    def note(self, text: str) -> bool:
        """Count a note; True when it is new, so that the caller can log it once."""
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
        """Note in the timeline what was counted since the last model call; nothing waits for the device.

        Args:
            clock: of the session that ran it, on `device`.
            sigma, schedule: that of the model call, one for each sample, and those of its sampler.
            step: of the model call, where the host knows it; else it is told by the sigmas.
        """
        # A copy: of several devices each has a thread, and another one may make a row meanwhile.
        timeline, rows = self.timeline, list(self.rows.values())
        if self.mode == "off":
            timeline.model_calls += 1
            return
        window = timeline.end_of_model_call(rows)
        number = timeline.model_calls
        timeline.steps.add(number, sigma, schedule, step)
        if clock is not None and clock.has_events:
            if window is not None:
                clock.mark(partial(self._come_to, window), device)
            clock.collect()
        elif clock is not None and window is not None:
            window.add_times(rows)
        if self.mode == "sampled":
            for one in self.clocks:
                one.paused = self._is_left_out(number + 1)

    def _come_to(self, window: Window) -> None:
        """The device has done everything up to the end of a window."""
        window.add_times(list(self.rows.values()))
        self.timeline.steps.settle(window.last)

    def collect(self) -> None:
        """Take the times that are there by now, without waiting for others."""
        for clock in self.clocks:
            clock.collect()

    def end_of_run(self) -> None:
        """The devices have come to rest: read what is still on them."""
        for clock in self.clocks:
            clock.collect(wait=True)
        self.timeline.steps.settle(self.timeline.model_calls, at_rest=True)

    def windows(self) -> list[dict[str, object]]:
        """The timeline as plain data; see `Timeline.as_list`. Empty with the trace off."""
        return [] if self.mode == "off" else self.timeline.as_list(list(self.rows.values()))

    @property
    def calls(self) -> int:
        """Attention calls that were routed."""
        return sum(row.calls for row in self.rows.values())

    def as_dict(self) -> dict[str, object]:
        """The run as plain data.

        `ms` is what all calls of a row took on their device, by those that were timed: `timed` of `calls`. It is None
        where none was: in model calls that are not sampled, on devices without events, with the trace off.
        """
        rows = [
            {
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
            for row in self.rows.values()
            if row.calls
        ]
        notes = [text if count == 1 else f"{text} ({count} times)" for text, count in self.notes.items()]
        return {
            "model": self.model,
            "device": self.device,
            "trace": self.mode,
            "steps": self.steps,
            "seconds": self.seconds,
            "bypass": self.bypass,
            "rows": rows,
            "guard": worst_first(self.rows.values()),
            "tuning": self.tuning.as_dict(),
            "outcome": outcome.of_run_report(self).as_dict(),
            "audit": [finding.as_dict() for finding in asked_and_ran(self)],
            "notes": notes,
        }

    def summary(self) -> str:
        """One line: each role with its backends and calls, then how many calls fell back."""
        totals: dict[tuple[str, str], int] = {}
        fallbacks = others = 0
        for row in self.rows.values():
            if row.calls:
                totals[row.role, row.backend] = totals.get((row.role, row.backend), 0) + row.calls
                others += row.calls if row.by_another else 0
                fallbacks += row.calls if row.reason and not row.by_another else 0
        parts = [f"{role} {backend} {calls} calls" for (role, backend), calls in totals.items()]
        ended = [f"{fallbacks} fallbacks"] if fallbacks else []
        said = outcome.of_run_report(self).text
        return "; ".join([", ".join(parts or ["no attention call reached us"]), *ended, *([said] if said else [])])
