"""The candidates of autotune for a kind of call: backends that `auto` may pick, each kernel once; and what the store
would choose of them without a run (`explain`).
"""

from __future__ import annotations

from dataclasses import replace

from ...config.names import AUTOTUNE
from ...engine.router import Decision, Failures, Router
from ...kernels.support.workspace import lacking_memory
from ...measure.call_key import key_of
from ...measure.environment import environment_of
from ...values.request import AttentionRequest
from ...values.tolerance import ACCURACY
from .store import Store

MOST_SCORE_BYTES = 2**30
"""On an accelerator, kernels that materialise all scores are no candidates beyond this size: too slow, and they may
evict models from the card."""


def candidates(
    router: Router, request: AttentionRequest, incumbent: str, accuracy: str, failed: Failures
) -> tuple[str, ...]:
    """The incumbent, then the other backends that may run this call, each kernel once."""
    names = [incumbent]
    members = {_member(router, incumbent, request)}
    for name, backend in router.backends.items():
        if name == incumbent or not may_win(router, name, accuracy) or router.reasons_against(name, request, failed):
            continue
        if backend.avoid_reasons(request, router.platform) or _is_too_large(router, name, request):
            continue
        member = _member(router, name, request)
        if member not in members:
            members.add(member)
            names.append(name)
    return tuple(names)


def may_win(router: Router, name: str, accuracy: str) -> bool:
    """Whether autotune may choose this backend where `accuracy` is allowed."""
    backend = router.backends.get(name)
    if backend is None or not backend.candidate:
        return False
    return ACCURACY.index(backend.accuracy) <= ACCURACY.index(accuracy)


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


def _member(router: Router, name: str, request: AttentionRequest) -> str:
    member = router.backends[name].kernel_name(request, router.platform)
    return member if member is not None and member in router.backends else name


def _is_too_large(router: Router, name: str, request: AttentionRequest) -> bool:
    backend, platform = router.backends[name], router.platform
    if not backend.holds_scores:
        return False
    if platform.kind == "cpu":
        return lacking_memory(backend, request, platform) is not None
    return backend.workspace_bytes(request, platform) > MOST_SCORE_BYTES
