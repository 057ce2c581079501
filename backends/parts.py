"""One call as the plan of its mask says: in parts, or as one call over packed tokens where the backend has that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from . import varlen
from .mask_plan import MaskPlan
from .request import AttentionCall, AttentionRequest
from .session import Plan, Session
from .trace import Row

if TYPE_CHECKING:
    import torch

    from .backend import Limits

Calls = list[AttentionCall | None]


class Parts:
    """How the calls with one kind of mask run; kept by who keeps plans."""

    __slots__ = ("packed", "plans")

    def __init__(self, plans: tuple[Plan | None, ...], packed: Plan | None) -> None:
        self.plans = plans
        """One for each part of the mask's plan, None for a part without keys."""
        self.packed = packed
        """All parts as one call; None where the backend has no kernel for that, or it failed."""


def calls_of(session: Session, mask_plan: MaskPlan, call: AttentionCall, asked: str | None) -> Calls:
    """The calls that stand for one with a mask; empty where that runs as it is.

    Args:
        asked: the backend that a person named.
    """
    if mask_plan.treatment in ("none", "passed on"):
        return []
    calls = mask_plan.calls(call)
    if asked is not None:
        refused = partial(session.router.refuse, asked)
        if not refused(call.request()) and any(part is not None and refused(part.request()) for part in calls):
            return []  # it takes the mask, and not what the mask was read as, such as a causal call
    return calls


def plan_parts(
    session: Session,
    mask_plan: MaskPlan,
    call: AttentionCall,
    calls: Calls,
    planned: Callable[[AttentionCall, str], Plan],
) -> Parts:
    """Plan the calls of a mask.

    Args:
        call: the whole call, with its mask.
        calls: what `calls_of` gave for it.
        planned: decides how one part runs; the text says for the account how the mask is honoured.
    """
    words = f"{call.request().mask}, {mask_plan.treatment}"
    plans = tuple(None if part is None else planned(part, words) for part in calls)
    return Parts(plans, _packed(session, mask_plan, call, [plan for plan in plans if plan is not None]))


def _packed(session: Session, mask_plan: MaskPlan, call: AttentionCall, plans: list[Plan]) -> Plan | None:
    """The plan of one call over packed tokens: only where every part has the same decision, on the same word."""
    if not varlen.packs(mask_plan) or len(plans) < 2:
        return None
    first, router = plans[0], session.router
    if any(plan.row is not first.row or plan.decision.options != first.decision.options for plan in plans):
        return None
    backend = router.backends[first.decision.backend]
    limits = backend.varlen_limits(router.platform)
    if limits is None or _refused(limits, [plan.request for plan in plans]):
        return None
    kernel = router.varlen(first.decision.backend, first.decision.options)
    if kernel is None:
        return None
    return session.plan_packed(first, call.request(exact_only=first.request.exact_only), varlen.as_kernel(kernel))


def _refused(limits: Limits, requests: list[AttentionRequest]) -> bool:
    """Whether all parts in one row are too much; each by itself was accepted."""

    whole = requests[0]._replace(
        batch=1,
        q_len=sum(one.batch * one.q_len for one in requests),
        kv_len=sum(one.batch * one.kv_len for one in requests),
    )
    sequences = sum(one.batch for one in requests)
    return bool(limits.reasons(whole)) or (limits.max_batch is not None and sequences > limits.max_batch)


def run_parts(
    session: Session,
    parts: Parts,
    mask_plan: MaskPlan,
    call: AttentionCall,
    host: Callable[[AttentionCall], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run a call whose kind was planned by `plan_parts`; each part can fall back by itself.

    Args:
        mask_plan: of this very call's mask; its facts are those that were planned for.
        host: runs what the calling program would have run on one part; BHSD in and out.
    """
    if parts.packed is not None:
        call.parts = mask_plan
        output = session.run_packed(parts.packed, call)
        if output is not None:
            return output
        parts.packed = None  # what failed once is not tried again in this session
    calls = mask_plan.calls(call)
    outputs: list[torch.Tensor | None] = []
    counted: list[Row] = []
    for part, plan in zip(calls, parts.plans, strict=True):
        if part is None or plan is None:
            outputs.append(None)
            continue
        if len(calls) > 1 and host is not None:  # what the host runs must then be the part alone
            part.host = partial(host, part)
        outputs.append(session.run(plan, part))
        if any(plan.row is row for row in counted):
            plan.row.calls -= 1  # the model made one call, however many parts it has
        counted.append(plan.row)
    return mask_plan.joined(outputs, call)
