"""The calls of each row over the model calls of a run, in at most `MOST` windows.

Updated once per model call. Model calls are numbered from 1; a sampler makes one or more per step. A window has the
rows' cumulative counts at its end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from .kept import Part, measured_gain
from .steps import Steps

if TYPE_CHECKING:
    from . import Row

MOST = 64
"""Most windows; beyond, neighbours are merged in pairs."""


class Window:
    """Cumulative counts of each row after model call `last`, rows in order of creation."""

    __slots__ = ("counts", "kept", "last", "times")

    def __init__(self, last: int, rows: Collection[Row]) -> None:
        self.last = last
        self.counts = [(row.calls, row.launches) for row in rows]
        self.kept = {
            number: (row.kept.calls, row.kept.total, sum(row.kept.dense.values()))
            for number, row in enumerate(rows)
            if row.kept is not None
        }
        """Of sparse rows: calls with a map, the sum of their kept fractions, calls that were computed whole."""
        self.times: list[tuple[int, int]] | None = None
        """(timed, nanoseconds) of each row; None until the device has finished the window."""

    def add_times(self, rows: Collection[Row]) -> None:
        """Store the times; the device has finished the window."""
        self.times = [(row.timed, row.nanoseconds) for row in rows]


NOTHING = Window(0, ())
NOTHING.add_times(())


class Timeline:
    def __init__(self) -> None:
        self.windows: list[Window] = []
        self.model_calls = 0
        """Number of finished model calls."""
        self.steps = Steps()
        self._per_window = 1

    def end_of_model_call(self, rows: Collection[Row]) -> Window | None:
        """Count a model call. Returns the window that it ends, for `add_times`, or None."""
        self.model_calls += 1
        if self.model_calls % self._per_window:
            return None
        window = Window(self.model_calls, rows)
        self.windows.append(window)
        if len(self.windows) > MOST:
            self._per_window *= 2
            self.windows = [window for window in self.windows if window.last % self._per_window == 0]
        return window

    def as_list(self, rows: Collection[Row], *, live: bool = False) -> list[dict[str, Any]]:
        """`[{"first", "last", "steps": [first, last] or None, "cells": [[row, calls, ms or None], ...]}]`.

        Rows as in `RunReport.as_dict`; steps from 0. Equal neighbours without times are merged. A cell of a sparse
        backend has a fourth value, the share of query-key pairs that its calls computed; `live`: only where that is
        known without waiting for a device.
        """
        number, numbers = 0, {}
        for index, row in enumerate(rows):
            if row.calls:
                numbers[index] = number
                number += 1
        merged: list[dict[str, Any]] = []
        for first, last, parts in self._parts(rows, live):
            cells = [
                [numbers[row], calls, ms, *([] if part is None else [round(part.fraction, 4)])]
                for row, calls, ms, part in parts
                if row in numbers
            ]
            if merged and _alike(merged[-1], first, last, cells):
                for cell, (_, calls, *_) in zip(merged[-1]["cells"], cells, strict=True):
                    cell[1] += calls
                merged[-1]["last"] = last
            else:
                merged.append({"first": first, "last": last, "steps": None, "cells": cells})
        for entry in merged:
            entry["steps"] = self.steps.between(entry["first"], entry["last"])
        return merged

    def gains(self, rows: Collection[Row], *, live: bool = False) -> dict[int, float | None]:
        """Number of a sparse row -> how much faster its calls with a map were than those that were computed whole."""
        found: dict[int, list[Part]] = {}
        for _, _, parts in self._parts(rows, live):
            for row, _, _, part in parts:
                if part is not None:
                    found.setdefault(row, []).append(part)
        return {row: measured_gain(parts) for row, parts in found.items()}

    def _parts(self, rows: Collection[Row], live: bool) -> list[tuple[int, int, list[_Cell]]]:
        """(first model call, last, cells) of each window, and of what came after the last one."""
        windows, model_calls = list(self.windows), self.model_calls
        if model_calls > (windows[-1].last if windows else 0):
            windows.append(Window(model_calls, rows))
            windows[-1].add_times(rows)
        kept = _read(windows, live)
        return [
            (before.last + 1, window.last, _cells(before, window, kept))
            for before, window in zip(chain((NOTHING,), windows), windows, strict=False)
        ]


_Cell = tuple[int, int, float | None, Part | None]
"""(row, calls, milliseconds or None, of a sparse row what was kept)."""


def _cells(before: Window, window: Window, kept: Mapping[int, float]) -> list[_Cell]:
    """Each row with calls between the ends of two windows."""
    cells: list[_Cell] = []
    # Rows may be newer than the earlier window, or than the device's end of this one.
    earlier = chain(before.counts, repeat((0, 0)))
    for row, ((calls, launches), (earlier_calls, earlier_launches)) in enumerate(
        zip(window.counts, earlier, strict=False)
    ):
        if calls == earlier_calls:
            continue
        ms, part = None, None
        if window.times is not None and before.times is not None:
            (timed, nanoseconds), (earlier_timed, earlier_nanoseconds) = _at(window.times, row), _at(before.times, row)
            ms = milliseconds(nanoseconds - earlier_nanoseconds, timed - earlier_timed, launches - earlier_launches)
        if row in window.kept:
            (mapped, total, dense), (mapped_before, total_before, dense_before) = (
                one.kept.get(row, (0, 0.0, 0)) for one in (window, before)
            )
            both = mapped - mapped_before + dense - dense_before
            shares = [one if isinstance(one, float) else kept.get(id(one)) for one in (total, total_before)]
            if both and shares[0] is not None and shares[1] is not None:
                part = Part(both, dense - dense_before, shares[0] - shares[1], ms)
        cells.append((row, calls - earlier_calls, ms, part))
    return cells


def _read(windows: Iterable[Window], live: bool) -> dict[int, float]:
    """The sums of kept fractions that are tensors, by identity; each device is waited for once, and not if `live`."""
    tensors = {
        id(total): total
        for window in windows
        for _, total, _ in window.kept.values()
        if not isinstance(total, float) and (not live or total.is_cpu)
    }
    if not tensors:
        return {}
    import torch

    found: dict[int, float] = {}
    for device in {tensor.device for tensor in tensors.values()}:
        here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
        found |= zip(here, torch.stack([tensor.float() for tensor in here.values()]).tolist(), strict=True)
    return found


def _at(times: list[tuple[int, int]], row: int) -> tuple[int, int]:
    return times[row] if row < len(times) else (0, 0)


def milliseconds(nanoseconds: int, timed: int, launches: int) -> float | None:
    """Milliseconds of all `launches`, extrapolated from `timed` ones that took `nanoseconds`; None without any."""
    return round(nanoseconds / 1e6 * max(launches / timed, 1), 3) if timed else None


def _alike(window: dict[str, Any], first: int, last: int, cells: list[list[Any]]) -> bool:
    """Whether the next window has the same calls per model call, and neither has times."""
    length, length_before = last - first + 1, window["last"] - window["first"] + 1
    return [row for row, *_ in cells] == [row for row, *_ in window["cells"]] and all(
        ms is None and ms_before is None and kept == kept_before and calls * length_before == calls_before * length
        for (_, calls, ms, *kept), (_, calls_before, ms_before, *kept_before) in zip(
            cells, window["cells"], strict=True
        )
    )
