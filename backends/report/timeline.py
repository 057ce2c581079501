"""The calls of each row over the model calls of a run, in at most `MOST` windows.

Updated once per model call. Model calls are numbered from 1; a sampler makes one or more per step. A window has the
rows' cumulative counts at its end.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from .steps import Steps

if TYPE_CHECKING:
    from . import Row

MOST = 64
"""Most windows; beyond, neighbours are merged in pairs."""


class Window:
    """Cumulative counts of each row after model call `last`, rows in order of creation."""

    __slots__ = ("counts", "last", "times")

    def __init__(self, last: int, rows: Collection[Row]) -> None:
        self.last = last
        self.counts = [(row.calls, row.launches) for row in rows]
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

    def as_list(self, rows: Collection[Row]) -> list[dict[str, Any]]:
        """`[{"first", "last", "steps": [first, last] or None, "cells": [[row, calls, ms or None], ...]}]`.

        Rows as in `RunReport.as_dict`; steps from 0. Equal neighbours without times are merged.
        """
        windows, model_calls = list(self.windows), self.model_calls
        if model_calls > (windows[-1].last if windows else 0):
            windows.append(Window(model_calls, rows))
            windows[-1].add_times(rows)
        number, numbers = 0, {}
        for index, row in enumerate(rows):
            if row.calls:
                numbers[index] = number
                number += 1
        merged: list[dict[str, Any]] = []
        for before, window in zip(chain((NOTHING,), windows), windows, strict=False):
            cells = [[numbers[row], calls, ms] for row, calls, ms in _cells(before, window) if row in numbers]
            if merged and _alike(merged[-1], before.last + 1, window.last, cells):
                for cell, (_, calls, _) in zip(merged[-1]["cells"], cells, strict=True):
                    cell[1] += calls
                merged[-1]["last"] = window.last
            else:
                merged.append({"first": before.last + 1, "last": window.last, "steps": None, "cells": cells})
        for entry in merged:
            entry["steps"] = self.steps.between(entry["first"], entry["last"])
        return merged


def _cells(before: Window, window: Window) -> list[tuple[int, int, float | None]]:
    """(row, calls, milliseconds or None) of each row with calls between the ends of two windows."""
    cells = []
    # Rows may be newer than the earlier window, or than the device's end of this one.
    earlier = chain(before.counts, repeat((0, 0)))
    for row, ((calls, launches), (earlier_calls, earlier_launches)) in enumerate(
        zip(window.counts, earlier, strict=False)
    ):
        if calls == earlier_calls:
            continue
        ms = None
        if window.times is not None and before.times is not None:
            (timed, nanoseconds), (earlier_timed, earlier_nanoseconds) = _at(window.times, row), _at(before.times, row)
            ms = milliseconds(nanoseconds - earlier_nanoseconds, timed - earlier_timed, launches - earlier_launches)
        cells.append((row, calls - earlier_calls, ms))
    return cells


def _at(times: list[tuple[int, int]], row: int) -> tuple[int, int]:
    return times[row] if row < len(times) else (0, 0)


def milliseconds(nanoseconds: int, timed: int, launches: int) -> float | None:
    """Milliseconds of all `launches`, extrapolated from `timed` ones that took `nanoseconds`; None without any."""
    return round(nanoseconds / 1e6 * max(launches / timed, 1), 3) if timed else None


def _alike(window: dict[str, Any], first: int, last: int, cells: list[list[Any]]) -> bool:
    """Whether the next window has the same calls per model call, and neither has times."""
    length, length_before = last - first + 1, window["last"] - window["first"] + 1
    return [row for row, *_ in cells] == [row for row, *_ in window["cells"]] and all(
        ms is None and ms_before is None and calls * length_before == calls_before * length
        for (_, calls, ms), (_, calls_before, ms_before) in zip(cells, window["cells"], strict=True)
    )
