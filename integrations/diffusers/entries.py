"""The stand-ins of the methods by which a chosen model is called; of attention modules: `stand_ins.py`."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from .model_calls import current, set_current
from .stand_ins import get, is_ours, put, remove, set_inside, stand_in

if TYPE_CHECKING:
    from .routing import Routing

ENTRIES = ("forward", "encode", "decode", "_compiled_call_impl")
"""Methods by which a model is called; the last is what `model.compile()` sets."""


class Entry:
    """The stand-in for one method by which the model is called: makes a `ModelCall` current for the thread."""

    def __init__(self, routing: Routing, module: torch.nn.Module, name: str) -> None:
        self.routing: Routing | None = routing
        self.module = module
        self.name = name
        self.before = module.__dict__.get(name)
        self.is_inside = False
        own = getattr(type(module), name, None)
        self.original: Any = MethodType(own, module) if own is not None else self.before
        self.signature: inspect.Signature | None = None

    def set(self) -> None:
        """Put it on the model: inside the hooks that are known, else outside of everything."""
        if self.name == "forward":
            placed = set_inside(self.module, self)
            if placed is not None:
                *_, self.before = placed
                self.is_inside = True
                return
        if self.before is not None:
            self.original = self.before
        self.module.__dict__[self.name] = stand_in(self)

    def remove(self) -> None:
        """Take it away."""
        self.routing = None
        if self.is_inside:
            remove(self.module, self, self.before)
        elif is_ours(get(self.module.__dict__, self.name), self):
            put(self.module.__dict__, self.name, self.before)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The method, within a model call."""
        routing = self.routing
        if is_dynamo_compiling() or routing is None:
            return self.original(*args, **kwargs)
        outer = current()
        if outer is not None and outer.routing is routing:  # one of its methods calls another
            return self.original(*args, **kwargs)
        chosen = routing.chosen()
        if not chosen:
            return self.original(*args, **kwargs)
        model_call, device = routing.begin(chosen, self, args, kwargs)
        set_current(model_call)
        module, ordinal = model_call.module, model_call.ordinal
        try:
            return model_call.run.guarded(model_call, lambda: self.original(*args, **kwargs))
        finally:
            set_current(outer)
            model_call.module, model_call.ordinal = module, ordinal
            model_call.run.end(model_call, device)

    def given(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments by name."""
        if not args:
            return kwargs  # type: ignore[no-any-return]
        if self.signature is None:
            model = getattr(self.module, "_orig_mod", self.module)
            self.signature = inspect.signature(getattr(type(model), self.name, type(model).forward))
        names = [name for name in self.signature.parameters if name != "self"]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def __reduce__(self) -> Any:
        return _inert_entry, (self.module, self.name)


def _inert_entry(module: torch.nn.Module, name: str) -> Entry:
    """On a copy of the model it calls the class's own method."""
    made = Entry.__new__(Entry)
    made.routing, made.module, made.name, made.before, made.is_inside = None, module, name, None, False
    made.original = MethodType(getattr(type(module), name), module)
    return made
