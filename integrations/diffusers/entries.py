"""The stand-ins of the methods by which a chosen model is called; of attention modules: `stand_ins.py`."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from .model_calls import current, set_current
from .stand_ins import StandIn, get, is_ours, put, remove, set_inside, stand_in

if TYPE_CHECKING:
    from .routing import Routing

ENTRIES = ("forward", "encode", "decode", "_compiled_call_impl")
"""Methods by which a model is called; the last is what `model.compile()` sets."""


class Entry(StandIn):
    """The stand-in for one method by which the model is called: makes a `ModelCall` current for the thread."""

    def __init__(self, routing: Routing, module: torch.nn.Module, name: str) -> None:
        self.routing: Routing | None = routing
        self.module = module
        self.name = name
        self.before = module.__dict__.get(name)
        self.is_inside = False
        self.original: Any = None
        self.signature: inspect.Signature | None = None
        self.follow()

    def follow(self) -> None:
        """Use the method that the class has now."""
        own = getattr(type(self.module), self.name, None)
        self.original = MethodType(own, self.module) if own is not None and self.before is None else self.before
        self.signature = None
        if self.routing is not None and own is not None:
            self.routing.sources.add(type(self.module), self.name)

    def set(self) -> None:
        """Put it on the model: inside the hooks that are known, else outside of everything."""
        if self.name == "forward":
            placed = set_inside(self.module, self)
            if placed is not None:
                *_, self.before = placed
                self.is_inside = True
                self.follow()
                return
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
        if not routing.sources.are_current():
            routing.follow_sources()
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Entry:
        """On a copy of the model it calls the class's own method."""
        made: Entry = super().__deepcopy__(memo)
        made.name, made.before, made.is_inside = self.name, None, False
        made.original = MethodType(getattr(type(made.module), self.name), made.module)
        return made
