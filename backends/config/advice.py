"""The protocol of an advisory, as configurations use it; `observe/advisories.py` has the table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .schedule import ScheduleEntry


class Advice(Protocol):
    """Calls of a model family that an exact kernel runs, if a person switched that on."""

    @property
    def where(self) -> ScheduleEntry:
        """The calls, as a schedule entry."""

    @property
    def source_of_choice(self) -> str:
        """The source of the choice in a run report."""

    def applies_to(self, asked: str | None, accuracy: str) -> bool:
        """Whether it applies with the default backend `asked` (None: the platform's priorities) and this `accuracy`."""
