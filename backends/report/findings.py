"""What the guard found, as plain data and as text, and how likely it is to see what it looks for.

Boundary: no torch; the guard (`observe/guard/__init__.py`) fills it in, a `RunReport` keeps it in its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import Row

ROWS = 16
"""Query rows that are looked at in each head of a checked call."""
SHOWN = 8
"""Blocks that the report's text lists."""


@dataclass(slots=True)
class Findings:
    """The guard's figures over the checked calls of one row of a run report; the worst of each."""

    relative_l2_limit: float | None = None
    row_error_limit: float | None = None
    call_l2_limit: float | None = None
    """Above these a check is bad."""
    checked: int = 0
    relative_l2: float = 0.0
    """Of the worst head of a sample: error of its rows over their size."""
    row_error: float = 0.0
    """Of the worst row: its error over the root mean square size of its head's rows."""
    cosine: float = 1.0
    call_l2: float = 0.0
    """Of all heads and samples of a call together: the size of their rows' error over that of the rows."""
    head: int | None = None
    """The number of the worst head; `relative_l2` is its error."""
    alarms: int = 0
    """Checked calls that were bad."""
    first_alarm: str = ""
    """Why the first of them was, with the number of the call."""

    def add(
        self, relative_l2: float, row_error: float, cosine: float, call_l2: float = 0.0, head: int | None = None
    ) -> None:
        """Count a checked call. NaN, from an output that is not finite, counts as infinite."""
        self.checked += 1
        if _worst(relative_l2) > self.relative_l2:
            self.relative_l2, self.head = _worst(relative_l2), head
        self.call_l2 = max(self.call_l2, _worst(call_l2))
        self.row_error = max(self.row_error, _worst(row_error))
        self.cosine = min(self.cosine, -_worst(-cosine))

    def as_dict(self) -> dict[str, Any]:
        """Plain data; a figure that is not finite becomes None, since JSON has no number for it."""
        figures = {name: getattr(self, name) for name in ("relative_l2", "row_error", "cosine", "call_l2")}
        return {
            "checked": self.checked,
            **{name: float(f"{value:.4g}") if math.isfinite(value) else None for name, value in figures.items()},
            "relative_l2_limit": self.relative_l2_limit,
            "row_error_limit": self.row_error_limit,
            "call_l2_limit": self.call_l2_limit if self.call_l2_limit != math.inf else None,
            "head": self.head,
            "alarms": self.alarms,
            "first_alarm": self.first_alarm or None,
        }


def worst_first(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """What the guard found in a run report's rows, as plain data: most alarms first, then by error.

    `calls` are those that the kernel answered; one whose output was thrown away is checked, and not among them.
    """
    found = [
        {"role": row.role, "block": row.block, "backend": row.backend, "calls": row.calls, **row.guard.as_dict()}
        for row in rows
        if row.guard is not None
    ]
    return sorted(found, key=_severity, reverse=True)


def _worst(value: float) -> float:
    return math.inf if math.isnan(value) else value


def chance(row_share: float, checks: int, *, call_share: float = 1.0, rows: int = ROWS) -> float:
    """The probability that `checks` checked calls show an error that is rare and random.

    It spoils each call with probability `call_share`, and in a spoiled call each query row with probability
    `row_share`, whole rows in every head; `rows` is how many different ones are looked at. An error that takes heads
    too at random is seen more often.
    """
    in_a_call = 1 - (1 - row_share) ** rows
    return float(1 - (1 - call_share * in_a_call) ** checks)


def lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The guard's part of a report's text, from what `worst_first` gives: worst blocks first, then what is unseen."""
    if not found:
        return []
    found = sorted(found, key=_severity, reverse=True)
    calls, checked, alarms = (sum(entry[name] for entry in found) for name in ("calls", "checked", "alarms"))
    text = [
        f"guard: {checked} calls checked on {ROWS} query rows per head, {alarms} bad; {calls} ran; worst blocks first"
    ]
    for entry in found[:SHOWN]:
        where = f"{entry['role']} {entry['block']}".strip()
        size = "not finite" if entry["relative_l2"] is None else f"{entry['relative_l2']:.2g}"
        bad = f"; BAD {entry['alarms']}: {entry['first_alarm']}" if entry["alarms"] else ""
        limit = entry["relative_l2_limit"]
        error = f"relative L2 {size}" + (f" (limit {limit:g})" if limit else "")
        text.append(f"guard: {where}, {entry['backend']}: {error}, {entry['checked']} checked{_heads(entry)}{bad}")
    if len(found) > SHOWN:
        text.append(f"guard: {len(found) - SHOWN} more in the report's data")
    checks = min(entry["checked"] for entry in found)
    seen = ", ".join(f"{chance(1 / one_in, checks):.0%} if 1 row in {one_in:,} is bad" for one_in in (10, 100, 1000))
    text.append(f"guard: checks of each block: {checks}; chance to see an error that spoils rows at random: {seen}")
    return text


def _heads(entry: Mapping[str, Any]) -> str:
    """The worst head beside the whole call: `; head 3 is the worst, all together 0.014 (limit 0.075)`."""
    head, all_heads, limit = (entry.get(name) for name in ("head", "call_l2", "call_l2_limit"))
    if head is None or all_heads is None:
        return ""
    return f"; head {head} is the worst, all together {all_heads:.2g}" + (f" (limit {limit:g})" if limit else "")


def _severity(entry: Mapping[str, Any]) -> tuple[int, float]:
    return entry["alarms"], math.inf if entry["relative_l2"] is None else entry["relative_l2"]
