"""The outcome of a run as one sentence, shared by node, tab, report, HTTP and log.

A sentence has a kind and a cause. The texts of kinds are here in English, and in locales/ for the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..values.errors import NoBackendError
from ..values.faults import is_out_of_memory
from ..values.reasons import Reason
from .audit import UnexplainedError, unseen

if TYPE_CHECKING:
    from . import RunReport

RUNNING, DONE = "running", "done"
CANCELLED, REFUSED, OUT_OF_MEMORY, FAILED = "cancelled", "refused", "out_of_memory", "failed"
NOT_USED, PARTLY = "not_used", "partly"
WORDS = {
    RUNNING: "",
    DONE: "",
    CANCELLED: "Cancelled",
    REFUSED: "Stopped by strict: {cause}",
    OUT_OF_MEMORY: "Out of memory: {cause}",
    FAILED: "Failed: {cause}",
    NOT_USED: "Not used: {cause}",
    PARTLY: "Partly used: {cause}",
}
REASONS = 3
"""Index of the line of a refusal with the named backend's reasons."""
STOPPED = (CANCELLED, REFUSED, OUT_OF_MEMORY, FAILED)
"""Kinds of a run that did not finish."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run; `kind` is a key of `WORDS`."""

    kind: str
    cause: str = ""

    @property
    def text(self) -> str:
        """The sentence; may be empty."""
        return WORDS[self.kind].format(cause=self.cause)

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "cause": self.cause, "text": self.text}


def of_error(error: BaseException, *, strict: bool, cancelled: bool = False) -> Outcome:
    """The outcome of a run that ended with `error`; `strict`: of its settings."""
    if cancelled:
        return Outcome(CANCELLED)
    if is_out_of_memory(error):
        return Outcome(OUT_OF_MEMORY, first_line(error))
    if strict and isinstance(error, (NoBackendError, UnexplainedError)):
        return Outcome(REFUSED, _refusal(error))
    return Outcome(FAILED, first_line(error))


def _refusal(error: BaseException) -> str:
    """The first line of a refusal, with the named backend's reasons if `Router.explain_refusal` made it."""
    lines = str(error).splitlines()
    listed = len(lines) > REASONS and lines[1].startswith("  call: ")
    return f"{lines[0]}: {lines[REASONS].strip()}" if listed else first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not empty."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), "an error without a message")


def of_run_report(run_report: RunReport) -> Outcome:
    """The outcome of a finished run, from its run report."""
    if run_report.stopped is not None:
        return run_report.stopped
    theirs: dict[str, int] = {}
    for row in run_report.rows.values():
        if row.by_another and row.calls:
            theirs[row.member or ""] = theirs.get(row.member or "", 0) + row.calls
    total, others = run_report.calls, sum(theirs.values())
    if others and others == total:
        where = {name: f" {run_report.another.get(name, '')}".rstrip() for name in theirs}
        packs = " and ".join(name + where[name] for name in theirs)
        return Outcome(NOT_USED, Reason("another.took_over", packs=packs))
    if others:
        return Outcome(PARTLY, Reason("another.part", packs=" and ".join(theirs), others=others, total=total))
    if run_report.unused and not total:
        return Outcome(NOT_USED, run_report.unused)
    text = unseen(run_report)
    return Outcome(PARTLY, text) if text else Outcome(DONE)


def merged(outcomes: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The most important outcome of several stages."""
    order = list(WORDS)
    rank = {kind: (order.index(kind) if kind not in STOPPED else len(order)) for kind in order}
    return dict(max(outcomes, key=lambda each: rank[each["kind"]]))
