"""What a run tells of its decisions, so that they can be repeated; `observe/replay/run_recorder.py` keeps them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol


class Recorder(Protocol):
    """What a run report needs of it; a session needs that it is an `engine/observer.Observer` too."""

    not_repeated: dict[str, None]
    """What ran and cannot be told by the decisions: a replay does not repeat it."""

    def begin_model_call(self, number: int, window: Hashable) -> None:
        """A model call begins, while these windows of the schedules hold."""
