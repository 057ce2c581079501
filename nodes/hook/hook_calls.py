"""One call of ComfyUI's hook: from its arguments to an `AttentionCall`, its plan, its kernel, and back to its layout.

Beside `override.py`, which is the hook's object, and `layouts.py`, which reads the layout of tensors, the only module
that knows what ComfyUI's attention functions take.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...backends.config.layers import Choice
from ...backends.config.names import AUTOTUNE, COMFY
from ...backends.engine.call_checks import DifferingTensorsError, check, differing
from ...backends.engine.plan import Plan
from ...backends.engine.priorities import LAST_RESORT
from ...backends.engine.router import forbidden
from ...backends.engine.sub_calls import SplitPlan, calls_of, fits, plan_sub_calls, run_sub_calls
from ...backends.values.errors import NoBackendError
from ...backends.values.mask_plan import NOTHING_HIDDEN, MaskPlan
from ...backends.values.masks import as_4d, as_additive, for_kernels, mask_kind
from ...backends.values.request import AttentionCall
from .attention_modules import AttentionModule, maker
from .comfy_functions import changed_by_auto, forces_upcast, host_function, name_of_function, reads_booleans
from .compiled import KNOWN_ARGUMENTS, POSITIONAL, positional
from .layouts import EMPTY, Layout, kv_len_of, only_comfyui
from .model_call import ModelCall
from .roles import Role

MAX_CALLS_TOLD_APART = 4
"""Calls of one module's forward that can have roles of their own; later ones share the last one's plan."""
BOOL = torch.bool
ADD_ANY_MASK = ("attention_basic", "attention_split", "attention_sub_quad", "attention_xformers")
"""ComfyUI's functions that add masks of numbers in whatever dtype; others end in SDPA, which asks for the query's or
float32."""


class HookPlan:
    """How every hook call of one kind runs: its layout, and the plan behind it."""

    __slots__ = ("layout", "looks", "parts", "plan", "preferred")

    def __init__(self, layout: Layout, plan: Plan, parts: SplitPlan | None, looks: bool, preferred: Any = None) -> None:
        self.layout = layout
        """Shared by all kinds that differ in their place only: what each call reads is to be in few places."""
        self.plan = plan
        self.parts = parts
        """How the parts of the mask's plan run; None where the mask is passed on whole."""
        self.preferred = preferred
        """The function that the checkpoint asks for and that may run; None where ComfyUI's own is meant."""
        self.looks = looks
        """Whether each call's dtypes and devices are looked at, for 0.2 us; not where the kernel does so itself."""


def route(
    model_call: ModelCall,
    func: Callable[..., torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    owned: bool = False,
) -> torch.Tensor:
    """Route one call; `func` is what ComfyUI would have run, with `args` and `kwargs`, which are used up.

    `owned`: query, key and value come in containers, and nobody else holds the tensors.
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
    if mask is not None:
        mask_dtype, mask_shape, source = mask.dtype, mask.shape, model_call.mask_source
        if mask_dtype is not dtype and mask_dtype is not BOOL:
            mask = _in_a_dtype_to_add(mask, query, func)
            if mask is not given:
                if model_call.session.checks:
                    check(Layout(query, key, value, kwargs).call(query, key, value, given))  # refuses it, in words
                source = given if source is None else source
                mask_dtype = None if mask is None else mask.dtype
        if mask is None or not 2 <= len(mask_shape) <= 4:
            text = f"mask {tuple(given.shape)} of {given.dtype} with queries of {query.dtype}"
            return _pass_on(model_call, func, query, key, value, given, options, kwargs, text)
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
        return _pass_on(model_call, func, query, key, value, given, options, kwargs, _unknown(kwargs))
    if hook_plan is None:
        text = _only_comfyui(query, key, value, mask, kwargs)
        if text:
            return _pass_on(model_call, func, query, key, value, given, options, kwargs, text)
        marked = model_call.attention_module
        model_call.attention_module, holder = maker(model_call)
        try:
            hook_plan = _new_plan(model_call, ordinal, query, key, value, mask, mask_plan, kwargs, func, holder)
        finally:
            known, model_call.attention_module = model_call.attention_module is marked, marked
        if known:  # else the key lacks the module that calls, which is marked from its next run on
            learned_key = (*hook_plan.layout.shapes, *plan_key[3:])
            model_call.plans[learned_key] = hook_plan
    # Owned ones are looked at always: once a kernel has refused them, nothing is left to pass on.
    elif (hook_plan.looks or owned) and not (
        key.dtype is value.dtype is dtype
        and query.get_device() == key.get_device() == value.get_device()
        and (mask is None or mask.get_device() == query.get_device())
    ):
        text = differing(query, key, value, mask)
        return _pass_on(model_call, func, query, key, value, given, options, kwargs, text)
    layout = hook_plan.layout
    call = layout.call(query, key, value, mask)
    func = hook_plan.preferred or func
    if owned:
        # Not only for the backend comfy: it is also the last resort when another one fails.
        call.host = partial(_host_part, func, options=options, kwargs=kwargs)
        if hook_plan.plan.decision.backend != COMFY:
            call.owned = True
        elif hasattr(func, "container_function") or hasattr(getattr(func, "func", None), "container_function"):
            call.owned = True
            call.host, containers = _host_call, (container(query), container(key), container(value))
            call.given = (layout, func, *containers, given, options, kwargs)
    if owned and call.owned:
        del query, key, value  # the last resort then gets what the call itself still holds
    else:
        call.host, call.given = _host_call, (layout, func, query, key, value, given, options, kwargs)
    if mask_plan is None or hook_plan.parts is None:
        if mask_plan is not None and mask_plan.treatment == "passed on":
            call.memo = mask_plan.parts[0].memo
        try:
            output = model_call.session.run(hook_plan.plan, call)
        except DifferingTensorsError as error:  # where kernels look at that themselves, we do not
            if owned:
                raise
            return _pass_on(model_call, func, query, key, value, given, options, kwargs, str(error))
    else:
        host = partial(_host_part, func, options=options, kwargs=kwargs)
        output = run_sub_calls(model_call.session, hook_plan.parts, mask_plan, call, host)
    if layout.skip_output_reshape:
        return output
    return output.transpose(1, 2).flatten(2)


def _in_a_dtype_to_add(
    mask: torch.Tensor, query: torch.Tensor, func: Callable[..., torch.Tensor]
) -> torch.Tensor | None:
    """The mask in a dtype that kernels take, where ComfyUI's function would run it; None where that is to decide."""
    dtype = mask.dtype
    if dtype is query.dtype or dtype is torch.bool:
        return mask
    if dtype is not torch.float32 and (name_of_function(func) not in ADD_ANY_MASK or dtype.is_complex):
        return None
    return for_kernels(mask, query.dtype)


def _only_comfyui(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> str:
    """Why ComfyUI's own function is to run this kind of call; empty where kernels may. See `layouts.only_comfyui`."""
    if not KNOWN_ARGUMENTS.issuperset(kwargs):
        return _unknown(kwargs)
    text = only_comfyui(query, key, value, mask, kwargs)
    if text or mask is None:
        return text
    call = Layout(query, key, value, kwargs).call(query, key, value, mask)
    if not fits(call):
        scores = (*call.query.shape[:3], call.key.shape[2])
        return f"mask {tuple(mask.shape)} cannot be broadcast to {scores}"
    return ""


def _unknown(kwargs: dict[str, Any]) -> str:
    unknown = ", ".join(sorted(set(kwargs) - KNOWN_ARGUMENTS)) or "of an unknown kind"
    return f"argument {unknown} is not known to this version"


def _new_plan(
    model_call: ModelCall,
    ordinal: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    mask_plan: MaskPlan | None,
    kwargs: dict[str, Any],
    func: Callable[..., torch.Tensor],
    holder: Any,
) -> HookPlan:
    """Plan a kind of call of the module at `model_call.attention_module`; `holder` has what the checkpoint prefers for
    it, or None."""
    layout = _layout(model_call, query, key, value, kwargs)
    call = layout.call(query, key, value, mask)
    forbids = kwargs.get("low_precision_attention", True) is False
    request = call.request(exact_only=forbids or forces_upcast(kwargs.get("attn_precision"), query.dtype))
    attention_module = model_call.attention_module
    role = model_call.role(ordinal, request.q_len, request.kv_len)
    if role.guessed:
        path = re.sub(r"\d+", "*", attention_module.path) if attention_module is not None else "an unknown module"
        model_call.run.note(f"role guessed as {role.name} for {path}: the role table does not know it")
    wish = preferred_function(attention_module, ordinal, holder)
    function = host_function(func if wish is None else wish, preferred=wish is not None)
    preferred = None if wish is None else Choice(COMFY, f"the checkpoint's own preference ({function.called})")
    block = attention_module.block if attention_module is not None else ""
    choice = model_call.choice(
        role, masked=mask_plan is not None and mask_plan.treatment not in ("none", NOTHING_HIDDEN)
    )
    asked = choice.asked
    if choice.record is not None:  # what it knows of the whole call; it may know the parts instead
        found = model_call.session.recorded(choice, role.name, block, request)
        asked = None if found is None else found.asked
    if preferred is not None and asked == COMFY and not function.may_run(request):
        # ComfyUI would run it, and so against what the model says: the model's word goes first.
        model_call.run.note(f"{preferred.source} was left out: {forbidden(function.accuracy)}")
        wish, preferred, function = None, None, host_function(func)
    takes_wish = wish is not None and choice.is_open and function.may_run(request)
    on_host = takes_wish or asked == COMFY
    if wish is not None and not on_host and not function.may_run(request):
        wish, last_resort = None, host_function(func)
    else:
        last_resort = function

    def planned(part: AttentionCall, treatment: str = "") -> Plan:
        facts = part.request(exact_only=request.exact_only)
        plan = model_call.session.plan(
            facts, role.name, role.category, block, preferred, treatment, choice, function, last_resort
        )
        plan.index = part.query.get_device()
        return plan

    parts = [] if mask_plan is None or on_host else calls_of(model_call.session, mask_plan, call, asked)
    if mask_plan is None or not parts:
        pattern = mask_plan.pattern if mask_plan is not None and not on_host else ""
        plan = planned(call, f"{request.mask}, {pattern}" if pattern else "")
        # PyTorch's own function compares them; the operators below it, and packages, need not.
        plain = plan.decision.backend == LAST_RESORT and model_call.session.router.platform.kind == "cpu"
        hook_plan = HookPlan(layout, plan, None, not plain, wish)
    else:
        planned_parts = plan_sub_calls(model_call.session, mask_plan, call, parts, planned)
        plan = next(plan for plan in planned_parts.plans if plan is not None)
        hook_plan = HookPlan(layout, plan, planned_parts, True, wish)
    decision = hook_plan.plan.decision
    if preferred is not None and not choice.is_open and decision.backend != COMFY:
        model_call.run.note(f"{preferred.source} gave way to {decision.source}")
    if (
        preferred is None
        and choice.is_open
        and model_call.session.settings.accuracy == "exact"
        and decision.backend != COMFY
    ):
        text = changed_by_auto(func)
        if text:
            model_call.run.note(text)
    return hook_plan


def preferred_function(attention_module: AttentionModule | None, ordinal: int, holder: Any) -> Any:
    """The function that the checkpoint asks for in this call, or None (ComfyUI 0.37 and newer)."""
    if attention_module is not None:
        return attention_module.preferred_attention(ordinal, holder)
    return getattr(holder, "function", None)


def _layout(
    model_call: ModelCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> Layout:
    """The layout of calls with these shapes and arguments, whichever module makes them."""
    facts = (query.shape, key.shape, value.shape, query.device, *kwargs, *kwargs.values())
    layouts = model_call.session.layouts
    if facts not in layouts:
        layouts[facts] = Layout(query, key, value, kwargs)
    return layouts[facts]


def _host_part(
    func: Callable[..., torch.Tensor], part: AttentionCall, *, options: Any, kwargs: dict[str, Any]
) -> torch.Tensor:
    """Run what ComfyUI would have run on one part of a call; BHSD in and out."""
    layout = {"heads": part.query.shape[1], "skip_reshape": True, "skip_output_reshape": True}
    mask = part.attn_mask
    if part.is_causal:  # read from the mask; ComfyUI's functions have no such argument
        mask = torch.ones(part.query.shape[2], part.key.shape[2], dtype=torch.bool, device=part.query.device).tril()
    return run_comfy(func, part.query, part.key, part.value, mask, options, {**kwargs, **layout})


def _host_call(call: AttentionCall) -> torch.Tensor:
    """Run what ComfyUI would have run, on the caller's own tensors or containers; return it as BHSD."""
    layout, func, query, key, value, mask, options, kwargs = call.given
    if not isinstance(query, torch.Tensor):
        if call.owned:  # nothing but the containers holds them: freed as ComfyUI frees them
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
    """A call that ComfyUI's own function alone can answer goes there as it is, and is counted; `text` says why.

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
    choice = model_call.choice(role)
    empty = text.startswith(EMPTY)
    if choice.asked not in (None, AUTOTUNE, COMFY) and model_call.session.settings.strict and not empty:
        raise NoBackendError(
            f"{text}, so only ComfyUI's own attention can run, but {choice.asked} was asked for strictly via "
            f"{choice.source}\n  what to do: switch strict off, or update this pack"
        )
    model_call.run.note(f"ComfyUI's own attention ran: {text}")
    block = model_call.attention_module.block if model_call.attention_module is not None else ""
    model_call.run.run_report.row(role.name, block, COMFY, choice.source, kind, text, choice.asked).calls += 1
