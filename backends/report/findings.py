"""`Findings`: the guard's figures of a row, as plain data and text; and the probability of detecting an error.

No torch. `observe/guard/` adds the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import Row

ROWS = 16
"""Compared query rows per head of a checked call."""
SHOWN = 8
"""Most blocks in the report's text."""


@dataclass(slots=True)
class Findings:
    """The worst figures of the checked calls of one row of a run report."""

    relative_l2_limit: float | None = None
    row_error_limit: float | None = None
    call_l2_limit: float | None = None
    """A check above any of these limits is an alarm."""
    checked: int = 0
    relative_l2: float = 0.0
    """||error|| / ||exact|| of the worst head of a sample."""
    row_error: float = 0.0
    """Of the worst row: ||error|| over the root mean square norm of its head's rows."""
    cosine: float = 1.0
    call_l2: float = 0.0
    """||error|| / ||exact|| over all heads and samples of a call."""
    head: int | None = None
    """Index of the worst head."""
    alarms: int = 0
    """Number of checks above a limit."""
    first_alarm: str = ""
    """Text of the first alarm, with the number of the call."""

    def add(
        self, relative_l2: float, row_error: float, cosine: float, call_l2: float = 0.0, head: int | None = None
    ) -> None:
        """Add a checked call; NaN, of an output that is not finite, counts as infinite."""
        self.checked += 1
        if _worst(relative_l2) > self.relative_l2:
            self.relative_l2, self.head = _worst(relative_l2), head
        self.call_l2 = max(self.call_l2, _worst(call_l2))
        self.row_error = max(self.row_error, _worst(row_error))
        self.cosine = min(self.cosine, -_worst(-cosine))

    def as_dict(self) -> dict[str, Any]:
        """Plain data; infinite figures are None, for JSON."""
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
    """The findings of a run report's rows as plain data, most alarms first, then by error.

    `calls` excludes calls whose output was rejected; `checked` includes them.
    """
    findings = [
        ({"card": row.card} if row.card else {})
        | {"role": row.role, "block": row.block, "backend": row.backend, "calls": row.calls, **row.guard.as_dict()}
        for row in rows
        if row.guard is not None
    ]
    return sorted(findings, key=_severity, reverse=True)


def _worst(value: float) -> float:
    return math.inf if math.isnan(value) else value


def chance(row_share: float, checks: int, *, call_share: float = 1.0, rows: int = ROWS) -> float:
    """The probability that `checks` checks detect a rare random error.

    The error affects a call with probability `call_share`, and each query row of such a call, in every head, with
    probability `row_share`. `rows`: compared rows per check.
    """
    in_a_call = 1 - (1 - row_share) ** rows
    return float(1 - (1 - call_share * in_a_call) ** checks)


def lines(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The guard's part of a report's text, from `worst_first`: worst blocks, then the detection limits."""
    if not findings:
        return []
    findings = sorted(findings, key=_severity, reverse=True)
    calls, checked, alarms = (sum(entry[name] for entry in findings) for name in ("calls", "checked", "alarms"))
    text = [
        f"guard: {checked} calls checked on {ROWS} query rows per head, {alarms} bad; {calls} ran; worst blocks first"
    ]
    for entry in findings[:SHOWN]:
        where = " ".join(filter(None, (entry.get("card"), entry["role"], entry["block"])))
        size = "not finite" if entry["relative_l2"] is None else f"{entry['relative_l2']:.2g}"
        bad = f"; BAD {entry['alarms']}: {entry['first_alarm']}" if entry["alarms"] else ""
        limit = entry["relative_l2_limit"]
        error = f"relative L2 {size}" + (f" (limit {limit:g})" if limit else "")
        text.append(f"guard: {where}, {entry['backend']}: {error}, {entry['checked']} checked{_heads(entry)}{bad}")
    if len(findings) > SHOWN:
        text.append(f"guard: {len(findings) - SHOWN} more in the report's data")
    checks = min(entry["checked"] for entry in findings)
    seen = ", ".join(f"{chance(1 / one_in, checks):.0%} if 1 row in {one_in:,} is bad" for one_in in (10, 100, 1000))
    text.append(f"guard: checks of each block: {checks}; chance to see an error that spoils rows at random: {seen}")
    return text


def _heads(entry: Mapping[str, Any]) -> str:
    """The worst head, and the whole call: `; head 3 is the worst, all together 0.014 (limit 0.075)`."""
    head, all_heads, limit = (entry.get(name) for name in ("head", "call_l2", "call_l2_limit"))
    if head is None or all_heads is None:
        return ""
    return f"; head {head} is the worst, all together {all_heads:.2g}" + (f" (limit {limit:g})" if limit else "")


def _severity(entry: Mapping[str, Any]) -> tuple[int, float]:
    return entry["alarms"], math.inf if entry["relative_l2"] is None else entry["relative_l2"]
