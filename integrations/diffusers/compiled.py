"""Attention calls of models under torch.compile: in the graph each is one opaque op, and all else happens inside it.

As in ComfyUI (`docs/adr/0004-compiled-models.md`): the op gets the call's tensors and the handle of the attention
module, a tensor that holds a number, so that all blocks share one graph. When the op runs it looks up the module and
the forward of this thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...backends.engine.opaque import Handles, define

if TYPE_CHECKING:
    from .stand_ins import AttentionModule

attention_modules: Handles[AttentionModule] = Handles()


class Running:
    """The attention module whose forward is being traced: its handle, and how many calls it has made."""

    def __init__(self) -> None:
        self.module: tuple[torch.Tensor, list[int]] | None = None


running = Running()


def traced_forward(handle: torch.Tensor, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The forward of an attention module in a trace."""
    outer = running.module
    running.module = (handle, [0])
    try:
        return forward(*args, **kwargs)
    finally:
        running.module = outer


def traced(
    host: Callable[[], torch.Tensor], is_divided: bool, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool, bshd: bool,
) -> torch.Tensor:  # fmt: skip
    """One attention call in a trace; the op has no gradient, so calls that need one go to the host's function.

    `is_divided`: the processor gave its `parallel_config` (`enable_parallelism`).
    """
    if running.module is None:
        return host()
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return host()
    handle, calls = running.module
    ordinal = calls[0]
    calls[0] = ordinal + 1
    return _attention(query, key, value, mask, is_causal, scale, enable_gqa, bshd, handle, ordinal, is_divided)


def _run(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    is_causal: bool, scale: float | None, enable_gqa: bool, bshd: bool, handle: torch.Tensor, ordinal: int,
    is_divided: bool,
) -> torch.Tensor:  # fmt: skip
    """The op itself; the output is contiguous, in the layout of the query."""
    module, given = attention_modules.get(handle), mask

    def host() -> torch.Tensor:
        if is_divided:
            return _over_processes(module, query, key, value, given, is_causal, scale, enable_gqa)
        q, k, v = (tensor.transpose(1, 2) if bshd else tensor for tensor in (query, key, value))
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=as_sdpa(mask, query, key, bshd), is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip
        return output.transpose(1, 2) if bshd else output

    if module is None or module.routing is None:  # the graph outlived the stand-in
        return host().contiguous()
    mask = as_sdpa(mask, query, key, bshd)
    return module.routing.run_compiled(
        module, ordinal, host, is_divided, query, key, value, mask, is_causal, scale, enable_gqa, bshd
    ).contiguous()


def _over_processes(
    module: AttentionModule | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """Diffusers' own function, with what a graph cannot hold from the processor."""
    if module is None:
        raise RuntimeError("a compiled graph of a model that was divided over processes is gone; compile it again")
    dispatch, processor = sys.modules["diffusers.models.attention_dispatch"].dispatch_attention_fn, module.processor
    output: torch.Tensor = dispatch(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        backend=processor._attention_backend, parallel_config=processor._parallel_config,
    )  # fmt: skip
    return output


def as_sdpa(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, bshd: bool) -> torch.Tensor | None:
    """The mask as SDPA reads it; Diffusers' dispatch reads (batch, kv_len) as key padding."""
    if mask is not None and bshd and mask.ndim == 2 and mask.shape == (query.shape[0], key.shape[1]):
        return mask[:, None, None]
    return mask


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object) -> torch.Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


_attention = define(
    "diffusers_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float? scale, bool enable_gqa, bool bshd,"
    " Tensor module, int ordinal, bool is_divided) -> Tensor",
    _run,
    _fake,
)
