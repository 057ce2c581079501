"""The protocol of a recorder of decisions; `observe/replay/run_recorder.py` implements it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol


class Recorder(Protocol):
    """What a run report uses of a recorder; it is an `engine/observer.Observer` too."""

    not_repeated: dict[str, None]
    """Events that a replay cannot reproduce."""

    def begin_model_call(self, number: int, window: Hashable) -> None:
        """A model call begins, while these windows of the schedules hold."""
