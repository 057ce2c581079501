"""The route of a machine as a report: which backends `auto` tries there, which of them can run, and which is first.

`engine/priorities.py` has the data, a `Router` what is true of the machine; here both become plain data and text for
the command line. A backend that is listed as available may still refuse a call, which `explain` shows for one call.
"""

from __future__ import annotations

from typing import Any

from ..engine.priorities import PRIORITIES, Priority, default_line
from ..engine.router import Router
from ..values.platform import dotted


def route_report(router: Router) -> dict[str, Any]:
    """The route of the router's machine as plain data."""
    priority = router.priority
    first = router.default_backend()
    return {
        "platform": router.platform.describe(),
        **row_of(priority),
        "exact": [_state(router, backend_id) for backend_id in priority.order],
        "lossy": [_state(router, backend_id) for backend_id in priority.lossy],
        "auto": first,
        "log": default_line(router.platform, first),
    }


def all_routes() -> list[dict[str, Any]]:
    """Every row of `PRIORITIES` as plain data, in the order in which they are tried."""
    return [
        {**row_of(priority), "exact": list(priority.order), "lossy": list(priority.lossy)} for priority in PRIORITIES
    ]


def row_of(priority: Priority) -> dict[str, Any]:
    lowest, highest = priority.capabilities or (None, None)
    return {
        "title": priority.title,
        "kinds": list(priority.kinds),
        "capabilities": None if lowest is None or highest is None else [dotted(lowest), dotted(highest)],
        "evidence": priority.evidence,
        "source": priority.source,
    }


def as_text(report: dict[str, Any]) -> str:
    lines = [
        f"Machine: {report['platform']}",
        f"Route:   {report['title']} ({report['evidence']}: {report['source']})",
        f"Log:     {report['log']}",
        "",
        "Exact, which is what auto takes, best first:",
        *_lines(report["exact"], report["auto"]),
    ]
    if report["lossy"]:
        lines += ["Lossy, tried before these where accuracy allows more than exact:", *_lines(report["lossy"], None)]
    lines.append("For one call, with its shapes and mask: explain.")
    return "\n".join(lines)


def all_as_text(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        cards = f" {row['capabilities'][0]} to {row['capabilities'][1]}" if row["capabilities"] else ""
        lines += [
            f"{row['title']} ({', '.join(row['kinds'])}{cards})",
            f"  exact:    {', '.join(row['exact'])}",
            *([f"  lossy:    {', '.join(row['lossy'])}"] if row["lossy"] else []),
            f"  evidence: {row['evidence']}: {row['source']}",
        ]
    return "\n".join(lines)


def _state(router: Router, backend_id: str) -> dict[str, Any]:
    reasons = router.unavailable(backend_id)
    return {"backend": backend_id, "available": not reasons, "reasons": list(reasons)}


def _lines(states: list[dict[str, Any]], first: str | None) -> list[str]:
    width = max(len(state["backend"]) for state in states)
    lines = []
    for number, state in enumerate(states, 1):
        status = "available" if state["available"] else f"no: {'; '.join(state['reasons'])}"
        mark = "   <- auto starts here" if state["backend"] == first else ""
        lines.append(f"  {number} {state['backend']:{width}}  {status}{mark}")
    return lines
