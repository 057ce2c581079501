"""Which rows of an account had calls in which model calls of a run, in few windows however long the run is.

Written once per model call, never per attention call. Model calls are numbered from 1; a sampler makes one or more of
them per step, and reading the step itself from the device would cost a synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trace import Row

MOST = 64
"""Windows that are kept; past that every two neighbours become one."""


@dataclass(slots=True)
class Window:
    """The model calls `first` to `last`, and what each row counted in them: row -> [calls, nanoseconds]."""

    first: int
    last: int
    counted: dict[int, list[int]] = field(default_factory=dict)

    def add(self, last: int, counted: dict[int, list[int]]) -> None:
        """Take in what follows, up to the model call `last`."""
        self.last = last
        for row, (calls, nanoseconds) in counted.items():
            mine = self.counted.setdefault(row, [0, 0])
            mine[0] += calls
            mine[1] += nanoseconds


class Timeline:
    """The windows of one run."""

    def __init__(self) -> None:
        self.windows: list[Window] = []
        self._model_calls = 0
        self._per_window = 1
        self._before: list[tuple[int, int]] = []
        self._pattern: list[tuple[int, int]] = []

    def end_of_model_call(self, rows: Iterable[Row], timed: bool) -> None:
        """Note what the rows, always in the order in which they were made, have counted since the last time.

        Where times mean nothing (`timed` is false), model calls with equal counts share a window.
        """
        self._model_calls += 1
        now = [(row.calls, row.nanoseconds) for row in rows]
        before = self._before + [(0, 0)] * (len(now) - len(self._before))
        counted = {
            row: [calls - calls_before, nanoseconds - nanoseconds_before]
            for row, ((calls, nanoseconds), (calls_before, nanoseconds_before)) in enumerate(
                zip(now, before, strict=True)
            )
            if calls != calls_before
        }
        pattern = [(row, calls) for row, (calls, _) in counted.items()]
        last = self.windows[-1] if self.windows else None
        if last is not None and (
            (not timed and pattern == self._pattern) or last.last - last.first + 1 < self._per_window
        ):
            last.add(self._model_calls, counted)
        else:
            self.windows.append(Window(self._model_calls, self._model_calls, counted))
        self._before, self._pattern = now, pattern
        if len(self.windows) > MOST:
            self._halve()

    def _halve(self) -> None:
        kept = []
        for first, *second in (self.windows[i : i + 2] for i in range(0, len(self.windows), 2)):
            for window in second:
                first.add(window.last, window.counted)
            kept.append(first)
        self.windows = kept
        self._per_window *= 2

    def as_list(self, rows: Iterable[Row], timed: bool) -> list[dict[str, Any]]:
        """`[{"first", "last", "cells": [[row, calls, ms or None], ...]}]`; rows as in `Trace.as_dict`."""
        number, numbers = 0, {}
        for index, row in enumerate(rows):
            if row.calls:
                numbers[index] = number
                number += 1
        return [
            {
                "first": window.first,
                "last": window.last,
                "cells": [
                    [numbers[row], calls, round(nanoseconds / 1e6, 3) if timed else None]
                    for row, (calls, nanoseconds) in list(window.counted.items())
                    if row in numbers
                ],
            }
            for window in list(self.windows)
        ]
