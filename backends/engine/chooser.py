"""What a session asks where `autotune` is asked for; `observe/autotune/tuner.py` has the one there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from ..values.request import AttentionRequest
    from .plan import Plan
    from .router import Decision


class Chooser(Protocol):
    """Decides by measurements. Its calls come from the thread of its session."""

    def plan(
        self, request: AttentionRequest, decision: Decision, role: str, category: str, block: str, mask: str
    ) -> Plan | None:
        """The plan of a new kind of call, to which `decision` is the answer without it; None where it has none."""

    def is_trying(self, plan: Plan) -> bool:
        """Whether calls of this plan are being measured."""

    def failed(self, plan: Plan, error: Exception) -> None:
        """The kernel of a plan raised this error."""

    def model_call(self, sigmas: torch.Tensor | None) -> None:
        """A model call begins, at these sigmas."""

    def close(self) -> None:
        """The run is over."""
