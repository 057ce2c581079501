"""Stand-ins for `forward` on a chosen model and on each of its attention modules; `routing.py` sets and removes them.

A module's `forward` runs on a view of the module (`twins.view_of`): another object with the same `__dict__`, whose
`processor` is a routed view of the processor that the module has now. The module's own processor is untouched, so what
sets or reads processors (`load_ip_adapter`, `set_attn_processor`, `fuse_qkv_projections`, LoRA) works on the originals,
and a later one is followed at the next call.

Hooks of accelerate and of Diffusers replace `forward` too. Ours is put inside them, where the class's own `forward`
was, so that it stays when they are removed.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from ...backends.values.roles import Family, Role, block_of, guess, roles_at
from . import compiled, twins
from .model_calls import MOST_APART, CallPlan, current

if TYPE_CHECKING:
    from .routing import Routing

OLD_FORWARD = "_old_forward"
"""Where accelerate's hook keeps the forward that it calls."""


KEY = "_attention_backends"
"""Where a module has its `AttentionModule` while it has a stand-in: torch.compile reads it there."""


def _processor_in_graph(view: Any) -> Any:
    return view.__dict__[KEY].routed_processor


IN_GRAPH = {"processor": property(_processor_in_graph)}
"""torch.compile looks attributes of modules up in `__dict__`, where the processor is the model's own: not in a slot."""


class StandIn:
    """What a stand-in for a method of a module belongs to."""

    module: torch.nn.Module
    routing: Routing | None

    def __reduce__(self) -> Any:
        """A saved module has its class's method instead, and needs nothing of this package where it is loaded."""
        return SimpleNamespace, (), {"forward": _Saved(self.module, getattr(self, "name", "forward"))}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """On a copy of the module it calls the class's method."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.module, made.routing = copy.deepcopy(self.module, memo), None
        return made

    def is_in_place(self) -> bool:
        """Whether the module still has this stand-in for its `forward`."""
        return any(is_ours(get(*place), self) for place in holders(self.module))


class _Saved:
    """Is saved as the method of a module."""

    def __init__(self, *place: Any) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return getattr, self.place


class AttentionModule(StandIn):
    """One attention module of a chosen model, and the stand-in for its `forward`."""

    def __init__(self, module: torch.nn.Module, path: str, family: Family | None, routing: Routing | None) -> None:
        self.module = module
        self.own = module.__dict__
        self.path = path
        self.block = block_of(path)
        self.pattern = re.sub(r"\d+", "*", path)
        self.family = family
        self.routing = routing
        self.processor: Any = None
        """The processor that the view's one is a view of."""
        self.is_reached = True
        """Whether calls of the processor are routed."""
        self.roles: tuple[Role, ...] = ()
        self.last: list[CallPlan | None] = [None] * MOST_APART
        """Of each ordinal, the plan of the last call without a mask or an option, of any thread."""
        self.routed_processor: Any = None
        self.handle = compiled.attention_modules.new(self)
        self.make_views()

    def make_views(self) -> None:
        """Make the views of the module and of its processor, of their classes as they are now."""
        module = self.module
        self.original = MethodType(type(module).forward, module)
        self.view = twins.view_of(module, ("processor",))
        self.routed = MethodType(type(self.view).forward, self.view)
        view = twins.view_of(module, (), IN_GRAPH)
        self.traced = MethodType(type(view).forward, view)
        if self.routing is not None:
            self.routing.sources.add(type(module), "forward")
        self.follow()

    def follow(self) -> None:
        """Take the processor that the module has now."""
        processor = self.own.get("processor")
        if processor is None:
            processor = self.own["_modules"].get("processor")
        kinds = {"with_image"} if getattr(self.module, "add_k_proj", None) is not None else set()
        if type(processor).__name__.startswith("IPAdapter"):
            kinds = {"with_adapter"}
        self.roles = next((roles for kind in (*kinds, "") if (roles := roles_at(self.family, self.path, kind))), ())
        routed = None if processor is None else twins.routed(processor)
        if self.routing is not None and processor is not None:
            self.routing.sources.add(type(processor))
        self.is_reached = routed is not None or bool(twins.methods_of(type(self.module)))
        self.routed_processor = processor if routed is None else routed
        type(self.view).processor.__set__(self.view, self.routed_processor)
        self.processor = processor

    def unrouted_implementation(self) -> str:
        """The attention implementation of a module of transformers, where it is another than SDPA, which is routed."""
        name = getattr(getattr(self.module, "config", None), "_attn_implementation", None)
        return "" if self.processor is not None or name in (None, "sdpa") else str(name)

    def role(self, ordinal: int, q_len: int, kv_len: int) -> Role:
        """The role of the call number `ordinal` (from 0) of one forward of this module."""
        if self.roles:
            return self.roles[min(ordinal, len(self.roles) - 1)]
        return guess(self.path, q_len, kv_len)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's `forward` while the model is chosen; elsewhere what it was."""
        routing = self.routing
        if routing is None:
            return self._elsewhere(args, kwargs)
        if is_dynamo_compiling():
            return compiled.traced_forward(self.handle, self.traced, args, kwargs)
        processor = self.own.get("processor")
        if processor is None:
            processor = self.own["_modules"].get("processor")
        if processor is not self.processor:
            self.follow()
        model_call = current()
        if model_call is None or model_call.routing is not routing:
            return self.original(*args, **kwargs)
        outer, ordinal = model_call.module, model_call.ordinal
        model_call.module, model_call.ordinal = self, 0
        try:
            return self.routed(*args, **kwargs)
        finally:
            model_call.module, model_call.ordinal = outer, ordinal

    def _elsewhere(self, args: Any, kwargs: Any) -> Any:
        """Removed while another's hook kept it, or on a copy of the module: it goes where that is possible."""
        if not is_dynamo_compiling():
            remove(self.module, self, None)
        return type(self.module).forward(self.module, *args, **kwargs)


def stand_in(thing: Any) -> Callable[..., Any]:
    """The function that replaces a module's `forward`."""
    return thing.forward  # type: ignore[no-any-return]


def is_ours(value: Any, thing: Any) -> bool:
    """Whether a value is the stand-in of `thing`."""
    return isinstance(value, MethodType) and value.__self__ is thing


def routes_nothing(value: Any, module: torch.nn.Module) -> bool:
    """Whether a value is a stand-in that was removed while a hook kept it, or came with the module's copy."""
    thing = value.__self__ if isinstance(value, MethodType) else None
    if not isinstance(thing, StandIn):
        return False
    return thing.routing is None or not thing.routing.users or thing.module is not module


def get(holder: Any, name: str) -> Any:
    """The value at a place where a forward is kept: a module's `__dict__`, or Diffusers' reference to a function."""
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name)


def put(holder: Any, name: str, value: Any) -> None:
    """Set such a place; None removes the entry of a `__dict__`."""
    if not isinstance(holder, dict):
        setattr(holder, name, value)
    elif value is None:
        holder.pop(name, None)
    else:
        holder[name] = value


def holders(module: torch.nn.Module) -> list[tuple[Any, str]]:
    """The places where a module's forward is kept, from the outermost hook to the innermost.

    The last one is what no known hook of accelerate or Diffusers wraps.
    """
    found: list[tuple[Any, str]] = [(module.__dict__, "forward")]
    for _ in range(32):
        value = get(*found[-1])
        inner = _inside(module, value)
        if inner is None or inner in found:
            return found
        found.append(inner)
    return found


def _inside(module: torch.nn.Module, value: Any) -> tuple[Any, str] | None:
    """The place of the forward that a hook's function calls; None where it is no hook's that is known here."""
    if not isinstance(value, functools.partial):
        return None
    function = value.func
    home = getattr(function, "__module__", "") or ""
    code = getattr(function, "__code__", None)
    if code is None:
        function = getattr(function, "__func__", function)
    for cell in getattr(function, "__closure__", None) or ():
        reference = cell.cell_contents
        if type(reference).__name__ == "HookFunctionReference":
            name = "original_forward" if reference.original_forward is not None else "forward"
            return reference, name
    if home.startswith("accelerate.") and OLD_FORWARD in module.__dict__:
        return module.__dict__, OLD_FORWARD
    # accelerate copies names onto its partial's function, `__module__` among them.
    if OLD_FORWARD in module.__dict__ and "_hf_hook" in module.__dict__:
        return module.__dict__, OLD_FORWARD
    return None


def set_inside(module: torch.nn.Module, thing: Any) -> Any | None:
    """Put the stand-in of `thing` where the class's own `forward` was.

    Returns:
        (holder, name, value before), or None where the innermost forward is not the class's own.
    """
    holder, name = holders(module)[-1]
    before = get(holder, name)
    if routes_nothing(before, module):
        before = None
    elif before is not None and getattr(before, "__func__", None) is not type(module).forward:
        return None
    put(holder, name, stand_in(thing))
    if isinstance(thing, AttentionModule):
        module.__dict__[KEY] = thing
    return holder, name, before


def remove(module: torch.nn.Module, thing: Any, before: Any) -> None:
    """Take the stand-in of `thing` away wherever it is now, and put back what was there.

    Where a hook that is not known here keeps it, it stays and calls the class's own `forward`.
    """
    if module.__dict__.get(KEY) is thing:
        del module.__dict__[KEY]
    for holder, name in holders(module):
        if is_ours(get(holder, name), thing):
            keep = before is not None or holder is not module.__dict__ or name != "forward"
            put(holder, name, (before or MethodType(type(module).forward, module)) if keep else None)
