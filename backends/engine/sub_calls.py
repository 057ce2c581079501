"""Plans and runs a masked call as the sub-calls of its mask plan, or as one varlen call where the backend has one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..kernels.backend import for_scale
from ..kernels.support import varlen
from ..report import Row
from ..values.grid import TokenGrid
from ..values.limits import Batch
from ..values.mask_plan import PASSED_ON, MaskPlan, SubCall, call_of, write_part
from ..values.reasons import Reason
from ..values.request import AttentionCall, AttentionRequest, Host, hosted
from .plan import Slot, SplitPlan

if TYPE_CHECKING:
    import torch

    from ..kernels.backend import Limits
    from .session import Session

Calls = list[AttentionCall | None]


def calls_of(
    session: Session, mask_plan: MaskPlan, call: AttentionCall, asked: str | None, grid: TokenGrid | None = None
) -> Calls:
    """The sub-calls that replace a masked call; empty: the call runs whole.

    Args:
        asked: the backend that a person named.
        grid: of the whole call.
    """
    # Causal with a mask, or a mask that does not fit, is an error of the call: its kernel raises it, whatever the mask
    # hides.
    if mask_plan.strategy == "none" or call.is_causal or not fits(call):
        return []
    calls = [] if mask_plan.strategy == PASSED_ON else mask_plan.calls(call)
    if asked is None:
        return calls
    reasons_against = partial(session.router.reasons_against, asked)

    def takes(some: Calls) -> bool:
        parts = zip(mask_plan.sub_calls, some, strict=True) if some else ()
        return all(
            call is None or not reasons_against(call.request(grid=grid_of_part(grid, part))) for part, call in parts
        )

    if not reasons_against(call.request(grid=grid)):
        return calls if takes(calls) else []  # it takes the mask, but not e.g. is_causal
    if mask_plan.only_hides and not (calls and takes(calls)):
        booleans = mask_plan.booleans.calls(call)
        return booleans if takes(booleans) else calls
    return calls


def grid_of_part(grid: TokenGrid | None, part: SubCall) -> TokenGrid | None:
    """The grid of a sub-call, with the tokens before it that are hidden; `queries_only` where keys on it may be."""
    if grid is None or not grid.cells or part.keys is None:
        return grid if part.keys is not None else None
    if isinstance(part.keys, slice):
        start = part.keys.start or 0
        if not start:  # a length that ends within the grid is refused with its numbers
            return grid
        runs: tuple[tuple[int, int], ...] = ((start, grid.tokens if part.keys.stop is None else part.keys.stop),)
    else:
        runs = part.runs or ()
    first, end = grid.before, grid.before + grid.cells
    if not any(start <= first and end <= stop for start, stop in runs):
        return grid._replace(queries_only=True)
    visible = sum(max(min(stop, first) - start, 0) for start, stop in runs)
    return grid._replace(hidden_before=grid.before - visible)


def fits(call: AttentionCall) -> bool:
    """Whether the mask can be broadcast to (batch, num_heads, q_len, kv_len).

    Sub-calls of one that cannot would silently leave out samples and queries.
    """
    mask = call.attn_mask
    scores = (*call.query.shape[:3], call.key.shape[2])
    return mask is None or all(size in (1, wanted) for size, wanted in zip(mask.shape, scores, strict=True))


def plan_sub_calls(
    session: Session,
    mask_plan: MaskPlan,
    call: AttentionCall,
    calls: Calls,
    planned: Callable[[AttentionCall, str, TokenGrid | None], Slot],
    grid: TokenGrid | None = None,
) -> Slot:
    """Plan the sub-calls of a mask.

    Args:
        call: the whole call, with its mask.
        calls: what `calls_of` returned for it, not empty.
        planned: plans one sub-call, with its grid; the text is `CallKind.mask`.
        grid: of the whole call.
    """
    as_booleans = mask_plan.only_hides and any(
        part is not None and part.attn_mask is not None and not part.attn_mask.dtype.is_floating_point for part in calls
    )
    mask_plan = mask_plan.booleans if as_booleans else mask_plan
    mask_text = f"{call.request().mask}, {mask_plan.strategy}"
    slots = tuple(
        None if made is None else planned(made, mask_text, grid_of_part(grid, part))
        for part, made in zip(mask_plan.sub_calls, calls, strict=True)
    )
    whole = _varlen(session, mask_plan, call, [slot for slot in slots if slot is not None])
    return Slot(SplitPlan(slots, whole, _copied(mask_plan, calls, whole is not None), as_booleans))


def _copied(mask_plan: MaskPlan, calls: Calls, packed: bool) -> int:
    """`SplitPlan.copied` of these calls, in bytes."""
    made = [(part, call) for part, call in zip(mask_plan.sub_calls, calls, strict=True) if call is not None]
    if packed:
        return sum(call.key.nbytes + call.value.nbytes for _, call in made)
    most = 0
    for part, call in made:
        copied = 0 if isinstance(part.keys, slice) else call.key.nbytes + call.value.nbytes
        if len(calls) > 1:
            copied += call.query.nbytes // call.query.shape[3] * call.value.shape[3]
        most = max(most, copied)
    return most


def _varlen(session: Session, mask_plan: MaskPlan, call: AttentionCall, slots: list[Slot]) -> Slot | None:
    """One varlen call for all sub-calls, reusing their common decision.

    None where decisions differ, the backend has no varlen kernel or refuses, or autotune times the sub-calls.
    """
    plans = [slot.plan for slot in slots]
    if not varlen.packs(mask_plan) or len(plans) < 2 or plans[0].is_trial:
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
    row, request = first.row, call.request(exact_only=first.request.exact_only)
    slot = Slot()
    slot.plan = session.plan_of(
        first.kind._replace(request=request, mask=f"{row.mask}, varlen"), first.decision, strict=first.strict,
        reason=row.reason, kernel=varlen.as_kernel(for_scale(kernel, request.scale)),
    )  # fmt: skip
    if session.divider is not None:  # the plan has its own kernel, which is not divided
        session.divider.keep_home(slot.plan.kind, first.decision.backend, Reason("cards.varlen"))
    return slot


def _refused(limits: Limits, requests: list[AttentionRequest]) -> bool:
    """Whether the varlen call exceeds the limits of varlen; each sequence's own request was accepted before."""
    whole = requests[0]._replace(
        batch=1,
        q_len=sum(each.batch * each.q_len for each in requests),
        kv_len=sum(each.batch * each.kv_len for each in requests),
    )
    sequences = sum(each.batch for each in requests)
    most = limits.get(Batch)
    return bool(limits.reasons(whole)) or (most is not None and sequences > most.max)


def run_sub_calls(
    session: Session, split: SplitPlan, mask_plan: MaskPlan, call: AttentionCall, host: Host | None = None,
    arguments: tuple[Any, ...] = (),
) -> torch.Tensor:  # fmt: skip
    """Run a call that `plan_sub_calls` planned; each sub-call can fall back alone.

    Args:
        mask_plan: of this call's mask, with the facts that were planned for.
        host, arguments: run the host's own function on one sub-call; see `Host`.

    Returns:
        (batch, num_heads, q_len, v_head_dim); rows that see no key are zeros.
    """
    if split.as_booleans:
        mask_plan = mask_plan.booleans
    if split.varlen is not None:
        owned, call.owned = call.owned, False  # if it fails, the sub-calls run from the same tensors
        output = session.attention_varlen(split.varlen, call, mask_plan)
        if output is not None:
            return output
        split.varlen, call.owned = None, owned  # no second try in this session
    last = max((at for at, slot in enumerate(split.slots) if slot is not None), default=0)
    whole = mask_plan.empty_output(call)
    rows: list[Row] = []
    progress, samples = session.progress, session.progress.samples
    for at, (part, slot) in enumerate(zip(mask_plan.sub_calls, split.slots, strict=True)):
        if slot is None:
            continue
        sub_call = call_of(part, call)  # made here, so that one copy of gathered keys exists at a time
        if call.owned and at == last:
            sub_call.owned = True
            call.query = call.key = call.value = None  # type: ignore[assignment]  # the sub-call has them
        if slot.plan.hosted:
            sub_call = hosted(sub_call, host, arguments)
        progress.samples = samples[part.samples]
        try:
            output = slot.plan.compute(sub_call)
        except Exception as error:
            output = session.recover(slot, sub_call, error, host, arguments)
        finally:
            progress.samples = samples
        whole = write_part(output, part, whole)
        if not any(slot.plan.row is row for row in rows):  # once per row: the model made one call
            rows.append(slot.plan.row)
            slot.plan.row.calls += 1
    if whole is None:
        raise ValueError(f"no sub-call of the plan {mask_plan.strategy!r} sees a key")
    return whole
