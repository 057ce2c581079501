"""The text of a run report: one line that says what ran, then a line for each thing that a person should know.

Those are the reasons of fallbacks, what sparse methods kept, what the guard found, and notes of the configuration and
of the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from ...backends.report import RunReport, kept

_OWN_NAME = re.compile(r"(\S+) \([^()]+(\([^()]+\))?\) means \1 here: ")
"""A note about a name of this library that another system has too."""


def text_of(name: str, run_report: RunReport, unmatched: Iterable[str] = ()) -> str:
    """The summary of one model's run.

    Args:
        name: of its component.
        unmatched: what of the configuration had no effect until now.
    """
    has_run = run_report.timeline.model_calls or run_report.calls
    what_ran = run_report.summary() if has_run else "has not run"
    if run_report.bypass:
        what_ran += f"; not reached: {run_report.bypass}"
    return "\n  ".join([f"{name}: {what_ran}", *dict.fromkeys((*_remarks(run_report), *unmatched))])


def _remarks(run_report: RunReport) -> Iterator[str]:
    reasons: dict[str, dict[str, None]] = {}
    for row in run_report.rows.values():
        if row.calls and row.reason and not row.by_another and not row.expected:
            reasons.setdefault(row.reason, {})[row.role] = None
    for reason, roles in reasons.items():
        yield f"{', '.join(roles)}: {reason}"
    yield from kept.lines(run_report.own_rows())
    checked = [row for row in run_report.rows.values() if row.guard is not None and row.guard.checked]
    for row in checked:
        if row.guard is not None and row.guard.alarms:
            yield f"guard: {row.role} {row.block}: {row.guard.alarms} of {row.guard.checked} checked calls bad: " \
                f"{row.guard.first_alarm}"  # fmt: skip
    if checked and not any(row.guard is not None and row.guard.alarms for row in checked):
        yield f"guard: {sum(row.guard.checked for row in checked if row.guard is not None)} calls checked, none bad"
    for layer in run_report.layers:
        yield from (note for note in layer.notes if not _OWN_NAME.match(note))
    yield from run_report.notes
