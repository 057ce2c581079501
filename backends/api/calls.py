"""Runs one call of `attention`: resolves its context, plans it once, runs its plan.

`context.py` has the configurations, `session.py` the plans, `in_group.py` calls of several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, overload

from ..config import AttentionConfig
from ..config.layers import cards_of
from ..config.text import parse_config
from ..engine.call_checks import Grid, check, check_meaning, only_tensors, token_grid_of
from ..engine.plan import CallKind
from ..values.masks import as_4d, for_kernels
from ..values.reasons import Reason
from ..values.request import AttentionCall, LseCall
from ..values.roles import category_of
from .context import current, new_thread, sessions_of_thread, thread_local
from .session import new_session

if TYPE_CHECKING:
    import torch


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: object = None,
    role: str = "self",
    layout: str = "BHSD",
    return_lse: Literal[False] = False,
    grid: Grid | None = None,
    tokens_before: int = 0,
    tokens_after: int = 0,
    group: object = None,
    parallel: str | None = None,
    replicated_before: int = 0,
    replicated_after: int = 0,
    sequence_order: str = "contiguous",
    cards: str | Sequence[str] | None = None,
) -> torch.Tensor: ...


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: object = None,
    role: str = "self",
    layout: str = "BHSD",
    return_lse: Literal[True],
    grid: Grid | None = None,
    tokens_before: int = 0,
    tokens_after: int = 0,
    group: object = None,
    parallel: str | None = None,
    replicated_before: int = 0,
    replicated_after: int = 0,
    sequence_order: str = "contiguous",
    cards: str | Sequence[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: object = None,
    role: str = "self",
    layout: str = "BHSD",
    return_lse: bool = False,
    grid: Grid | None = None,
    tokens_before: int = 0,
    tokens_after: int = 0,
    group: object = None,
    parallel: str | None = None,
    replicated_before: int = 0,
    replicated_after: int = 0,
    sequence_order: str = "contiguous",
    cards: str | Sequence[str] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention on the configured backend.

    Args:
        query: (batch, num_heads, q_len, head_dim), or with layout BSHD (batch, q_len, num_heads, head_dim).
        key, value: the same with num_kv_heads and kv_len; all on one device, in one dtype.
        attn_mask: (batch, num_heads, q_len, kv_len), any of them 1 to broadcast, or (q_len or 1, kv_len), or
            (kv_len,); boolean (True: visible), or numbers, integers too, that are added to the scores. Only `reference`
            accepts one with `is_causal`.
        scale: factor of the scores; None: head_dim ** -0.5.
        enable_gqa: several query heads share one key head.
        backend: for this call, above the blocks around it and below `force_backend`: a name, or a configuration in any
            form that `config.text.parse_config` reads.
        role: `self`, `cross`, `joint`, or a dotted name such as `ltx2.audio_to_video`; selects per-role entries.
        return_lse: return the log-sum-exp of each row too, from a backend that has it. The mask is passed unchanged.
        grid: (frames, height, width) of the tokens, for sparse backends; an image has one frame.
        tokens_before, tokens_after: other tokens, such as a prompt, before and after those of the grid.
        group: a torch.distributed ProcessGroup, or a DeviceMesh of one dimension: every rank makes this call with its
            own tokens, and gets their output. The whole sequence is that of the ranks in their order; a rank may have
            none. `attn_mask` has the rows of this rank's queries, or one row that is the same on all ranks, and the
            keys of all ranks, or one row and this rank's keys; `grid` and the tokens beside it are of the whole
            sequence. Without gradients.
        parallel: with `group`: `ulysses` exchanges heads for tokens, `ring` passes keys around, from a backend that
            gives the log-sum-exp; None or `auto`: `parallel/strategy.py` decides.
        replicated_before, replicated_after: with `group`: tokens at the start and the end of query and key that are the
            same on every rank, such as a prompt; they count once.
        sequence_order: with `group`: `contiguous`, or `balanced` for causal calls: rank r has the r-th and the r-th
            last of 2 * ranks chunks (`parallel/shards.py`: `balanced_order`).
        cards: CUDA devices of this process over which the heads of a call are divided where that is faster: `all`, or
            names such as `["cuda:0", "cuda:1"]`; that of the tensors takes part in any case. A setting like `strict`;
            not with `group`, gradients or `return_lse` (`docs/parallel.md`).

    Returns:
        A tensor like `query`, in the same layout, with the head size of `value`. With `return_lse` a pair: that, and
        the log-sum-exp of scaled and masked scores: natural logarithm, float32, (batch, num_heads, q_len) in either
        layout, -inf for a row without a visible key, without gradient. `engine/merge.py` merges such pairs.

    Raises:
        NoBackendError: strict and the named backend cannot run this call, or every backend failed.
        CheckError: the layout is unknown or the shapes do not fit together; with checks on, also dtypes, devices or the
            mask. In a group every rank raises it where one rank refuses the call, or ranks differ in it.
        GroupError: another rank of the group failed or ended; the group cannot be used again.

    A mask that only hides keys may be read and replaced by fewer keys: on the CPU at every call; on an accelerator,
    where reading synchronises, only for a named backend that refuses the mask and accepts the call without it. Else the
    mask is passed unchanged.

    `torch.compile` breaks the graph here: the configuration may differ when the graph runs. Heads are not divided over
    `cards` then, and the run report says so.
    """
    import torch

    if torch.compiler.is_compiling():
        outside_the_graph: Callable[..., torch.Tensor] = torch.compiler.disable(_outside_the_graph)  # type: ignore[no-untyped-call]
        return outside_the_graph(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, cards=cards,
            backend=backend, role=role, layout=layout, return_lse=return_lse, grid=grid, tokens_before=tokens_before,
            tokens_after=tokens_after, group=group, parallel=parallel, replicated_before=replicated_before,
            replicated_after=replicated_after, sequence_order=sequence_order,
        )  # fmt: skip
    if group is not None or parallel is not None:
        from .in_group import attention_in_group

        return attention_in_group(
            (query, key, value, attn_mask), group, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            backend=backend, role=role, layout=layout, return_lse=return_lse,
            grid=(grid, tokens_before, tokens_after),
            parallel=parallel, replicated=(replicated_before, replicated_after), sequence_order=sequence_order,
            cards=cards,
        )  # fmt: skip
    if cards is not None:
        backend = _over_cards(backend, cards if isinstance(cards, str) else tuple(cards))
    if backend is not None and not isinstance(backend, (str, AttentionConfig)):
        backend = parse_config(backend, "attention(backend)")  # hashable, unlike a mapping
    context = current()
    reporting = context.reporting
    own = getattr(thread_local, "own", None) or new_thread() if reporting is None else reporting.of_thread()
    try:
        session_key = (context.number, query.device, backend)
        mask_facts = None if attn_mask is None else (attn_mask.dtype, attn_mask.shape, attn_mask.stride())
        # Everything that can change a decision.
        sizes = (query.shape, key.shape, value.shape, query.dtype)
    except AttributeError:
        only_tensors(query, key, value, attn_mask)
        raise
    plan_key: tuple[object, ...] = (role, layout, sizes, mask_facts, is_causal, scale, enable_gqa)
    if return_lse:
        plan_key = (*plan_key, "lse")
    token_grid = None
    if grid is not None or tokens_before or tokens_after:
        token_grid = token_grid_of(grid, tokens_before, tokens_after)
        plan_key = (*plan_key, token_grid)
    session = own.sessions.get(session_key)
    if session is None:
        only_tensors(query)
        session = own.sessions[session_key] = new_session(context, query.device, backend, own)
    known = session.slots.get(plan_key)
    if known is None:
        check_meaning(query, key, value, attn_mask, layout)
    if layout == "BSHD":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if attn_mask is not None and attn_mask.ndim != 4:
        attn_mask = as_4d(attn_mask)
    call = (LseCall if return_lse else AttentionCall)(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    if session.check_calls:
        check(call)
    if attn_mask is not None:
        call.attn_mask = for_kernels(attn_mask, query.dtype)
    if known is None:
        check(call, only_shapes=True)
        known = session.keep(plan_key, CallKind(call.request(lse=return_lse, grid=token_grid), role, category_of(role)))
    slot, call.enable_gqa = known  # only set for grouped heads
    mask_plan = None
    try:
        if slot is None:
            slot, mask_plan = session.slot_by_mask(plan_key, call, role, token_grid)
        output = session.attention(slot, call, mask_plan)
    except Exception:
        # Strict, or every backend failed on these tensors: later calls start with a new session.
        own.sessions.pop(session_key, None)
        raise
    if layout == "BSHD":
        output = output.transpose(1, 2)
    if return_lse and isinstance(call, LseCall):
        return output, call.lse
    return output


def _outside_the_graph(
    *tensors: torch.Tensor | None, cards: str | Sequence[str] | None, backend: object, group: object, **arguments: Any
) -> Any:
    """`attention`, called by a compiled graph, without other cards; the run report says so where some are named."""
    if group is None:
        context = current()
        of_call = backend if cards is None else _over_cards(backend, cards if isinstance(cards, str) else tuple(cards))
        layers = context.layers
        if of_call is not None:
            layers = (parse_config(of_call, "attention(backend)"), *layers)
        if cards_of(layers):
            off = Reason("cards.off", reason=Reason("cards.compiled"))
            run_report = sessions_of_thread(context).run_report
            if off not in run_report.notes:
                run_report.note(off)
            cards = ()
    return attention(*tensors, cards=cards, backend=backend, group=group, **arguments)  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _with_cards(backend: str | AttentionConfig | None, cards: str | tuple[str, ...]) -> AttentionConfig:
    config = parse_config(backend, "attention(backend)") if backend is not None else AttentionConfig()
    return replace(config, cards=cards, source=config.source if backend is not None else "attention(cards)")  # type: ignore[arg-type]


def _over_cards(backend: object, cards: str | tuple[str, ...]) -> AttentionConfig:
    """The configuration of one call with `cards`."""
    if backend is not None and not isinstance(backend, (str, AttentionConfig)):
        backend = parse_config(backend, "attention(backend)")
    return _with_cards(backend, cards)
