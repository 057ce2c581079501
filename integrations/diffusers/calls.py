"""One attention call of a Diffusers model: from the arguments of `dispatch_attention_fn` or of SDPA to the session.

A call is routed where this thread is in a forward of a chosen model (`model_calls.current`) and in one of its attention
modules. Every other call goes to the function that was there before, with the arguments as they came.

What only that function can compute goes there too, and is counted with the reason: dropout, a call that needs a
gradient, arguments of other kernels, Diffusers' context parallel attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from ...backends.engine.call_checks import differing
from ...backends.values.masks import for_kernels
from ...backends.values.request import AttentionCall
from .model_calls import MOST_APART, current

if TYPE_CHECKING:
    from .model_calls import ModelCall

Function = Callable[..., Any]

_routed: dict[tuple[int, bool], tuple[Function, Function]] = {}
"""(id of a function, whether it takes BSHD) -> (that function, ours)."""


def routed_dispatch(original: Function) -> Function:
    """What a processor calls instead of `dispatch_attention_fn`; tensors are (batch, length, heads, head_dim)."""
    known = _routed.get((id(original), True))
    if known is not None:
        return known[1]

    def dispatch_attention_fn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        **more: Any,
    ) -> torch.Tensor:
        def host() -> Any:
            return original(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs, **more
            )

        if is_dynamo_compiling():
            if dropout_p or attention_kwargs or more.get("parallel_config") is not None:
                return host()  # type: ignore[no-any-return]
            return _traced(host, query, key, value, attn_mask, is_causal, scale, enable_gqa, True)
        model_call = getattr(current, "model_call", None)
        if model_call is None or model_call.module is None:
            return host()  # type: ignore[no-any-return]
        text = _only_host(dropout_p, attention_kwargs, more) if dropout_p or attention_kwargs or more else ""
        if not text:
            mask = attn_mask
            if mask is not None and mask.ndim == 2 and mask.shape == (query.shape[0], key.shape[1]):
                mask = mask[:, None, None]  # as Diffusers' native attention reads it
            return run(model_call, host, query, key, value, mask, is_causal, scale, enable_gqa, True)
        return model_call.by_host(host, text, query.shape[1], key.shape[1])  # type: ignore[no-any-return]

    _routed[id(original), True] = original, dispatch_attention_fn
    return dispatch_attention_fn


def _only_host(dropout_p: float, attention_kwargs: dict[str, Any] | None, more: dict[str, Any]) -> str:
    """Why Diffusers' own function must compute a call; empty where kernels may."""
    if dropout_p:
        return f"dropout_p {dropout_p:g} > 0"
    if more.get("parallel_config") is not None:
        return "context parallel attention of Diffusers"
    if attention_kwargs:
        return f"attention_kwargs {', '.join(sorted(attention_kwargs))}: arguments of another kernel"
    unknown = sorted(set(more) - {"backend", "parallel_config"})
    return f"argument {', '.join(unknown)} is not known to this version" if unknown else ""


def routed_sdpa(original: Function) -> Function:
    """What a processor calls instead of torch's `scaled_dot_product_attention`."""
    known = _routed.get((id(original), False))
    if known is not None:
        return known[1]

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        def host() -> Any:
            return original(
                query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip

        if is_dynamo_compiling():
            if dropout_p or query.ndim != 4:
                return host()  # type: ignore[no-any-return]
            return _traced(host, query, key, value, attn_mask, is_causal, scale, enable_gqa, False)
        model_call = getattr(current, "model_call", None)
        if model_call is None or model_call.module is None:
            return host()  # type: ignore[no-any-return]
        if dropout_p:
            return model_call.by_host(host, f"dropout_p {dropout_p:g} > 0", query.shape[-2], key.shape[-2])  # type: ignore[no-any-return]
        return run(model_call, host, query, key, value, attn_mask, is_causal, scale, enable_gqa, False)

    _routed[id(original), False] = original, scaled_dot_product_attention
    return scaled_dot_product_attention


def _traced(host: Callable[[], Any], *call: Any) -> torch.Tensor:
    from . import compiled

    return compiled.traced(host, *call)


def run(
    model_call: ModelCall, host: Callable[[], Any],
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    is_causal: bool, scale: float | None, enable_gqa: bool, bshd: bool,
) -> torch.Tensor:  # fmt: skip
    """Run one call of the module that is running.

    Args:
        host: the function that was there before, with the call's arguments.
        mask: as SDPA reads it: broadcast to (batch, num_heads, q_len, kv_len) from the last dimension on.
        bshd: tensors are (batch, length, heads, head_dim), else (batch, heads, length, head_dim).

    Raises:
        NoBackendError: strict, and the named backend cannot run the call.
    """
    ordinal = model_call.ordinal
    model_call.ordinal = ordinal + 1
    dtype, device = query.dtype, query.get_device()
    plan_key = (
        query.shape, key.shape, value.shape, model_call.module, model_call.window,
        ordinal if ordinal < MOST_APART else MOST_APART, dtype, device, is_causal, scale, enable_gqa,
        None if mask is None else (mask.dtype, mask.shape, mask.stride()),
    )  # fmt: skip
    plan = model_call.plans.get(plan_key)
    if plan is None:
        plan = model_call.new_plan(plan_key, ordinal, query, key, value, mask, is_causal, scale, enable_gqa, bshd)
    if plan.only_host:
        return model_call.count_host(host, plan)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        text = "the call needs a gradient"
        return model_call.by_host(host, text, plan.q_len, plan.kv_len, ordinal)
    if plan.checks_tensors and not (
        key.dtype is value.dtype is dtype
        and key.get_device() == value.get_device() == device
        and (mask is None or mask.get_device() == device)
    ):
        return model_call.by_host(host, differing(query, key, value, mask) or "", plan.q_len, plan.kv_len, ordinal)
    if bshd:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if mask is not None:
        if mask.ndim != 4:
            mask = mask[(None,) * (4 - mask.ndim)]
        if mask.dtype is not dtype:
            mask = for_kernels(mask, dtype)
    call = AttentionCall(query, key, value, mask, is_causal, scale, plan.grouped)
    slot, mask_plan = plan.slot, None
    if slot is None:
        slot, mask_plan = model_call.slot_by_mask(plan, plan_key, call)
    output = plan.session.attention(slot, call, mask_plan)
    return output.transpose(1, 2) if bshd else output
