"""Figures of a run for a person: its step, time per step, attention's share, and what it saved against other kernels.

Two warm runs alone are compared. A run counts if it finished, all its attention calls came through this
node, and autotune tried nothing in it. It is warm if an earlier run that counts had the same graph but for seeds and
the values on our nodes, the same sampling node, model, device, steps and size, and the same kernels. It is compared
with the last warm run of other kernels. What ComfyUI takes from its cache is no run.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ...backends.report import BY_ANOTHER, outcome
from ...backends.report.tuning import OPEN

if TYPE_CHECKING:
    from ...backends.report import RunReport

MOST_GRAPHS = 64
MOST_KERNELS = 16
"""Most sets of kernels of one graph."""


def of_run(report: Mapping[str, Any], run_report: RunReport) -> dict[str, Any]:
    """{"step", "ms_per_step", "attention_share"} of a run that goes on or is over.

    Args:
        report: `run_report.as_dict()`.

    Each is None where it is not known: `step` of the last finished model call, from 1; the time until then, or that of
    a finished run, by its steps; the device time of attention calls by that time, if all of them are timed.
    """
    step, seconds, steps = run_report.steps_reached(), report["seconds"], report["steps"]
    if seconds is None and step and None not in (run_report.started, run_report.last_time):
        seconds, steps = run_report.last_time - run_report.started, step  # type: ignore[operator]
    return {
        "step": step,
        "ms_per_step": round(seconds * 1000 / steps, 1) if seconds and steps else None,
        "attention_share": _share(report, seconds),
    }


def _share(report: Mapping[str, Any], seconds: float | None) -> float | None:
    times = [row["ms"] for row in report["rows"]]
    if not seconds or not times or None in times:
        return None
    cards = len({row.get("card") for row in report["rows"]})  # they work at the same time: their mean share
    share: float = sum(times) / 1000 / seconds / cards
    return round(share, 3) if share <= 1 else None  # several cards at a time


class Saved(NamedTuple):
    """Seconds that a run took less than another one; negative: more."""

    seconds: float
    of: float
    """Seconds of the other run."""
    than: tuple[str, ...]
    """Backends of the other run."""

    def as_dict(self) -> dict[str, Any]:
        return {"seconds": round(self.seconds, 3), "of": round(self.of, 3), "than": list(self.than)}


class WarmRuns:
    """Seconds of the last warm run of each set of kernels, by graph. Not safe between threads."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, dict[Hashable, tuple[tuple[str, ...], float | None]]] = {}
        """Graph -> kernels -> backends and seconds, None for one cold run; the last ones at the end."""

    def add(self, graph: Hashable, report: Mapping[str, Any]) -> Saved | None:
        """Add a finished run; returns what it saved, None where nothing can be said."""
        if report["seconds"] is None or report["outcome"]["kind"] != outcome.DONE or report["tuning"]["state"] == OPEN:
            return None
        rows = report["rows"]
        if not rows or any(row["backend"] == BY_ANOTHER for row in rows):
            return None
        kernels = frozenset((row["role"], row["backend"], row["member"]) for row in rows)
        backends = tuple(dict.fromkeys(row["backend"] for row in rows))
        known = self._graphs[graph] = self._graphs.pop(graph, {})
        is_warm = kernels in known
        known.pop(kernels, None)
        others = [(names, seconds) for names, seconds in known.values() if seconds is not None]
        known[kernels] = backends, report["seconds"] if is_warm else None
        for full, most in ((known, MOST_KERNELS), (self._graphs, MOST_GRAPHS)):
            if len(full) > most:
                full.pop(next(iter(full)))
        if not is_warm or not others:
            return None
        than, seconds = others[-1]
        return Saved(seconds - report["seconds"], seconds, than)
