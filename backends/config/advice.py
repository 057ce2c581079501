"""What a configuration needs to know of an advisory; `observe/advisories.py` has the table of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .schedule import ScheduleEntry


class Advice(Protocol):
    """Calls of a model family that are better run by an exact kernel, once a person has switched that on."""

    @property
    def where(self) -> ScheduleEntry:
        """Which calls these are."""

    @property
    def source_of_choice(self) -> str:
        """The source of the choice, as the run report names it."""

    def applies_to(self, asked: str | None, accuracy: str) -> bool:
        """Whether it matters with the default `asked` (None: the priority of the platform) and this `accuracy`."""
