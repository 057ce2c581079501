"""What the store would choose, without running (`explain`); in a run `Tuner.plan` reads the store."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...config.names import AUTOTUNE
from ...engine.router import Decision
from ...measure.call_key import key_of
from ...measure.environment import environment_of
from ...values.request import AttentionRequest
from .candidates import may_win
from .store import Store

if TYPE_CHECKING:
    from ...engine.router import Router


def with_store(
    decision: Decision, request: AttentionRequest, role: str, category: str, accuracy: str, router: Router, store: Store
) -> Decision:
    """The decision for the stored winner if it can run, else `decision`, which is `auto`'s."""
    if decision.asked != AUTOTUNE or router.platform.described:
        return decision
    for name in (role, category):
        key = key_of(name, request)
        allowed = decision.accuracy or accuracy
        entry = store.get(key, environment_of(router.platform), allowed)
        if entry is None or not (entry.winner == decision.backend or may_win(router, entry.winner, allowed)):
            continue
        if not router.reasons_against(entry.winner, request):
            rejected = decision.rejected if entry.winner == decision.backend else ()
            source = f"{decision.source}: {AUTOTUNE} ({entry.summary()})"
            return replace(decision, backend=entry.winner, source=source, rejected=rejected, notes=())
    return decision
