"""Repeats a recorded run: the record's backend becomes the choice for each kind of call.

Precedence: a record beats the default, and loses to roles and windows of later nodes.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from ...engine.observer import Chooser

if TYPE_CHECKING:
    from ...config.layers import Choice
    from ...engine.plan import CallKind
    from ...report import RunReport

log = logging.getLogger("attention_backends")


class Replay(Chooser):
    """Chooses the recorded backend at the current model call."""

    def __init__(self, run_report: RunReport) -> None:
        self.run_report = run_report
        self._known: dict[str, set[bool]] = {}
        """Role -> {True}, {False} or both: whether the record has its calls."""

    def choice(self, kind: CallKind, choice: Choice, *, planned: bool) -> Choice:
        """The recorded choice; where the record has none, `choice`, and without the record if a plan follows."""
        if choice.record is None:
            return choice
        run = choice.record.run_of(self.run_report.node_id, self.run_report.card)
        number, card = self.run_report.timeline.model_calls + 1, self.run_report.card
        recorded = run.choice(kind.role, kind.block, kind.request, number, card)
        if recorded is None and not planned:
            return choice
        if planned:
            known = self._known.setdefault(kind.role, set())
            if (recorded is not None) not in known:
                known.add(recorded is not None)
                if False in known:
                    self._note_unknown(kind, choice, "some" if True in known else "any")
        return replace(choice, record=None) if recorded is None else recorded

    def _note_unknown(self, kind: CallKind, choice: Choice, how_many: str) -> None:
        """Note in the run report that the record has none, or only some, of a role's calls."""

        def text(how_many: str) -> str:
            decides = f"{choice.asked or 'auto'} via {choice.source} decides"
            return f"role {kind.role}: the record does not know {how_many} of its calls; {decides}"

        if self.run_report.notes.pop(text("any"), None) is None:
            log.warning("role %s %s: the record does not know this call: %s", kind.role, kind.block,
                        kind.request.describe())  # fmt: skip
        self.run_report.note(text(how_many))
