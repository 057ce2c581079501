"""What sparse backends computed and gained, from the rows of a run report as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from ..values.counted import counted


class Part(NamedTuple):
    """The calls of one sparse row in one window of the timeline."""

    calls: int
    dense: int
    """Of them, computed whole."""
    kept: float
    """Sum of the kept fractions of the others."""
    ms: float | None

    @property
    def fraction(self) -> float:
        """Computed query-key pairs over all, of all calls."""
        return (self.kept + self.dense) / self.calls


def measured_gain(parts: Sequence[Part]) -> float | None:
    """Time of a call that was computed whole over that of a call with a map; None unless both were timed.

    Medians over windows of one kind. The first window is left out where others of its kind are there: its calls are
    cold.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    for part in parts:
        if part.ms is not None and part.dense in (0, part.calls):
            times[part.dense > 0].append(part.ms / part.calls)
    if parts and parts[0].ms is not None and parts[0].dense in (0, parts[0].calls):
        first = times[parts[0].dense > 0]
        del first[: int(len(first) > 1)]
    dense, sparse = times[True], times[False]
    return round(median(dense) / median(sparse), 2) if dense and sparse and median(sparse) else None


def of_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each role and sparse backend: its blocks together.

    {"role", "backend", "calls", "kept", "expected_gain", "measured_gain", "dense", "read_back"}: `kept`,
    `expected_gain` and `measured_gain` of the calls with a map, None without any; `dense`: reason -> calls that were
    computed whole; `read_back`: calls that waited to read from their device.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "kept" in row:
            groups.setdefault((row["role"], row["backend"]), []).append(row)
    found = []
    for (role, backend), same in groups.items():
        dense: dict[str, int] = {}
        for reason, calls in (item for row in same for item in row["dense"].items()):
            dense[reason] = dense.get(reason, 0) + calls
        mapped = [(row["calls"] - sum(row["dense"].values()), row) for row in same if row["kept"] is not None]
        total = sum(calls for calls, _ in mapped)
        kept = sum(calls * row["kept"] for calls, row in mapped) / total if total else None
        gains = [(calls, row.get("measured_gain")) for calls, row in mapped]
        known = total and all(gain for _, gain in gains)
        found.append(
            {
                "role": role,
                "backend": backend,
                "calls": sum(row["calls"] for row in same),
                "kept": None if kept is None else round(kept, 4),
                "expected_gain": expected_gain(kept),
                "measured_gain": round(total / sum(calls / gain for calls, gain in gains if gain), 2)
                if known
                else None,
                "dense": dense,
                "read_back": sum(row.get("read_back", 0) for row in same),
            }
        )
    return found


def expected_gain(kept: float | None) -> float | None:
    """How much less work it is to compute this share of the pairs; None without one."""
    return round(1 / kept, 2) if kept else None


def lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each role and sparse backend."""
    found = []
    for one in of_rows(rows):
        parts = []
        if one["kept"] is not None:
            gain = "not measured" if one["measured_gain"] is None else f"measured {one['measured_gain']:.2f}x"
            parts.append(f"{100 * one['kept']:.0f} % kept, gain expected {one['expected_gain']:.2f}x, {gain}")
        parts += [f"{counted(calls, 'call')} computed whole: {reason}" for reason, calls in one["dense"].items()]
        if one["read_back"]:
            parts.append(f"{counted(one['read_back'], 'call')} waited for the device to read what is kept")
        found.append(f"{one['role']} {one['backend']}: {'; '.join(parts)}")
    return found
