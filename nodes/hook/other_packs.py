"""Attention that other packs computed in a model: counted, named and, under strict, refused.

Calls of our hook are known. Others are found by what happens in a model call, not by names of packs. What other packs
put into it is called through stand-ins (`stand_ins.py`). A marked module whose forward made fewer calls than usual asks
`Others.missed`: another override may have been put into its options inside the model call, all of ours may have been
taken out of them, or its module's attention function was replaced. One that runs outside our model calls during a
sampler's step asks `Others.ran_without_us`.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

import torch

from ..history import runs
from . import attention_modules, origins
from .stand_ins import Habit, OnTop, count, role_of, watch_patches

if TYPE_CHECKING:
    from .model_call import ModelCall
    from .run import Run

KEY = "attention_backends"
"""The key of our override in `transformer_options`, beside ComfyUI's own key."""
OVERRIDE = "optimized_attention_override"


class Others:
    """What other packs computed in one run, and where they are in the graph."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._titles: dict[tuple[str, str, str], str] = {}
        self._habits: dict[Any, Habit] = {}
        self.on_top: Any = None
        """The override above ours at the last model call; None if ours was the top one."""
        self.at_start: Any = None
        """The override that was on the model when its sampler began; None where no sampler is known."""

    def habit(self, place: Any) -> Habit:
        """The `Habit` of another pack's function at this place."""
        return self._habits.setdefault(place, Habit())

    def title(self, other: Any) -> str:
        """The title of the node that made a function."""
        key = origins.origin(other) if other is not None else ("", "", "")
        if key not in self._titles:
            self._titles[key] = origins.title_of(other, runs.queued(runs.executing()[0]))
        return self._titles[key]

    def stands(self, other: Any) -> str:
        """Where an override is in the graph, if that is certain; else empty."""
        if other is self._run.override.foreign:
            selector = self._selector_below(other)
            return "before this node" if selector is None else f"and {self.title(selector)} before this node"
        if self.at_start is None:
            return "after this node" if origins.is_selector(other) else ""
        return "after this node" if self._was_there(other) else ""

    def _was_there(self, other: Any) -> bool:
        """Whether an override was on the model when the sampler began: one that a node puts there, not a callback."""
        return self.at_start is None or origins.origin(other) == origins.origin(self.at_start)

    def order(self, other: Any) -> str:
        """Which order of the nodes makes this node's choice win; empty if none does."""
        title, selector = self.title(other), self._selector_below(other)
        if selector is not None:
            return f"put this pack's node in place of {self.title(selector)}, which stands before {title}"
        if not origins.is_selector(other) or not self._was_there(other):
            return ""
        return f"put this pack's node after {title} or in place of it"

    def _selector_below(self, other: Any) -> Any:
        """The kernel selector below another pack's override that ours is composed with."""
        return origins.below(other, origins.is_selector) if other is self._run.override.foreign else None

    def around(self, options: dict[str, Any]) -> str:
        """Which pack wraps the whole model with a wrapper that ComfyUI calls; empty if none does."""
        wrappers = options.get("wrappers") or {}
        found = wrappers.get("diffusion_model") or {}
        wrappers_of_others = [one for name, several in found.items() if name != KEY for one in several]
        wrappers_of_others += [self._run.function_wrapper] if self._run.function_wrapper is not None else []
        return ", ".join(
            dict.fromkeys(self.title(one) for one in wrappers_of_others if origins.is_foreign(one, "comfy"))
        )

    def _in_between(self, options: dict[str, Any]) -> Any:
        """Another pack's object between our node and the model's modules, if known; else None."""
        wrappers = options.get("wrappers") or {}
        functions = [self._run.function_wrapper]
        for kind in ("apply_model", "diffusion_model"):
            functions += [one for name, several in (wrappers.get(kind) or {}).items() if name != KEY for one in several]
        for root in (marks.model for marks in self._run.forward_patches()):
            functions += [one for one in vars(root).values() if isinstance(one, types.FunctionType | types.MethodType)]
        return next((one for one in functions if one is not None and origins.is_foreign(one, "comfy")), None)

    def watch(self, options: dict[str, Any]) -> dict[str, Any]:
        """Before a model call: put stand-ins around other packs' functions. Returns the original `options` entries."""
        before = {}
        installed: Any = options.get(OVERRIDE)
        # In one step: with several cards another thread may read it meanwhile.
        self.on_top = None if installed is self._run.override else installed
        if self.on_top is not None:
            before[OVERRIDE] = installed
            options[OVERRIDE] = OnTop.of(installed)
        wrappers = options.get("wrappers") or {}
        if wrappers.get("diffusion_model") or set(wrappers.get("apply_model") or ()) - {KEY}:
            before["wrappers"] = wrappers
            inmost = {**(wrappers.get("diffusion_model") or {}), KEY: [self._inmost]}
            options["wrappers"] = {**wrappers, "diffusion_model": inmost}
        return before | watch_patches(options)

    def _inmost(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """The innermost wrapper of a model call: wrappers around it may have put patches into its options."""
        options = kwargs.get("transformer_options")
        if options is None:
            options = next((one for one in args if isinstance(one, dict) and KEY in one), None)
        before = {} if options is None else watch_patches(options)
        try:
            return executor(*args, **kwargs)
        finally:
            if options is not None:
                options.update(before)

    def missed(
        self,
        model_call: ModelCall,
        attention_module: attention_modules.AttentionModule,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """The forward of a marked module ended with fewer calls to us than it usually makes."""
        options = kwargs.get("transformer_options")
        if options is None:
            options = next((one for one in args if isinstance(one, dict) and KEY in one), {})
        elif KEY not in options and KEY in model_call.options:  # other code removed our node's entries
            count(
                model_call,
                self._in_between(model_call.options),
                role_of(attention_module, model_call.ordinal),
                max(attention_module.most, 1),
            )
            return
        other = options.get(OVERRIDE)
        if isinstance(other, OnTop):
            return  # it counts its calls
        if other is self._run.override or KEY not in options:
            homes = (type(marks.model).__module__ for marks in self._run.forward_patches())
            other = _replaced_function(attention_module) if any(map(attention_module.is_at_home, homes)) else None
            if other is None:
                return  # the module has a branch without attention, or calls ComfyUI's function without options
        first = model_call.ordinal
        for ordinal in range(first, max(attention_module.most, first + 1)):
            count(model_call, other, role_of(attention_module, ordinal))

    def ran_without_us(
        self, attention_module: attention_modules.AttentionModule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A marked module ran in a sampler's step and in no model call of ours, maybe without our options."""
        options = kwargs.get("transformer_options")
        if not isinstance(options, dict) or KEY in options:
            return  # its calls reach our hook all the same
        tensor = next((one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)), None)
        if tensor is not None:
            other = self._in_between({})
            count(
                self._run.model_call(tensor.device),
                other,
                role_of(attention_module, 0),
                max(attention_module.most, 1),
                block=attention_module.block,
            )


def _replaced_function(attention_module: attention_modules.AttentionModule) -> Any:
    """The function that replaced ComfyUI's attention in the module that defines a class; None if none did."""
    module = sys.modules.get(attention_module.class_module)
    for name, found in vars(module).items() if module is not None else ():
        named = "attention" in name or "attn" in name
        if named and isinstance(found, types.FunctionType) and origins.is_foreign(found, attention_module.class_module):
            return found
    return None
