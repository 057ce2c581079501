"""ComfyUI's attention hook: the object that it calls for each attention call of a patched model.

ComfyUI calls `transformer_options["optimized_attention_override"](func, q, k, v, heads, ...)`, and `Override` is that
object. It has the configuration and no state of a run. The state is a `Run`, and of one model call a `ModelCall`, which
the wrapper around the model call makes current for its thread. `hook_calls.py` runs one call.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from ...backends.config import AttentionConfig
from ...backends.values.reasons import Reason
from . import attention_modules, compiled, operator_watch, stand_ins
from .attention_modules import current
from .callers import FROM_COMPILED
from .core_split import OF_CORE
from .hook_calls import count_passed_on, run_hook_call
from .masks import COMPILED
from .model_call import ModelCall
from .origins import name_of
from .run import KEY, RUN_KEY, Run

log = logging.getLogger("attention_backends")

MOST_OUTSIDE = 8
"""Overrides whose runs outside model calls are kept, so that their notes are logged once."""

MOST_PLANS = 1024
"""Kinds of call that such a run remembers before it starts again. Each takes about 4.5 KB."""

_outside_runs: OrderedDict[Override, Run] = OrderedDict()


class Override:
    """The entry in `transformer_options`: a configuration, and the override that was there before, if any."""

    def __init__(
        self,
        layers: tuple[AttentionConfig, ...],
        foreign: Callable[..., torch.Tensor] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.layers = layers
        self.foreign = foreign
        self.notes = notes
        self.handle = compiled.overrides.new(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Override:
        """Itself: it never changes, and a run identifies its override by identity."""
        return self

    def __getattr__(self, name: str) -> Any:
        """`container_function`, to which ComfyUI passes tensors without other references (0.33 and newer).

        Not with another pack's override composed: that one would get no function to call.
        """
        if name == "container_function" and self.__dict__.get("foreign") is None:
            return self.run_owned
        raise AttributeError(name)

    def run_owned(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a call whose query, key and value come in containers: a kernel may free them before its end."""
        func = compiled.comfys_attention()
        if not is_dynamo_compiling():
            model_call = getattr(current, "model_call", None)
            if model_call is not None and model_call.override is self:
                return run_hook_call(model_call, func, args, kwargs, owned=True)
        return self(func, *(container.take() for container in args[:3]), *args[3:], **kwargs)

    def __call__(self, func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one attention call of ComfyUI's hook."""
        if is_dynamo_compiling():
            return compiled.traced(self, func, compiled.positional(args, kwargs) if len(args) < 3 else args, kwargs)
        model_call: Any = getattr(current, "model_call", None)  # a ModelCall if `ours`, which mypy does not follow
        ours = model_call is not None and model_call.override is self
        if ours and self.foreign is None:
            return run_hook_call(model_call, func, args, kwargs)
        if len(args) < 3:
            args = compiled.positional(args, kwargs)
        return self._composed(model_call, func, *args, **kwargs) if ours else self._outside(func, *args, **kwargs)

    def _composed(
        self, model_call: ModelCall, func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Run the other pack's override with our dispatch as the function that it calls."""
        foreign = self.foreign
        if foreign is None:
            return run_hook_call(model_call, func, args, kwargs)
        before, ordinal = model_call.routed + model_call.elsewhere, model_call.ordinal

        def routed(*args: Any, **kwargs: Any) -> torch.Tensor:
            model_call.ordinal = ordinal  # however often the other pack calls, it is one call of the model
            return run_hook_call(model_call, func, args, kwargs)

        routed.__name__ = name_of(func)
        routed.__dict__[KEY] = self
        with operator_watch.counted_elsewhere():
            output = foreign(routed, *args, **kwargs)
        if model_call.routed + model_call.elsewhere == before:
            stand_ins.count(model_call, foreign, model_call.role(ordinal, args[0].shape[-2], args[1].shape[-2]))
        model_call.ordinal = ordinal + 1
        return output

    def _outside(self, func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """A call outside any model call, e.g. of another pack that calls the diffusion model directly."""
        if KEY in getattr(func, "__dict__", {}):  # another pack calls us inside our later override, which decides
            return func(*args, **kwargs)
        device = getattr(args[0], "tensor", args[0]).device
        model_call = self._model_call_outside(device, kwargs.get("transformer_options") or {})
        previous, place = attention_modules.set_model_call(model_call), model_call.state()
        try:
            model_call.begin({})
            return self(func, *args, **kwargs)
        finally:
            attention_modules.set_model_call(previous)
            model_call.restore(place)

    def _model_call_outside(self, device: torch.device, options: dict[str, Any]) -> ModelCall:
        """The model call object for a call outside any model call; it may be in use further up the stack."""
        sampled: Run | None = options.get(RUN_KEY)
        if sampled is not None and sampled.override is self and not sampled.over:
            return (sampled if OF_CORE not in options else sampled.cards.of(options[OF_CORE])).model_call(device)
        run = _outside_runs.pop(self, None) or Run(self)
        _outside_runs[self] = run
        if len(_outside_runs) > MOST_OUTSIDE:
            _outside_runs.popitem(last=False)
        model_call = run.model_call(device)
        if len(model_call.plans) >= MOST_PLANS:  # no sampler ends such a run
            model_call.session.forget()
        return model_call

    def run_compiled(
        self,
        attention_module: attention_modules.AttentionModule | None,
        ordinal: int,
        composed: bool,
        func: Callable[..., torch.Tensor],
        args: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Run one attention call from inside a compiled graph.

        Args:
            attention_module: the module that calls; None for the one that is marked as running.
            ordinal: which call of the module's forward this is, where `attention_module` is given.
            composed: another pack's override has already run, in the graph.
        """
        with self._at(attention_module, ordinal, args[0].device) as model_call:
            model_call.masks.not_kept = COMPILED
            if model_call.session.over_cards is not None:
                model_call.session.over_cards.turn_off(Reason("cards.compiled"))
            if composed and self.foreign is None:
                model_call.run.note(
                    "the compiled model still holds another pack's override; restart ComfyUI to be rid of it"
                )
            kwargs = {**kwargs, "transformer_options": model_call.options}
            return run_hook_call(model_call, func, args, kwargs) if composed else self(func, *args, **kwargs)

    def count_compiled(
        self,
        attention_module: attention_modules.AttentionModule | None,
        ordinal: int,
        query: torch.Tensor,
        key: torch.Tensor,
        by_other: bool,
    ) -> None:
        """Count a call in a compiled graph that did not reach us; see `answered_by_other` and `_pass_on`."""
        with self._at(attention_module, ordinal, query.device) as model_call:
            model_call.run.reached = True
            role = model_call.role(max(ordinal, 0), query.shape[-2], key.shape[-2])
            if by_other:
                stand_ins.count(model_call, model_call.run.others.on_top or self.foreign, role)
            else:
                count_passed_on(model_call, role, "none", compiled.UNKNOWN_ARGUMENT)

    @contextmanager
    def _at(
        self, attention_module: attention_modules.AttentionModule | None, ordinal: int, device: torch.device
    ) -> Iterator[ModelCall]:
        """This thread's model call with `attention_module` as the module that is running."""
        current = attention_modules.current_model_call()
        if current is None or current.run.override is not self:
            model_call = self._model_call_outside(device, {})
            place = model_call.state()
            model_call.begin({})
        else:
            model_call, place = current, None
        before = model_call.attention_module, model_call.ordinal, model_call.masks.not_kept
        if attention_module is not None:
            model_call.attention_module, model_call.ordinal = attention_module, ordinal
        attention_modules.set_model_call(model_call)
        try:
            yield model_call
        finally:
            attention_modules.set_model_call(current)
            if place is not None:
                model_call.restore(place)
            else:  # the model call continues, with this call counted
                if attention_module is not None:
                    model_call.attention_module, model_call.ordinal = before[:2]
                model_call.masks.not_kept = before[2]


FROM_COMPILED.add(Override.run_compiled.__code__)
