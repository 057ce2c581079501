"""One attention call of a Diffusers model: from the arguments of `dispatch_attention_fn` or of SDPA to the session.

A call is routed where this thread is in a forward of a chosen model (`model_calls.current`) and in one of its attention
modules. Every other call goes to the function that was there before, with the arguments as they came.

What only that function can compute goes there too, and is counted with the reason: dropout, a call that needs a
gradient, arguments of other kernels, masks of flex attention, calls in a torch function mode, Diffusers' context
parallel attention.

`run_again` is the warm path of calls without a mask or an option, `run` takes all others and plans new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch._C import _get_function_stack_at, _len_torch_function_stack
from torch.compiler import is_dynamo_compiling
from torch.utils._device import DeviceContext

from ...backends.engine.call_checks import differing
from ...backends.values.masks import for_kernels
from ...backends.values.request import AttentionCall
from . import compiled
from .model_calls import MOST_APART, current

if TYPE_CHECKING:
    from .model_calls import ModelCall

Function = Callable[..., Any]

_routed: dict[tuple[int, bool], tuple[Function, Function]] = {}
"""(id of a function, whether it takes BSHD) -> (that function, ours)."""


def routed(original: Function, bshd: bool) -> Function:
    """What a processor calls instead of `original`.

    Args:
        original: `dispatch_attention_fn` or torch's `scaled_dot_product_attention`; what it does not take, it refuses.
        bshd: tensors are (batch, length, heads, head_dim), as for the first, else (batch, heads, length, head_dim).
    """
    known = _routed.get((id(original), bshd))
    if known is not None:
        return known[1]

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        backend: Any = None,
        parallel_config: Any = None,
        **more: Any,
    ) -> torch.Tensor:
        model_call = None if is_dynamo_compiling() else current()
        if (
            model_call is not None
            and attn_mask is None
            and scale is None
            and parallel_config is None
            and not _len_torch_function_stack()
            and not (dropout_p or is_causal or enable_gqa or attention_kwargs or more)
        ):
            output = run_again(model_call, query, key, value, bshd)
            if output is not None:
                return output
        if attention_kwargs:
            more["attention_kwargs"] = attention_kwargs
        if parallel_config is not None:
            more["parallel_config"] = parallel_config
        return _run(
            original, bshd, model_call, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend,
            more,
        )  # fmt: skip

    _routed[id(original), bshd] = original, attention
    return attention


def _run(
    original: Function, bshd: bool, model_call: ModelCall | None,
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout_p: float,
    is_causal: bool, scale: float | None, enable_gqa: bool, backend: Any, more: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """Run a call with any arguments, in a model call, outside one, or in a trace of torch.compile."""

    def host() -> Any:
        named = more if backend is None else {**more, "backend": backend}
        return original(
            query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa, **named,
        )  # fmt: skip

    if mask is not None and not isinstance(mask, torch.Tensor):
        if is_dynamo_compiling() or model_call is None or model_call.module is None:
            return host()
        length = 1 if bshd else -2
        text = f"a mask of type {type(mask).__name__}, which only flex attention reads"
        return model_call.by_host(host, text, query.shape[length], key.shape[length])
    is_divided = set(more) == {"parallel_config"}
    if is_dynamo_compiling():
        if dropout_p or (more and not is_divided) or query.ndim != 4 or _only_mode():
            return host()  # type: ignore[no-any-return]
        return compiled.traced(host, is_divided, query, key, value, mask, is_causal, scale, enable_gqa, bshd)
    if model_call is None or model_call.module is None:
        return host()  # type: ignore[no-any-return]
    sdpa_mask = mask if mask is None else compiled.as_sdpa(mask, query, key, bshd)
    call = query, key, value, sdpa_mask, is_causal, scale, enable_gqa, bshd
    text = _only_mode()
    if is_divided and not dropout_p and not text:
        return run_divided(model_call, host, more["parallel_config"], *call)
    text = text or _only_host(dropout_p, more)
    if text:
        length = 1 if bshd else -2
        return model_call.by_host(host, text, query.shape[length], key.shape[length])
    return run(model_call, host, *call)


def _only_host(dropout_p: float, more: dict[str, Any]) -> str:
    """Why Diffusers' own function must compute a call with dropout, or with further arguments; empty without them."""
    if dropout_p:
        return f"dropout_p {dropout_p:g} > 0"
    if "attention_kwargs" in more:
        return f"attention_kwargs {', '.join(sorted(more['attention_kwargs']))}: arguments of another kernel"
    return f"argument {', '.join(sorted(more))} is not known to this version" if more else ""


def _only_mode() -> str:
    """Why Diffusers' own function must compute a call now: a torch function mode may answer torch's attention itself.

    By one, Diffusers skips attention scores (`LayerSkipConfig`, perturbed attention guidance).
    """
    for at in range(_len_torch_function_stack()):
        mode = _get_function_stack_at(at)
        if not isinstance(mode, DeviceContext):  # of `torch.set_default_device`
            return f"{type(mode).__name__} takes torch's attention calls"
    return ""


def run_divided(
    model_call: ModelCall, host: Callable[[], Any], parallel_config: Any,
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    is_causal: bool, scale: float | None, enable_gqa: bool, bshd: bool,
) -> torch.Tensor:  # fmt: skip
    """Run one call of a model that `enable_parallelism` divides; arguments and errors as of `run`, in BSHD."""
    from . import in_group

    how = in_group.of_call(model_call, parallel_config, (query, key, value), mask)
    if isinstance(how, str):
        return model_call.by_host(host, how, query.shape[1], key.shape[1])
    if how.group is None:
        return run(model_call, host, query, key, value, mask, is_causal, scale, enable_gqa, bshd)
    return in_group.attention(model_call, how, query, key, value, is_causal, scale, enable_gqa)


def run_again(
    model_call: ModelCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bshd: bool
) -> torch.Tensor | None:
    """Run a call without a mask or an option as the running module's last such call ran; None where it differs.

    Most calls of a model are such. A plan's key takes longer than to compare each fact of the call with the last one's.
    """
    ordinal = model_call.ordinal
    module = model_call.module
    if module is None or ordinal >= MOST_APART:
        return None
    plan = module.last[ordinal]
    if (
        plan is None
        or plan.session is not model_call.session
        or plan.window is not model_call.window
        or query.shape != plan.q_shape
        or key.shape != plan.k_shape
        or value.shape != plan.v_shape
        or query.dtype is not plan.dtype
        or query.get_device() != plan.device_index
        or plan.bshd is not bshd
        or torch.is_grad_enabled()
    ):
        return None
    if plan.checks_tensors and not (
        key.dtype is value.dtype is plan.dtype and key.get_device() == value.get_device() == plan.device_index
    ):
        return None
    model_call.ordinal = ordinal + 1
    call = AttentionCall.__new__(AttentionCall)  # all of `__init__` here, without its 0.1 us
    if bshd:
        call.query, call.key, call.value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    else:
        call.query, call.key, call.value = query, key, value
    call.attn_mask = call.scale = call.memo = None
    call.is_causal = call.enable_gqa = call.owned = False
    output = plan.session.attention(plan.slot, call)  # type: ignore[arg-type]  # `last` has plans with slots alone
    return output.transpose(1, 2) if bshd else output


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
    module, ordinal = model_call.module, model_call.ordinal
    assert module is not None  # noqa: S101
    model_call.ordinal = ordinal + 1
    dtype, device = query.dtype, query.get_device()
    plan_key = (
        query.shape, key.shape, value.shape, module, model_call.window,
        ordinal if ordinal < MOST_APART else MOST_APART, dtype, device, is_causal, scale, enable_gqa, bshd,
        None if mask is None else (mask.dtype, mask.shape, mask.stride()),
    )  # fmt: skip
    plan = model_call.plans.get(plan_key)
    if plan is None:
        plan = model_call.new_plan(plan_key, ordinal, query, key, value, mask, is_causal, scale, enable_gqa, bshd)
    if plan.only_host:
        return model_call.planned_by_host(host, plan)
    if plan.has_no_options and ordinal < MOST_APART:
        module.last[ordinal] = plan  # for `run_again`
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        text = "the call needs a gradient; torch.no_grad() switches gradients off"
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
