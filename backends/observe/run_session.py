"""The session of a host's run on one device: watched, and with autotune where a configuration asks for it.

A host adds what it keeps for each kind of call; ComfyUI's is in `nodes/hook/run.py`, that of Diffusers in
`integrations/diffusers/runs.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import AttentionConfig
from ..config.layers import asks_for_autotune
from ..engine.router import Router
from ..engine.session import Session
from ..report import RunReport
from . import observe
from .autotune.store import shared_store
from .autotune.tuner import Tuner
from .guard import Guard

if TYPE_CHECKING:
    import torch


class RunSession(Session):
    """A session with replay, guard, recorder and tuner."""

    def __init__(
        self,
        router: Router,
        layers: tuple[AttentionConfig, ...],
        run_report: RunReport,
        device: torch.device,
        new_tuner: Callable[[Session], Tuner | None],
    ) -> None:
        """`new_tuner`: makes the tuner of this session, such as `tuner_of`, or None."""
        super().__init__(router, layers, run_report, device=device)
        observe(self)
        self.guard = self.registered(Guard)
        self.tuner = new_tuner(self)
        if self.tuner is not None:
            self.register(self.tuner)


def tuner_of(session: Session, store_path: Callable[[], Path]) -> Tuner | None:
    """Autotune with the store in the file that `store_path` returns; None where no configuration asks for it."""
    if not asks_for_autotune(session.layers):
        return None
    return Tuner(session, shared_store(store_path()))
