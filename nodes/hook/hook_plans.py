"""How hook calls of one kind run: decided at the first such call, and kept with its layout for later ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...backends.config.layers import Choice
from ...backends.config.names import COMFY
from ...backends.engine.plan import CallKind, Slot
from ...backends.engine.priorities import LAST_RESORT
from ...backends.engine.router import forbidden
from ...backends.engine.sub_calls import calls_of, fits, plan_sub_calls
from ...backends.kernels.comfy import HostFunction
from ...backends.values.grid import TokenGrid
from ...backends.values.mask_plan import NOTHING_HIDDEN, MaskPlan
from ...backends.values.reasons import Reason
from ...backends.values.request import AttentionCall, AttentionRequest
from .attention_modules import AttentionModule, maker
from .comfy_functions import changed_by_auto, forces_upcast, host_function
from .compiled import KNOWN_ARGUMENTS
from .layouts import Layout, only_comfyui
from .model_call import ModelCall
from .token_grids import grid_of


class OnlyComfyUIError(Exception):
    """A call that ComfyUI's own function alone can answer; the text says why."""


class HookPlan:
    """How every hook call of one kind runs: its layout, and the slot with the plan behind it."""

    __slots__ = ("checks_tensors", "layout", "preferred", "slot", "split_host")

    def __init__(self, layout: Layout, slot: Slot, *, preferred: Any = None, checks_tensors: bool = True) -> None:
        """
        Args:
            layout: shared by all kinds that differ in their place only, so that it stays in the processor's cache.
            preferred: the function that the checkpoint asks for and that may run; None for ComfyUI's own.
            checks_tensors: compare each call's dtypes and devices, for 0.2 us; not where the kernel does so itself.
        """
        self.layout = layout
        self.slot = slot
        self.preferred = preferred
        self.checks_tensors = checks_tensors
        self.split_host = slot.split is not None and len(slot.split.slots) > 1
        """ComfyUI's own function, where it is needed, runs on each sub-call alone."""


def unknown_arguments(kwargs: dict[str, Any]) -> str:
    """Why a call with such arguments goes to ComfyUI's own function."""
    unknown = ", ".join(sorted(set(kwargs) - KNOWN_ARGUMENTS)) or "of an unknown kind"
    return f"argument {unknown} is not known to this version"


def only_comfy(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> str:
    """Why ComfyUI's own function must run this kind of call; empty where kernels may. See `layouts.only_comfyui`."""
    if not KNOWN_ARGUMENTS.issuperset(kwargs):
        return unknown_arguments(kwargs)
    text = only_comfyui(query, key, value, mask, kwargs)
    if text or mask is None:
        return text
    call = Layout(query, key, value, kwargs).call(query, key, value, mask)
    if not fits(call):
        scores = (*call.query.shape[:3], call.key.shape[2])
        return f"mask {tuple(mask.shape)} cannot be broadcast to {scores}"
    return ""


def new_hook_plan(
    model_call: ModelCall,
    key: tuple[Any, ...],
    ordinal: int,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    mask_plan: MaskPlan | None,
    kwargs: dict[str, Any],
    func: Callable[..., torch.Tensor],
) -> HookPlan:
    """Plan a kind of call, and keep the plan under `key` if a marked module makes the call.

    Else that module is marked from its next run on, and this kind is planned again there.

    Raises:
        OnlyComfyUIError: kernels cannot compute such calls.
        NoBackendError: strict, and the named backend cannot run them.
    """
    text = only_comfy(*tensors, mask, kwargs)
    if text:
        raise OnlyComfyUIError(text)
    marked = model_call.attention_module
    model_call.attention_module, holder = maker(model_call)
    try:
        hook_plan = _planned(model_call, ordinal, tensors, mask, mask_plan, kwargs, func, holder)
    finally:
        known, model_call.attention_module = model_call.attention_module is marked, marked
    if known:  # else the key lacks the module that calls, which is marked from its next run on
        shared_key = (*hook_plan.layout.shapes, *key[3:])
        model_call.plans[shared_key] = hook_plan
    return hook_plan


def _planned(
    model_call: ModelCall,
    ordinal: int,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    mask_plan: MaskPlan | None,
    kwargs: dict[str, Any],
    func: Callable[..., torch.Tensor],
    holder: Any,
) -> HookPlan:
    """Plan calls of the running module; `holder` has the checkpoint's preference, or is None."""
    session = model_call.session
    layout = _layout(model_call, tensors, kwargs)
    call = layout.call(*tensors, mask)
    exact_only = kwargs.get("low_precision_attention", True) is False or forces_upcast(
        kwargs.get("attn_precision"), tensors[0].dtype
    )
    kind = _kind(model_call, ordinal, call.request(exact_only=exact_only))
    grid = kind.request.grid
    masked = mask_plan is not None and mask_plan.strategy not in ("none", NOTHING_HIDDEN)
    choice = model_call.choice(kind.role, kind.category, masked=masked)
    asked = choice.asked
    if choice.record is not None:
        known = session.asked(kind, choice, planned=False)
        asked = known.asked if known.record is None else None  # the record may have the sub-calls instead
    host = _host_functions(model_call, ordinal, kind.request, choice, asked, func, holder)

    def planned(request: AttentionRequest, mask_text: str = "") -> Slot:
        return session.plan(
            kind._replace(request=request, mask=mask_text), choice=choice,
            preferred=host.preferred, function=host.function, last_resort=host.last_resort,
        )  # fmt: skip

    def planned_sub_call(part: AttentionCall, mask_text: str, of_part: TokenGrid | None) -> Slot:
        return planned(part.request(exact_only=exact_only, grid=of_part), mask_text)

    calls = [] if mask_plan is None or host.runs else calls_of(session, mask_plan, call, asked, grid)
    if mask_plan is not None and calls:
        hook_plan = HookPlan(
            layout, plan_sub_calls(session, mask_plan, call, calls, planned_sub_call, grid), preferred=host.wish
        )
    else:
        pattern = mask_plan.pattern if mask_plan is not None and not host.runs else ""
        slot = planned(kind.request, f"{kind.request.mask}, {pattern}" if pattern else "")
        # PyTorch's own function compares dtypes and devices; its operators, and packages, need not.
        compares = slot.plan.decision.backend == LAST_RESORT and session.router.platform.kind == "cpu"
        hook_plan = HookPlan(layout, slot, preferred=host.wish, checks_tensors=not compares)
    _note_changes(model_call, hook_plan, choice, host.preferred, func)
    return hook_plan


def _kind(model_call: ModelCall, ordinal: int, request: AttentionRequest) -> CallKind:
    """The kind of a call of the running module."""
    module = model_call.attention_module
    role = model_call.role(ordinal, request.q_len, request.kv_len)
    if role.guessed:
        path = re.sub(r"\d+", "*", module.path) if module is not None else "an unknown module"
        model_call.run.note(Reason("role.guessed", role=role.name, path=path))
    if model_call.window.grids:
        grids = model_call.run.grids[model_call.window.grids]
        request = request._replace(grid=grid_of(grids, role.name, role.category, request.q_len))
    return CallKind(request, role.name, role.category, module.block if module is not None else "")


class _HostFunctions(NamedTuple):
    """What ComfyUI and the checkpoint would have run for calls of one kind."""

    wish: Any
    """The function that the checkpoint asks for and that may run; None where there is none."""
    preferred: Choice | None
    """The same as a choice."""
    function: HostFunction
    last_resort: HostFunction
    runs: bool
    """It is what runs: no person named a backend, or they named ComfyUI's own attention."""


def _host_functions(
    model_call: ModelCall, ordinal: int, request: AttentionRequest, choice: Choice, asked: str | None,
    func: Callable[..., torch.Tensor], holder: Any,
) -> _HostFunctions:  # fmt: skip
    own = host_function(func)
    wish = preferred_function(model_call.attention_module, ordinal, holder)
    if wish is None:
        return _HostFunctions(None, None, own, own, asked == COMFY)
    function = host_function(wish, preferred=True)
    preferred = Choice(COMFY, f"the checkpoint's own preference ({function.called})")
    if asked == COMFY and not function.may_run(request):
        # ComfyUI would run it although the model forbids that for this call: what the model says goes first.
        model_call.run.note(
            Reason("preference.left_out", preference=preferred.source, reason=forbidden(function.accuracy))
        )
        return _HostFunctions(None, None, own, own, True)
    runs = asked == COMFY or (choice.no_backend_named and function.may_run(request))
    if not runs and not function.may_run(request):
        return _HostFunctions(None, preferred, function, own, runs)
    return _HostFunctions(wish, preferred, function, function, runs)


def _note_changes(
    model_call: ModelCall, hook_plan: HookPlan, choice: Choice, preferred: Choice | None,
    func: Callable[..., torch.Tensor],
) -> None:  # fmt: skip
    """Note in the run report where something else runs than without this node."""
    decision = hook_plan.slot.plan.decision
    if decision.backend == COMFY:
        return
    if preferred is not None and not choice.no_backend_named:
        model_call.run.note(Reason("preference.gave_way", preference=preferred.source, source=decision.source))
    if preferred is None and choice.no_backend_named and model_call.session.settings.accuracy == "exact":
        text = changed_by_auto(func)
        if text:
            model_call.run.note(text)


def preferred_function(attention_module: AttentionModule | None, ordinal: int, holder: Any) -> Any:
    """The function that the checkpoint asks for in this call, or None (ComfyUI 0.37 and newer)."""
    if attention_module is not None:
        return attention_module.preferred_attention(ordinal, holder)
    return getattr(holder, "function", None)


def _layout(
    model_call: ModelCall, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], kwargs: dict[str, Any]
) -> Layout:
    """The layout of calls with these shapes and arguments, whichever module makes them."""
    query, key, value = tensors
    facts = (query.shape, key.shape, value.shape, query.device, *kwargs, *kwargs.values())
    layouts = model_call.session.layouts
    if facts not in layouts:
        layouts[facts] = Layout(query, key, value, kwargs)
    return layouts[facts]
