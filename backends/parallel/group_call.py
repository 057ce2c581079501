"""Runs one call of `attention` on all ranks of a group.

1. Every rank sends a few numbers: lengths, the shape of its mask, a digest of what must be equal, and whether it
   refuses the call. All ranks then know the same, and take the same way; a call that one refuses, all refuse.
2. Ulysses or ring (`strategy.py` for `auto`); masks move; how this rank honours its mask is a part of the key.
3. The first call of each key plans: `agreement.py`. Its kernels run, and the ranks exchange what failed; then the next
   backend is agreed on. So do later calls whose output a guard may refuse.
4. What fails later, and what no other backend may try, stops the group (`RankGroup.fail`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import frozen
from ..engine.call_checks import CheckError
from ..engine.observer import KernelVetoed
from ..engine.plan import CallKind
from ..values.errors import NoBackendError
from ..values.faults import is_cuda_fault, is_out_of_memory
from ..values.grid import TokenGrid
from ..values.reasons import Reason, error_text
from ..values.request import AttentionCall, AttentionRequest, LseCall
from .agreement import Agreed, combined, failure_of, named, proposal
from .facts import NO_MASK, Header, MaskForm, differing_facts, digest, header, mask_form
from .group_session import KEPT, GroupSession, LocalCall
from .link import measured
from .rank_group import AgreedError, RankGroup
from .ring import Ring
from .shards import CONTIGUOUS, ORDERS, Shards
from .strategy import predicted
from .ulysses import Ulysses

if TYPE_CHECKING:
    import torch

    from ..report import Row

log = logging.getLogger("attention_backends")

ULYSSES, RING, AUTO = "ulysses", "ring", "auto"
STRATEGIES = (AUTO, ULYSSES, RING)


class GroupOptions(NamedTuple):
    """How the tokens of a call are on the ranks, and where in a model it is made."""

    parallel: str = AUTO
    before: int = 0
    """Replicated tokens at the start of each rank's query and key."""
    after: int = 0
    order: str = CONTIGUOUS
    role: str = "self"
    category: str = "self"
    grid: TokenGrid | None = None
    """Of the whole sequence."""

    def check(self) -> None:
        """Refuse unknown values.

        Raises:
            CheckError: has the value and what is known.
        """
        if self.parallel not in STRATEGIES:
            raise CheckError(f"parallel {self.parallel!r} is not one of {', '.join(STRATEGIES)}")
        if self.order not in ORDERS:
            raise CheckError(f"sequence_order {self.order!r} is not one of {', '.join(ORDERS)}")
        for name, count in (("replicated_before", self.before), ("replicated_after", self.after)):
            if type(count) is not int or count < 0:
                raise CheckError(f"{name} {count!r} is not a whole number from 0")


@dataclass
class GroupCall:
    """One call on this rank, after all ranks have exchanged their headers."""

    ranks: RankGroup
    session: GroupSession
    call: AttentionCall
    options: GroupOptions
    headers: list[Header]
    queries: Shards
    keys: Shards
    form: MaskForm | None
    key: tuple[object, ...]

    @property
    def lse(self) -> bool:
        return isinstance(self.call, LseCall)

    def kind(self, request: AttentionRequest) -> CallKind:
        return CallKind(request, self.options.role, self.options.category)


class Prepared(NamedTuple):
    """A call on this rank."""

    session: GroupSession
    """For the configuration of the call."""
    call: AttentionCall
    """This rank's tokens, BHSD; an `LseCall` where the log-sum-exp is wanted."""
    options: GroupOptions


def run(ranks: RankGroup, prepare: Callable[[], Prepared]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run one call; collective.

    Args:
        prepare: may raise where the call is invalid.

    Returns:
        The output of this rank's queries, (batch, num_heads, q_len, v_head_dim); their log-sum-exp for an `LseCall`.

    Raises:
        CheckError: some rank refuses the call, or ranks differ in what must be equal. On every rank; the group goes on.
        NoBackendError: no backend runs it on all ranks. On every rank; the group goes on.
        GroupError: another rank failed.
    """
    with ranks.call():
        of = _exchanged(ranks, prepare)
        strategy = _strategy(of)
        of.session.run_report.note(Reason("parallel.ran", strategy=strategy, ranks=ranks.size))
        return (_ring if strategy == RING else _ulysses)(of)


def _exchanged(ranks: RankGroup, prepare: Callable[[], Prepared]) -> GroupCall:
    """Exchange the headers.

    Raises:
        AgreedError: some rank refuses the call.
    """
    mine, prepared, refusal = Header(ranks.calls, 0, 0, 0, NO_MASK, refused=True), None, None
    try:
        prepared = prepare()
        mine = _header(ranks, prepared)
    except Exception as error:
        if _is_final(error):
            raise
        refusal = error
    headers = [header(row) for row in ranks.numbers(mine.numbers())]
    if any(one.call != ranks.calls for one in headers):
        raise RuntimeError(f"ranks are at different calls: {[one.call for one in headers]}")
    if any(one.refused for one in headers) or prepared is None:
        named_error = refusal is None or isinstance(refusal, CheckError)
        texts = ranks.texts("" if refusal is None else str(refusal) if named_error else error_text(refusal))
        text = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
        raise AgreedError(CheckError(text)) from refusal
    if any(one.digest != mine.digest for one in headers):
        differing = differing_facts(ranks.objects(_facts(prepared)))
        raise AgreedError(CheckError(f"the ranks of the group make different calls; {differing}"))
    session, call, options = prepared
    if any(one.is_new for one in headers):  # a run's failures and refusals count in that run only
        ranks.agreed.clear()
        session.is_new = False
    try:
        before, after, order = options.before, options.after, options.order
        queries = Shards(tuple(one.q_len for one in headers), before, after, order)
        keys = Shards(tuple(one.kv_len for one in headers), before, after, order)
        _check_whole(queries, keys, options.grid)
        form = mask_form(headers, keys, call.query.shape[0], call.query.shape[1])
    except ValueError as error:  # the same on every rank
        raise AgreedError(error if isinstance(error, CheckError) else CheckError(str(error))) from error
    key = (mine.digest, tuple(one.q_len for one in headers), tuple(one.kv_len for one in headers), form)
    return GroupCall(ranks, session, call, options, headers, queries, keys, form, key)


def _check_whole(queries: Shards, keys: Shards, grid: TokenGrid | None) -> None:
    if not keys.total:
        raise CheckError("kv_len 0 on all ranks: there is no key to attend to; leave this call out")
    if grid is not None and grid.tokens != queries.total:
        raise CheckError(
            f"grid {grid.describe()} has {grid.tokens} tokens, and the ranks together have {queries.total}; in a group "
            "it is the grid of the whole sequence"
        )


def _facts(prepared: Prepared) -> dict[str, object]:
    """What must be equal on all ranks, as plain data."""
    session, call, options = prepared
    query, key, value, mask = call.query, call.key, call.value, call.attn_mask
    choice, settings = session.choice(options.role, options.category), session.settings
    return {
        "parallel": options.parallel, "replicated_before": options.before, "replicated_after": options.after,
        "sequence_order": options.order, "role": options.role,
        "grid": None if options.grid is None else options.grid.describe(),
        "batch": query.shape[0], "num_heads": query.shape[1], "num_kv_heads": key.shape[1],
        "head_dim": query.shape[3], "v_head_dim": value.shape[3], "dtype": str(query.dtype).removeprefix("torch."),
        "device": query.device.type, "attn_mask": None if mask is None else str(mask.dtype).removeprefix("torch."),
        "is_causal": call.is_causal, "scale": call.scale, "return_lse": isinstance(call, LseCall),
        "backend": choice.asked, "options": list(map(list, frozen(choice.extra))),
        "accuracy": choice.accuracy or settings.accuracy, "strict": settings.strict, "guard": settings.guard,
    }  # fmt: skip


def _header(ranks: RankGroup, prepared: Prepared) -> Header:
    session, call, options = prepared
    query, key, value, mask = call.query, call.key, call.value, call.attn_mask
    known = (
        options, query.shape, key.shape, value.shape, query.dtype, query.device, call.is_causal, call.scale,
        type(call), None if mask is None else mask.dtype,
    )  # fmt: skip
    number = session.digests.get(known)
    if number is None:
        if len(session.digests) >= KEPT:
            session.digests.clear()
        number = session.digests[known] = digest(_facts(prepared))
    shape: Any = NO_MASK if mask is None else tuple(mask.shape)
    return Header(
        ranks.calls, number, query.shape[2], key.shape[2], shape,
        no_ring=_no_ring(session, options), is_new=session.is_new,
    )  # fmt: skip


def _no_ring(session: GroupSession, options: GroupOptions) -> bool:
    """Whether a backend was asked for that gives no log-sum-exp."""
    asked = named(session.choice(options.role, options.category))
    backend = None if asked is None else session.router.backends.get(asked)
    return backend is not None and backend.lse_limits(session.router.platform) is None


def _strategy(of: GroupCall) -> str:
    """The strategy that was asked for; for `auto` the same one on every rank."""
    if of.options.parallel != AUTO:
        return of.options.parallel
    if of.ranks.size == 1 or any(one.no_ring for one in of.headers) or (of.call.is_causal and of.form is not None):
        return ULYSSES
    if of.ranks.link is None:
        of.ranks.link = measured(of.ranks, of.call.query)
    call = of.call
    whole = call.request()._replace(q_len=of.queries.total, kv_len=of.keys.total)
    times = predicted(whole, of.queries, of.keys, call.query.element_size(), of.ranks.link)
    return RING if times.ring < times.ulysses else ULYSSES


Result = tuple["torch.Tensor", "torch.Tensor | None"]
"""Output and log-sum-exp of a rank's part."""


def _ulysses(of: GroupCall) -> Result:
    session, options = of.session, of.options
    exchanged = Ulysses(of.ranks, of.call, of.queries, of.keys, of.form, lse=of.lse)
    local: LocalCall | None = None
    if exchanged.call is not None:
        local = session.local(exchanged.call, options.role, options.category, options.grid, lse=of.lse)
    key: tuple[object, ...] = (ULYSSES, *of.key)
    if of.form is not None:  # what a mask hides may differ between heads, and calls with equal shapes
        read = None if local is None or local.mask_plan is None else (local.mask_plan.facts, len(local.calls))
        key = (*key, *(row[0] for row in of.ranks.numbers([digest({"mask": repr(read)})])))

    def compute(agreed: Agreed) -> Result:
        if local is None:
            return exchanged.empty(), None
        call = local.call
        slot = session.slot_of_local(key, agreed, local, of.kind(local.requests[0]))
        output = session.attention(slot, call, local.mask_plan if local.calls else None)
        return output, call.lse if isinstance(call, LseCall) else None

    return exchanged.finish(*_agreed(of, key, [] if local is None else local.requests, compute))


def _ring(of: GroupCall) -> Result:
    if of.call.is_causal and of.form is not None:
        raise AgreedError(CheckError("parallel 'ring' takes no mask together with is_causal; put one into the other"))
    ring = Ring(of.ranks, of.call, of.queries, of.keys, of.form)
    key = (RING, *of.key)

    def compute(agreed: Agreed) -> Result:
        failed: list[Exception] = []
        rows: list[Row] = []
        stops = agreed.confirmed and not of.session.may_refuse(agreed)

        def attend(call: LseCall, request: AttentionRequest) -> torch.Tensor | None:
            if failed:
                return None
            slot = of.session.slot(key, agreed, of.kind(request))
            try:
                output = slot.plan.compute(call)
            except Exception as error:
                if stops or _is_final(error):
                    raise
                failed.append(error)  # the keys go round before the ranks exchange what failed
                return None
            if not any(slot.plan.row is row for row in rows):
                rows.append(slot.plan.row)
            return output

        output, lse = ring.run(attend)
        if failed:
            raise failed[0]
        for row in rows:  # the program made one call
            row.calls += 1
        return output, lse

    output, lse = _agreed(of, key, ring.requests, compute)
    return output, lse if of.lse else None


def _is_final(error: Exception) -> bool:
    """Whether no other backend may be tried."""
    return is_out_of_memory(error) or is_cuda_fault(error)


def _agreed(
    of: GroupCall, key: tuple[object, ...], requests: Sequence[AttentionRequest], compute: Callable[[Agreed], Result]
) -> Result:
    """Compute this rank's part with the backend that all ranks agree on; collective while that is not confirmed."""
    ranks, session = of.ranks, of.session
    agreed: Agreed = ranks.agreed.get(key) or _agree(of, key, requests)
    while True:
        asks = not agreed.confirmed or session.may_refuse(agreed)
        calls = [(row, row.calls) for row in session.run_report.rows.values()] if asks else []
        result, failed = None, None
        try:
            result = compute(agreed)
        except Exception as error:
            if not asks or _is_final(error):
                raise
            failed = error
        if asks:
            veto = isinstance(failed, KernelVetoed)
            text = "" if failed is None else str(failed) if veto else f"{type(failed).__name__}: {failed}"
            failure = failure_of(ranks.objects({"error": text, "veto": veto}))
            if failure is not None:
                for row in session.run_report.rows.values():  # this rank's part may have run
                    row.calls = next((count for of_row, count in calls if of_row is row), 0)
                agreed = _replaced(of, key, agreed, requests, *failure)
                continue
            agreed.confirmed = True
        assert result is not None  # noqa: S101  # no rank failed
        return result


def _agree(
    of: GroupCall, key: tuple[object, ...], requests: Sequence[AttentionRequest], exact_because: str | None = None
) -> Agreed:
    """Collective: exchange proposals and decide.

    Raises:
        AgreedError: no backend runs the call on all ranks.
    """
    ranks, session, options = of.ranks, of.session, of.options
    choice = session.choice(options.role, options.category)
    kind = of.kind(requests[0] if requests else of.call.request())
    try:
        agreed = combined(ranks.objects(proposal(session, requests, choice, kind, exact_because)), exact_because)
    except NoBackendError as error:
        raise AgreedError(error) from error
    if len(ranks.agreed) >= KEPT:
        ranks.agreed.clear()
    ranks.agreed[key] = agreed
    return agreed


def _replaced(
    of: GroupCall, key: tuple[object, ...], agreed: Agreed, requests: Sequence[AttentionRequest], text: str, veto: bool
) -> Agreed:
    """Collective: another backend after one failed on some rank, or after a guard refused its output there."""
    session, backend = of.session, agreed.backend
    choice = session.choice(of.options.role, of.options.category)
    options = choice.extra if backend == choice.asked else {}
    for request in requests:
        session.failed[backend, frozen(options), request] = text
    made = _agree(of, key, requests, text if veto else agreed.exact_because)
    reason = Reason("parallel.replaced", backend=backend, reason=text, other=made.backend)
    log.warning("%s", reason)
    session.run_report.note(reason)
    return made
