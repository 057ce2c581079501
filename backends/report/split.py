"""The reports of a run whose model calls the host divides over several devices, as one.

ComfyUI's MultiGPU CFG Split runs the prompts of a step on several cards, one thread for each. Each card has a separate
report, so no report is written by two threads: that of the first card has the others in `RunReport.split`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..values.reasons import Reason
from .tuning import DECIDED, OPEN, Tuning

if TYPE_CHECKING:
    from . import RunReport


def parts(run_report: RunReport) -> list[RunReport]:
    """The report, then those of the other devices of its split."""
    return [run_report, *run_report.split.values()]


def by_card(run_report: RunReport) -> dict[str, RunReport]:
    """Name of a device -> its report; empty without a split."""
    return {part.card: part for part in parts(run_report)} if run_report.split else {}


def whole(run_report: RunReport) -> RunReport:
    """A copy with the rows, roles, notes and tuning of all devices of a split; the report itself without one.

    A note of another device begins with its name, unless the first device has the same note.
    """
    if not run_report.split:
        return run_report
    made = replace(run_report, rows={}, notes=dict(run_report.notes), categories={}, tuning=Tuning())
    for part in parts(run_report):
        # Copies: the threads of other devices may add to these.
        made.rows |= {(part.card, *key): row for key, row in list(part.rows.items())}
        made.categories |= dict(part.categories)
        made.another = part.another | made.another
        made.unseen = part.unseen | made.unseen
        for key, state in list(part.tuning.kinds.items()):
            if state in (OPEN, DECIDED) or key not in made.tuning.kinds:
                made.tuning.kinds[key] = state
        if part is not run_report:
            for text, count in list(part.notes.items()):
                if text not in run_report.notes:
                    made.notes[Reason("named", name=part.card, reason=text)] = count
    return made


def windows(run_report: RunReport, *, live: bool) -> list[dict[str, Any]]:
    """The timelines of all devices as one, by the sampler's steps; of the first device alone where those are unknown.

    Rows are numbered as in `RunReport.as_dict`; `first` and `last` are model calls of the device.
    """
    before, found = 0, []
    for number, part in enumerate(parts(run_report)):
        rows = list(part.rows.values())
        for window in part.timeline.as_list(rows, live=live):
            for cell in window["cells"]:
                cell[0] += before
            found.append((number, window))
        before += sum(row.calls > 0 for row in rows)
    if run_report.split and all(window["steps"] for _, window in found):
        found.sort(key=lambda one: (one[1]["steps"], one[0]))
        return [window for _, window in found]
    return [window for number, window in found if number == 0]
