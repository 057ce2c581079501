"""Repeated runs of several backends, interleaved, and what happens when one of them fails.

Boundary: it knows of clocks, devices and errors; what a run does is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..backends.values.devices import release, synchronise
from ..backends.values.faults import is_cuda_fault, is_out_of_memory
from .contenders import RefusedError, Routed
from .report import Row, Spread

Progress = Callable[[str, int, int], None]
"""progress(what, done, all): called before each run; what it raises ends the comparison."""


@dataclass
class Entry:
    """One backend in the race: its row, its attention, and what was measured so far. Results lie on the CPU.

    Of its attention only `ran` and `attention_ms` are asked here; the rest is between it and the work.
    """

    row: Row
    attention: Routed
    total_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    attention_ms: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    result: list[Tensor] = field(default_factory=list)

    def settle(self) -> None:
        """Write what was measured into the row."""
        row = self.row
        row.runs = len(self.total_ms)
        row.ran = self.attention.ran if row.runs else None
        row.total_ms, row.step_ms = Spread.of(self.total_ms), Spread.of(self.step_ms)
        row.peak_memory = max(self.peaks, default=None)
        if self.attention_ms:
            row.attention_share = sum(self.attention_ms) / sum(self.total_ms)


Work = Callable[[Entry, Callable[[], None]], "list[Tensor]"]
"""work(entry, lap) does one run and returns its results; it calls `lap` after each step."""


def round_robin(
    entries: Sequence[Entry], repeat: int, warm_up: Work, work: Work, device: torch.device, progress: Progress
) -> bool:
    """Warm every backend up, then run each once, `repeat` times over; True when a person interrupted it.

    A backend that fails is left out from there on, its row says why and keeps the runs that it finished.
    """
    runs = [(0, warm_up), *((turn + 1, work) for turn in range(repeat))]
    lost: str | None = None
    try:
        for turn, what in runs:
            for index, entry in enumerate(entries):
                if entry.row.failed is not None:
                    continue
                if lost is not None:
                    entry.row.failed = lost
                    continue
                stage = f"run {turn} of {repeat}" if turn else "the warm-up"
                progress(f"{entry.row.asked}: {stage}", turn * len(entries) + index, len(runs) * len(entries))
                try:
                    _run(entry, what, device, counts=turn > 0)
                except Exception as error:  # any failure of one backend is its row; the others go on
                    entry.row.failed = f"{why(error)} (in {stage})"
                    if is_cuda_fault(error):
                        lost = f"not run to the end: {entry.row.asked} left the device unusable"
                    else:
                        release(device)
    except KeyboardInterrupt:
        for entry in entries:
            if not entry.total_ms and entry.row.failed is None:
                entry.row.failed = "interrupted before its first run was finished"
        return True
    finally:
        for entry in entries:
            entry.settle()
    return False


def _run(entry: Entry, work: Work, device: torch.device, counts: bool) -> None:
    laps: list[float] = []

    def lap() -> None:
        synchronise(device)
        laps.append(perf_counter())

    module: Any = getattr(torch, device.type, None)
    measurable = hasattr(module, "reset_peak_memory_stats") and hasattr(module, "max_memory_allocated")
    if measurable:
        module.reset_peak_memory_stats(device)
    entry.attention.attention_ms(device)  # forget what was not part of a measured run
    lap()
    result = work(entry, lap)
    lap()
    attention = entry.attention.attention_ms(device)
    result = [tensor.to("cpu", copy=True) for tensor in result]
    if not counts:
        return
    entry.total_ms.append(1e3 * (laps[-1] - laps[0]))
    entry.step_ms += [1e3 * (after - before) for before, after in pairwise(laps[:-1])]
    if attention is not None:
        entry.attention_ms.append(attention)
    if measurable:
        entry.peaks.append(module.max_memory_allocated(device))
    if entry.result:
        same = all(_same(now, first) for now, first in zip(result, entry.result, strict=True))
        entry.row.repeatable = same and entry.row.repeatable is not False
    else:
        entry.result = result


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, NaN in the same places included."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def why(error: BaseException) -> str:
    """An error as a reason in one line; running out of memory is recognised through what it was wrapped in."""
    cause: BaseException | None = error
    while cause is not None:
        if is_out_of_memory(cause):
            return "out of memory: try a smaller size or fewer frames"
        cause = cause.__cause__
    line = " ".join(str(error).split())
    return line if isinstance(error, RefusedError) else f"failed: {type(error).__name__}: {line}"
