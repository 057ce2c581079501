"""One call as the plan of its mask says: in parts, or as one call over packed tokens where the backend has that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ..kernels.support import varlen
from ..report import Row
from ..values.limits import Batch
from ..values.mask_plan import PASSED_ON, MaskPlan, call_of, put
from ..values.request import AttentionCall, AttentionRequest
from .plan import Plan
from .session import Session

if TYPE_CHECKING:
    import torch

    from ..kernels.backend import Limits

Calls = list[AttentionCall | None]


class SplitPlan:
    """How the calls with one kind of mask run; kept by who keeps plans."""

    __slots__ = ("as_booleans", "copied", "packed", "plans")

    def __init__(
        self, plans: tuple[Plan | None, ...], packed: Plan | None, copied: int = 0, as_booleans: bool = False
    ) -> None:
        self.plans = plans
        """One for each part of the mask's plan, None for a part without keys."""
        self.copied = copied
        """Bytes that are copied at once at most: gathered or packed keys and values, a part's output."""
        self.as_booleans = as_booleans
        """The mask is numbers, and its kernel takes booleans alone: `MaskPlan.booleans` runs."""
        self.packed = packed
        """All parts as one call; None where the backend has no kernel for that, or it failed."""


def calls_of(session: Session, mask_plan: MaskPlan, call: AttentionCall, asked: str | None) -> Calls:
    """The calls that stand for one with a mask; empty where that runs as it is.

    Args:
        asked: the backend that a person named.
    """
    # Neither error may depend on what a mask hides: a call that is causal too goes to its kernel whole, as does one
    # whose mask does not fit.
    if mask_plan.treatment == "none" or call.is_causal or not fits(call):
        return []
    calls = [] if mask_plan.treatment == PASSED_ON else mask_plan.calls(call)
    if asked is None:
        return calls
    refused = partial(session.router.refuse, asked)

    def takes(some: Calls) -> bool:
        return all(part is None or not refused(part.request()) for part in some)

    if not refused(call.request()):
        return calls if takes(calls) else []  # it takes the mask, and not what that was read as, such as causal
    if mask_plan.only_hides and not (calls and takes(calls)):
        booleans = mask_plan.booleans.calls(call)
        return booleans if takes(booleans) else calls
    return calls


def fits(call: AttentionCall) -> bool:
    """Whether the mask can be broadcast to the scores. Where not the kernel refuses it; parts would hide that.

    They would leave samples and queries out that the mask does not have.
    """
    mask = call.attn_mask
    scores = (*call.query.shape[:3], call.key.shape[2])
    return mask is None or all(size in (1, wanted) for size, wanted in zip(mask.shape, scores, strict=True))


def plan_sub_calls(
    session: Session,
    mask_plan: MaskPlan,
    call: AttentionCall,
    calls: Calls,
    planned: Callable[[AttentionCall, str], Plan],
) -> SplitPlan:
    """Plan the calls of a mask.

    Args:
        call: the whole call, with its mask.
        calls: what `calls_of` gave for it.
        planned: decides how one part runs; the text says for the account how the mask is honoured.
    """
    as_booleans = mask_plan.only_hides and any(
        part is not None and part.attn_mask is not None and not part.attn_mask.dtype.is_floating_point for part in calls
    )
    mask_plan = mask_plan.booleans if as_booleans else mask_plan
    words = f"{call.request().mask}, {mask_plan.treatment}"
    plans = tuple(None if part is None else planned(part, words) for part in calls)
    packed = _packed(session, mask_plan, call, [plan for plan in plans if plan is not None])
    return SplitPlan(plans, packed, _copied(mask_plan, calls, packed is not None), as_booleans)


def _copied(mask_plan: MaskPlan, calls: Calls, packed: bool) -> int:
    """`SplitPlan.copied` of these calls."""
    made = [(part, call) for part, call in zip(mask_plan.parts, calls, strict=True) if call is not None]
    if packed:
        return sum(call.key.nbytes + call.value.nbytes for _, call in made)
    most = 0
    for part, call in made:
        copied = 0 if isinstance(part.keys, slice) else call.key.nbytes + call.value.nbytes
        if len(calls) > 1:
            copied += call.query.nbytes // call.query.shape[3] * call.value.shape[3]
        most = max(most, copied)
    return most


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
    return session.plan_varlen(first, call.request(exact_only=first.request.exact_only), varlen.as_kernel(kernel))


def _refused(limits: Limits, requests: list[AttentionRequest]) -> bool:
    """Whether all parts in one row are too much; each by itself was accepted."""

    whole = requests[0]._replace(
        batch=1,
        q_len=sum(one.batch * one.q_len for one in requests),
        kv_len=sum(one.batch * one.kv_len for one in requests),
    )
    sequences = sum(one.batch for one in requests)
    most = limits.get(Batch)
    return bool(limits.reasons(whole)) or (most is not None and sequences > most.max)


def run_sub_calls(
    session: Session,
    parts: SplitPlan,
    mask_plan: MaskPlan,
    call: AttentionCall,
    host: Callable[[AttentionCall], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run a call whose kind was planned by `plan_sub_calls`; each part can fall back by itself.

    Args:
        mask_plan: of this very call's mask; its facts are those that were planned for.
        host: runs what the calling program would have run on one part; BHSD in and out.
    """
    if parts.as_booleans:
        mask_plan = mask_plan.booleans
    if parts.packed is not None:
        call.parts = mask_plan
        owned, call.owned = call.owned, False  # where it fails, its parts run from the same tensors
        output = session.run_varlen(parts.packed, call)
        if output is not None:
            return output
        parts.packed, call.owned = None, owned  # what failed once is not tried again in this session
    last = max((at for at, plan in enumerate(parts.plans) if plan is not None), default=0)
    whole = mask_plan.canvas(call)
    counted: list[Row] = []
    for at, (part, plan) in enumerate(zip(mask_plan.parts, parts.plans, strict=True)):
        if plan is None:
            continue
        one = call_of(part, call)  # made when its turn comes: of gathered keys there is one copy at a time
        if call.owned and at == last:
            one.owned = True
            call.query = call.key = call.value = None  # type: ignore[assignment]  # the part has what it needs
        if host is not None and (len(parts.plans) > 1 or one.owned):  # what the host runs must then be the part alone
            one.host = host
        output = session.run(plan, one)
        whole = put(output, part, whole)
        if any(plan.row is row for row in counted):
            plan.row.calls -= 1  # the model made one call, however many parts it has
        counted.append(plan.row)
    if whole is None:
        raise ValueError(f"no part of the plan {mask_plan.treatment!r} sees a key")
    return whole
