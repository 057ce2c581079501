"""One call of ComfyUI's hook: from its arguments to an `AttentionCall`, through the session, and back to its layout.

`override.py` is the hook's object, `hook_plans.py` decides how a kind of call runs, `layouts.py` reads tensors'
layouts. Together they are all that knows what ComfyUI's attention functions take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...backends.config.names import AUTOTUNE, COMFY
from ...backends.engine.call_checks import DifferingTensorsError, check, differing
from ...backends.values.errors import NoBackendError
from ...backends.values.masks import as_4d, as_additive, for_kernels, mask_kind
from ...backends.values.reasons import Reason
from ...backends.values.request import AttentionCall, Host, HostedCall
from .comfy_functions import name_of_function, reads_booleans
from .compiled import POSITIONAL, positional
from .hook_plans import OnlyComfyUIError, new_hook_plan, unknown_arguments
from .layouts import EMPTY, Layout, kv_len_of
from .model_call import ModelCall
from .roles import Role

MAX_CALLS_TOLD_APART = 4
"""Calls of one module's forward that can have roles of their own; later ones share the last one's plan."""
BOOL = torch.bool
ADD_ANY_MASK = ("attention_basic", "attention_split", "attention_sub_quad", "attention_xformers")
"""ComfyUI's functions that add number masks of any dtype; others end in SDPA, which takes the query's or float32."""


def run_hook_call(
    model_call: ModelCall,
    func: Callable[..., torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    owned: bool = False,
) -> torch.Tensor:
    """Run one call; `func` is what ComfyUI would have run, with `args` and `kwargs` (consumed).

    `owned`: query, key and value come in containers, which hold the only references to the tensors.
    """
    if len(args) == 3:
        query, key, value = args
    elif len(args) == 4:
        query, key, value, kwargs["heads"] = args
    else:
        if len(args) < 3:  # another pack's override calls with names
            args = positional(args, kwargs)
        query, key, value = args[:3]
        if len(args) > 3 + len(POSITIONAL):
            raise TypeError(f"attention takes {3 + len(POSITIONAL)} positional arguments, and {len(args)} were given")
        kwargs.update(zip(POSITIONAL, args[3:], strict=False))
    if owned:
        container = type(query)
        query, key, value = query.take(), key.take(), value.take()
    pop = kwargs.pop
    options, mask = pop("transformer_options", None), pop("mask", None)
    pop("_inside_attn_wrapper", None)  # always there, so it tells no calls apart
    ordinal = model_call.ordinal
    model_call.ordinal = ordinal + 1
    model_call.routed += 1
    # Each of these costs torch 0.05 to 0.1 us, so it is read once.
    q_shape, k_shape, dtype = query.shape, key.shape, query.dtype
    given, mask_plan, mask_facts = mask, None, None
    try:
        if mask is not None:
            mask_dtype, mask_shape, source = mask.dtype, mask.shape, model_call.mask_source
            if mask_dtype is not dtype and mask_dtype is not BOOL:
                mask = _in_a_dtype_to_add(mask, query, func)
                if mask is not given:
                    if model_call.session.checks:
                        check(Layout(query, key, value, kwargs).call(query, key, value, given))  # raises
                    source = given if source is None else source
                    mask_dtype = None if mask is None else mask.dtype
            if mask is None or not 2 <= len(mask_shape) <= 4:
                text = f"mask {tuple(given.shape)} of {given.dtype} with queries of {query.dtype}"
                raise OnlyComfyUIError(text)
            same = k_shape[0] == q_shape[0] and len(k_shape) == len(q_shape)
            mask_plan = model_call.masks.plan(mask, source, k_shape[-2] if same else kv_len_of(query, key, kwargs))
            mask_facts = mask_plan.facts, mask_dtype, mask_shape, mask.stride()
        # Everything that is left in kwargs is a scalar, so the whole call is described by hashable facts. Names, then
        # values: half the time of pairs.
        plan_key = (
            q_shape,
            k_shape,
            value.shape,
            model_call.attention_module,
            model_call.window,
            ordinal if ordinal < MAX_CALLS_TOLD_APART else MAX_CALLS_TOLD_APART,
            dtype,
            mask_facts,
            *kwargs,
            *kwargs.values(),
        )
        try:
            hook_plan = model_call.plans.get(plan_key)
        except TypeError:  # an argument of a later ComfyUI that is not hashable, hence not one of ours
            raise OnlyComfyUIError(unknown_arguments(kwargs)) from None
        if hook_plan is None:
            tensors = query, key, value
            hook_plan = new_hook_plan(model_call, plan_key, ordinal, tensors, mask, mask_plan, kwargs, func)
            del tensors
        # Owned ones are always compared: after a kernel has refused them, their tensors may be gone.
        elif (hook_plan.checks_tensors or owned) and not (
            key.dtype is value.dtype is dtype
            and query.get_device() == key.get_device() == value.get_device()
            and (mask is None or mask.get_device() == query.get_device())
        ):
            raise OnlyComfyUIError(differing(query, key, value, mask))
        layout, slot = hook_plan.layout, hook_plan.slot
        call = layout.call(query, key, value, mask)
        func = hook_plan.preferred or func
        host: Host
        arguments: tuple[Any, ...]
        if not owned:
            if hook_plan.split_host:
                host, arguments = _host_sub_call, (func, options, kwargs)
            else:
                host, arguments = _host_call, (layout, func, query, key, value, given, options, kwargs)
        else:
            on_host = slot.split is None and slot.plan.hosted
            # The output is compared with the session's device where a kernel has freed the inputs.
            here = query.get_device() == model_call.session.device_index
            call.owned = here and (not on_host or _takes_containers(func))
            if not on_host:
                host, arguments = _host_sub_call, (func, options, kwargs)
            else:
                if call.owned:
                    query, key, value = container(query), container(key), container(value)
                host, arguments = _host_call, (layout, func, query, key, value, given, options, kwargs)
                call = HostedCall(call, host, arguments)  # here, so that no other call references the tensors
            if call.owned:
                del query, key, value  # only the call, or its containers, reference the tensors now
        output = model_call.session.attention(slot, call, mask_plan, host, arguments)
    except (OnlyComfyUIError, DifferingTensorsError) as error:  # the second where the kernel compares tensors itself
        if owned and isinstance(error, DifferingTensorsError):
            raise
        text = str(error)
    else:
        if layout.skip_output_reshape:
            return output
        return output.transpose(1, 2).flatten(2)
    # Not in the `except` clause: what ComfyUI's function raises is not an error while another one is handled.
    return _pass_on(model_call, func, query, key, value, given, options, kwargs, text)


def _takes_containers(func: Any) -> bool:
    """Whether one of ComfyUI's functions takes containers, and frees their tensors itself (0.33 and newer)."""
    return hasattr(func, "container_function") or hasattr(getattr(func, "func", None), "container_function")


def _in_a_dtype_to_add(
    mask: torch.Tensor, query: torch.Tensor, func: Callable[..., torch.Tensor]
) -> torch.Tensor | None:
    """The mask in a dtype that kernels take, if ComfyUI's function would run it; None to leave it to that function."""
    dtype = mask.dtype
    if dtype is query.dtype or dtype is torch.bool:
        return mask
    if dtype is not torch.float32 and (name_of_function(func) not in ADD_ANY_MASK or dtype.is_complex):
        return None
    return for_kernels(mask, query.dtype)


def _host_sub_call(
    func: Callable[..., torch.Tensor], options: Any, kwargs: dict[str, Any], part: AttentionCall
) -> torch.Tensor:
    """Run what ComfyUI would have run, on one sub-call; BHSD in and out."""
    layout = {"heads": part.query.shape[1], "skip_reshape": True, "skip_output_reshape": True}
    mask = part.attn_mask
    if part.is_causal:  # read from the mask; ComfyUI's functions have no such argument
        mask = torch.ones(part.query.shape[2], part.key.shape[2], dtype=torch.bool, device=part.query.device).tril()
    return run_comfy(func, part.query, part.key, part.value, mask, options, {**kwargs, **layout})


def _host_call(
    layout: Layout, func: Callable[..., torch.Tensor], query: Any, key: Any, value: Any, mask: torch.Tensor | None,
    options: Any, kwargs: dict[str, Any], call: AttentionCall,
) -> torch.Tensor:  # fmt: skip
    """Run what ComfyUI would have run, on the caller's own tensors or containers; return it as BHSD."""
    if not isinstance(query, torch.Tensor):
        if call.owned:  # only the containers reference them: freed when ComfyUI frees them
            call.query = call.key = call.value = None  # type: ignore[assignment]  # read no more
        else:  # the guard needs them afterwards
            query, key, value = query.peek(), key.peek(), value.peek()
    output = run_comfy(func, query, key, value, mask, options, kwargs)
    if layout.skip_output_reshape or getattr(output, "ndim", 0) != 3 or output.shape[2] % layout.heads:
        return output
    bhsd: torch.Tensor = output.unflatten(2, (layout.heads, -1)).transpose(1, 2)
    return bhsd


def run_comfy(
    func: Callable[..., torch.Tensor], query: Any, key: Any, value: Any, mask: torch.Tensor | None, options: Any,
    kwargs: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """Call one of ComfyUI's functions with every argument, tensors or containers.

    Boolean masks become additive where the function does not read them as torch does.
    """
    if mask is not None and mask.dtype == torch.bool and not reads_booleans(func):
        mask = as_additive(mask, (query if isinstance(query, torch.Tensor) else query.peek()).dtype)
    if options is not None:
        kwargs = {**kwargs, "transformer_options": options}
    # Without this key ComfyUI's wrapper would call our override again.
    return func(query, key, value, **{**kwargs, "mask": mask, "_inside_attn_wrapper": True})


def _pass_on(
    model_call: ModelCall,
    func: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: Any,
    kwargs: dict[str, Any],
    text: str,
) -> torch.Tensor:
    """Run a call that only ComfyUI's own function can answer, unchanged, and count it; `text` says why.

    Raises:
        NoBackendError: a backend was named for this role, strictly, and there is something to compute.
    """
    _count_passed_on(model_call, query, key, mask, text)
    if mask is not None and text.startswith("mask "):  # only ComfyUI's function knows how it reads this one
        if options is not None:
            kwargs = {**kwargs, "transformer_options": options}
        return func(query, key, value, **{**kwargs, "mask": mask, "_inside_attn_wrapper": True})
    return run_comfy(func, query, key, value, mask, options, kwargs)


def _count_passed_on(
    model_call: ModelCall, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, text: str
) -> None:
    role = model_call.role(model_call.ordinal - 1, query.shape[-2], key.shape[-2])
    kind = "none"
    if mask is not None:
        kind = mask_kind(as_4d(mask)) if 2 <= mask.ndim <= 4 else "bias"
    count_passed_on(model_call, role, kind, text)


def count_passed_on(model_call: ModelCall, role: Role, kind: str, text: str) -> None:
    """Count a call that ComfyUI's own function runs, with its reason.

    Args:
        kind: of its mask.

    Raises:
        NoBackendError: a backend was named for this role, strictly, and there is something to compute.
    """
    choice = model_call.choice(role.name, role.category)
    empty = text.startswith(EMPTY)
    if choice.asked not in (None, AUTOTUNE, COMFY) and model_call.session.settings.strict and not empty:
        raise NoBackendError(
            f"{text}, so only ComfyUI's own attention can run, but {choice.asked} was asked for strictly via "
            f"{choice.source}\n  what to do: switch strict off, or update this pack"
        )
    model_call.run.note(Reason("comfy.ran", reason=text))
    block = model_call.attention_module.block if model_call.attention_module is not None else ""
    model_call.run.run_report.row(role.name, block, COMFY, choice.source, kind, text, choice.asked).calls += 1
