"""Resolves schedules for one sampler's sigmas and one model's blocks: the active entries at a model call.

Numbers and names only: callers read sigmas from the device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from . import AttentionConfig, AttentionSpec
from .layers import Choice, advisories_of, resolve
from .schedule import ROUNDING, TIMES, ScheduleEntry, step_of
from .windows import Numbers, Span


class _Placed(NamedTuple):
    """An entry resolved for a run: its windows as the run's steps, sigmas and blocks."""

    layer: AttentionConfig
    source: str
    entry: ScheduleEntry
    steps: frozenset[int]
    spans: tuple[Span, ...]
    blocks: frozenset[str]
    recommended: bool = False
    """An advisory: it beats only the default."""

    def takes(self, role: str, category: str, block: str, masked: bool) -> bool:
        """Whether it applies to such calls, apart from time."""
        return (
            self.entry.takes(role, category, self.layer.parent_of)
            and (not self.entry.blocks or block in self.blocks)
            and (masked or not self.entry.masked)
        )


Entries = frozenset[int]
"""Some entries of a timetable, by their numbers."""


class Window(NamedTuple):
    """What decides at a model call beside the call itself: plans are kept for each of them."""

    entries: Entries = frozenset()
    """The entries of the schedules that are active."""
    segment: int = 0
    """The part of a recorded run that is repeated."""
    grids: int = 0
    """The host's number for the token grids of its calls; 0 unless a sparse backend is asked for."""


ALWAYS = Window()


class Timetable:
    """The entries of every configuration of a run, on its sigmas and the blocks of its model.

    Entries are numbered through all configurations.
    """

    def __init__(
        self,
        layers: tuple[AttentionConfig, ...],
        sigmas: Sequence[float] = (),
        percent_to_sigma: Callable[[float], float] | None = None,
        blocks: Iterable[str] = (),
    ) -> None:
        """`sigmas`: of the sampler, one more than its steps; empty outside a sampler."""
        self.layers = layers
        self.sigmas = tuple(sigmas)
        self.count = max(len(self.sigmas) - 1, 0)
        self.blocks = tuple(blocks)
        series = _by_series(self.blocks)
        self._entries: list[_Placed] = []
        sources = [
            (layer, f"{layer.source}.schedule[{index}] ({entry.describe()})", entry, False)
            for layer in layers
            for index, entry in enumerate(layer.schedule)
        ]
        sources += [(layers[0], advisory.source_of_choice, advisory.where, True) for advisory in advisories_of(layers)]
        for layer, source, entry, recommended in sources:
            steps = {step for part in entry.steps for step in part.among(range(self.count))}
            spans = entry.sigmas
            if entry.percent and percent_to_sigma is not None:
                spans = tuple(_as_sigmas(span, percent_to_sigma) for span in entry.percent)
            named = _blocks_of(entry.blocks, series)
            self._entries.append(_Placed(layer, source, entry, frozenset(steps), spans, named, recommended))
        self._always: Entries = frozenset(
            number
            for number, placed in enumerate(self._entries)
            if not any(getattr(placed.entry, name) for name in TIMES)
        )
        self.all: Entries = frozenset(range(len(self._entries)))
        self.timed = self._always != self.all
        """Whether any entry has a time window."""
        self.was_active: set[int] = set()
        self.used: set[int] = set()
        """Two sets of entries: active at a model call so far; matched by at least one call."""
        self._doubtful: list[int] = []
        self._divided: dict[str, list[int]] = {}
        self._last: tuple[int, object, bool] = -1, None, False
        """Of the last model call without a known step: step by sigma, evaluation, whether the step is in doubt."""

    def at(self, sigma: float | None, step: int | None = None) -> Entries:
        """The active entries at a model call.

        Args:
            sigma: of the model call; None outside a sampler.
            step: of the sampler; None: derived from `sigma`.
        """
        active = self._active(sigma, step)
        self.was_active |= active
        return active

    def _active(self, sigma: float | None, step: int | None) -> Entries:
        if sigma is None:
            return self._always
        if step is None:
            step = self.step(sigma)
        return self._always.union(
            number
            for number, placed in enumerate(self._entries)
            if step in placed.steps or any(_inside(sigma, span) for span in placed.spans)
        )

    def step(self, sigma: float) -> int:
        """The step by sigma (`schedule.step_of`); -1 outside a sampler."""
        return min(step_of(sigma, self.sigmas), self.count - 1) if self.count else -1

    def unchanged(self, step: int) -> int:
        """Number of steps from this one on with the same active entries at the start of each."""
        now = self._active(self.sigmas[step], step)
        following = range(step + 1, self.count)
        return next((at for at in following if self._active(self.sigmas[at], at) != now), self.count) - step

    def watch(self, number: int, sigma: float, step: int | None, evaluation: object) -> None:
        """Record model calls outside the windows of their step, or whose step is in doubt.

        Args:
            number: of the model call, from 1.
            step: as in `at`.
            evaluation: identity of the evaluation of the model: one object for all model calls of it.
        """
        if step is not None:  # time windows in percent or sigmas use each model call's sigma
            other = self._active(sigma, step) ^ self._active(self.sigmas[step], step)
            for index in sorted(other):
                self._divided.setdefault(self._entries[index].source, []).append(number)
            return
        if not self.count or not any(placed.entry.steps for placed in self._entries):
            return
        last, before, in_doubt = self._last
        now = self.step(sigma)
        if evaluation is not before:
            in_doubt = now < last or (now == last and self._is_own(sigma))
        self._last = now, evaluation, in_doubt
        if in_doubt:
            self._doubtful.append(number)

    def _is_own(self, sigma: float) -> bool:
        return any(abs(sigma - value) <= ROUNDING * value for value in self.sigmas)

    def resolve(
        self, active: Entries, role: str, category: str, block: str, masked: bool = False
    ) -> tuple[Choice, str]:
        """(choice, note) for a call with these active entries; the note, or "", is about windows that overlap."""
        note, of_all_roles = "", ""

        def scheduled(layer: AttentionConfig) -> tuple[AttentionSpec, str] | None:
            nonlocal note, of_all_roles
            matching = [
                (number, placed)
                for number, placed in enumerate(self._entries)
                if number in active
                and not placed.recommended
                and placed.layer is layer
                and placed.takes(role, category, block, masked)
            ]
            if not matching:
                return None
            self.used.update(number for number, _ in matching)
            *earlier, (_, last) = matching
            lost = [placed.source for _, placed in earlier if placed.entry.spec != last.entry.spec]
            if lost and not note:
                note = f"windows of the schedule overlap: {last.source} wins over {', '.join(lost)}"
            of_all_roles = "" if last.entry.role else last.source
            return last.entry.spec, last.source

        choice = resolve(self.layers, role, category, scheduled)
        if choice.from_default and (source := self.advisory(active, role, category, block, masked)):
            choice = Choice(None, source, accuracy="exact", record=choice.record)
        if of_all_roles and choice.source == of_all_roles:
            choice = replace(choice, for_all_roles=True)
        return choice, note

    def advisory(self, active: Entries, role: str, category: str, block: str, masked: bool) -> str:
        """The source of the advisory that makes such calls exact, or ""."""
        for number, placed in enumerate(self._entries):
            if number in active and placed.recommended and placed.takes(role, category, block, masked):
                self.used.add(number)
                return placed.source
        return ""

    def between(self, sigma: float) -> str:
        """The note about a model call at a sigma that is not in the sampler's schedule; else ""."""
        stepped = [placed for placed in self._entries if placed.entry.steps]
        if not stepped or self._is_own(sigma):
            return ""
        windows = "; ".join(f"{placed.source}: {self._in_sigmas(placed.steps)}" for placed in stepped)
        return (
            f"this sampler also calls the model at sigmas between its steps, so steps became sigma windows: {windows}"
        )

    def _in_sigmas(self, steps: frozenset[int]) -> str:
        """Steps as sigma ranges, for falling sigmas."""
        parts = []
        for first in sorted(step for step in steps if step - 1 not in steps):
            last = next(step for step in range(first, self.count) if step + 1 not in steps)
            high, low = f"{self.sigmas[first]:.4g}", f"{self.sigmas[last + 1]:.4g}"
            ends = last == self.count - 1
            if first == 0:
                parts.append("any" if ends else f"above {low}")
            else:
                parts.append(f"{high} and below" if ends else f"{high} down to above {low}")
        return "sigma " + ", ".join(parts) if parts else "none of this run"

    def continue_from(self, before: Timetable) -> None:
        """Take over the records of another sampler's timetable of the same run."""
        self.was_active, self.used = before.was_active, before.used
        self._doubtful, self._divided = before._doubtful, before._divided

    def remarks(self) -> list[str]:
        """Notes after a run: model calls that were, or may have been, outside the windows of their step."""
        notes = [
            f"{source} goes by the sigma of each model call, and this sampler has several in a step: "
            f"model calls {_listed(numbers)} were not in the window of their step"
            for source, numbers in self._divided.items()
        ]
        if self._doubtful:
            notes.append(
                "the sampler calls the model again at sigmas where it was called before, and its loop was not found: "
                f"model calls {_listed(self._doubtful)} went by their sigma, and may be of another step"
            )
        return notes

    def unused(self, roles: Iterable[str]) -> list[str]:
        """Notes after a whole run: each unused entry, with the reason."""
        notes = []
        for number, placed in enumerate(self._entries):
            if number in self.used:
                continue
            if placed.recommended:
                notes.append(f"{placed.source}: no call of this run was concerned")
            elif number not in self.was_active:
                had = f"it had {self.count} steps, sigma {self.sigmas[0]:.4g} to {self.sigmas[-1]:.4g}" if self.count \
                    else "no sampler ran"  # fmt: skip
                notes.append(f"{placed.source} never held in this run: {had}")
            else:
                there = f"roles {', '.join(sorted(roles)) or 'none'}; blocks {', '.join(self.blocks) or 'none'}"
                notes.append(f"{placed.source} matched no attention call of this model: {there}")
        return notes


def _as_sigmas(span: Span, percent_to_sigma: Callable[[float], float]) -> Span:
    # A sigma above the first, from added noise, is still the start of the run.
    return Span(float(percent_to_sigma(span.first)) if span.first > 0 else math.inf, float(percent_to_sigma(span.last)))


def _listed(numbers: list[int], most: int = 12) -> str:
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more


def _inside(sigma: float, span: Span) -> bool:
    return span.last * (1 - ROUNDING) <= sigma <= span.first * (1 + ROUNDING)


def _by_series(blocks: Iterable[str]) -> dict[str, dict[int, str]]:
    """Blocks as series -> number -> block: `double_blocks.3` is number 3 of `double_blocks`."""
    series: dict[str, dict[int, str]] = {}
    for block in blocks:
        match = re.fullmatch(r"(.*?)\.?(\d+)", block)
        if match:
            series.setdefault(match[1], {})[int(match[2])] = block
    return series


def _blocks_of(parts: tuple[Numbers, ...], series: dict[str, dict[int, str]]) -> frozenset[str]:
    return frozenset(
        block_of[number]
        for part in parts
        for name, block_of in series.items()
        if part.series in ("", name)
        for number in part.among(sorted(block_of))
    )
