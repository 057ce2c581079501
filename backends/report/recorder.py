"""What a run tells of its decisions, so that they can be repeated; `observe/replay/run_recorder.py` keeps them."""

from __future__ import annotations

from typing import Any, Protocol


class Recorder(Protocol):
    """Is told of each plan (`engine/plan.py`) when it is made and when it changes, and by which router it was."""

    not_repeated: dict[str, None]
    """What ran and cannot be told by the decisions: a replay does not repeat it."""

    def begin_model_call(self, number: int, window: int) -> None:
        """A model call begins, while these windows of the schedules hold."""

    def planned(self, plan: Any, category: str, router: Any) -> None:
        """A new kind of call was decided."""

    def changed(self, plan: Any, router: Any) -> None:
        """A plan runs something else from this model call on."""
