"""`attention` with `group`: one call of all ranks of a torch.distributed group (`parallel/`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import AttentionConfig
from ..config.layers import record_of
from ..config.text import parse_config
from ..engine.call_checks import CheckError, Grid, check, check_meaning, differing, token_grid_of
from ..engine.routers import router_for
from ..observe import observe
from ..parallel.group_call import AUTO, GroupOptions, Prepared, run
from ..parallel.group_session import GroupSession
from ..parallel.rank_group import rank_group
from ..values.masks import as_4d, for_kernels
from ..values.request import AttentionCall, LseCall
from ..values.roles import category_of
from .context import KEPT, current, sessions_of_thread

if TYPE_CHECKING:
    import torch


def attention_in_group(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    group: object,
    *,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: object,
    role: str,
    layout: str,
    return_lse: bool,
    grid: tuple[Grid | None, int, int],
    parallel: str | None,
    replicated: tuple[int, int],
    sequence_order: str,
    cards: object,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` with `group`. What can be wrong with a call is checked inside `run`, so that all ranks refuse it."""
    if group is None:
        raise CheckError(f"parallel {parallel!r} without group; give a torch.distributed ProcessGroup too")

    def prepare() -> Prepared:
        import torch

        query, key, value, mask = tensors
        check_meaning(query, key, value, mask, layout)
        if cards is not None:
            raise CheckError("cards and group exclude one another; in a group each process computes on its own device")
        frames, before, after = grid
        token_grid = None if frames is None and not before and not after else token_grid_of(frames, before, after)
        options = GroupOptions(
            AUTO if parallel is None else parallel, *replicated, sequence_order, role, category_of(role), token_grid
        )
        options.check()
        if layout == "BSHD":
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        mask = None if mask is None else for_kernels(as_4d(mask), query.dtype)
        call = (LseCall if return_lse else AttentionCall)(query, key, value, mask, is_causal, scale, enable_gqa)
        check(call, only_shapes=True, any_kv_len=True)
        if text := differing(query, key, value, mask):
            raise CheckError(text)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            raise CheckError("gradients are not computed in a group; call it under torch.no_grad()")
        return Prepared(_group_session(backend, query.device), call, options)

    output, lse = run(rank_group(group), prepare)
    if layout == "BSHD":
        output = output.transpose(1, 2)
    return (output, lse) if lse is not None else output


def _group_session(backend: object, device: torch.device) -> GroupSession:
    if backend is not None and not isinstance(backend, (str, AttentionConfig)):
        backend = parse_config(backend, "attention(backend)")
    context = current()
    own = sessions_of_thread(context)
    key = (context.number, device, backend)
    session = own.in_groups.get(key)
    if session is None:
        layers = context.layers
        if backend is not None and not context.forced:
            layers = (parse_config(backend, "attention(backend)"), *layers)
        if record_of(layers) is not None:
            raise CheckError("a record is not repeated in a group; leave group or the record out")
        if len(own.in_groups) >= KEPT:
            own.in_groups.clear()
        own.run_report.device = device.type
        session = GroupSession(router_for(device), layers, own.run_report, checks=False, device=device)
        own.in_groups[key] = observe(session)
    return session
