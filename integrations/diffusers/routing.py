"""The routing of one model: its stand-ins, and the forward calls that they begin.

The stand-ins are on the model while it has an applied configuration or an open block (`chosen.py`), and are removed
with the last. A forward of the model in a thread without either is not routed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...backends.config import AttentionConfig
from ...backends.values.grid import TokenGrid
from ...backends.values.reasons import Reason
from . import calls, twins
from .chosen import Chosen, open_blocks
from .entries import ENTRIES, Entry
from .grids import GridOf, grid_finder, sizes_of
from .model_calls import ModelCall, current
from .roles import family_of
from .stand_ins import AttentionModule, remove, set_inside


class Routing:
    """The stand-ins of one model, and what is chosen for it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = getattr(model, "_orig_mod", model)
        self.root = model
        self.family = family_of(self.model)
        self.applied: Chosen | None = None
        self.users = 0
        self.blocks: tuple[str, ...] = ()
        self._modules: list[tuple[AttentionModule, Any]] = []
        self._entries: list[Entry] = []
        self._unknown: list[str] = []
        self._grids: dict[object, tuple[int, GridOf]] = {}
        self._local = threading.local()
        self.sources = twins.Sources()

    def use(self) -> None:
        """One more user: the first puts the stand-ins on the model; `use` of this module calls it."""
        self.users += 1
        if self.users > 1:
            return
        try:
            self._set()
        except BaseException:  # an interruption too
            self.users = 0
            self._remove()
            raise

    def release(self) -> None:
        """One user less: the last removes the stand-ins."""
        with _lock:
            self.users -= 1
            if self.users == 0:
                self._remove()

    def _set(self) -> None:
        twins.renew()
        self._unknown = []
        for path, module in attention_modules(self.model):
            path = path.replace("._orig_mod", "")
            found = AttentionModule(module, path, self.family, self)
            placed = set_inside(module, found)
            if placed is None:
                found.routing = None
                self._unknown.append(path)
            else:
                self._modules.append((found, placed[2]))
        self.blocks = tuple(dict.fromkeys(found.block for found, _ in self._modules if found.block))
        roots = [self.model] if self.root is self.model else [self.root, self.model]
        for module in roots:
            for name in ENTRIES:
                there = module.__dict__.get(name) is not None or (
                    name != "_compiled_call_impl" and callable(getattr(type(module), name, None))
                )
                if there and (module is not self.root or name in vars(module) or hasattr(type(module), name)):
                    entry = Entry(self, module, name)
                    entry.set()
                    self._entries.append(entry)

    def follow_sources(self) -> None:
        """Take what another program has put in place of functions and methods of Diffusers."""
        with _lock:
            if self.sources.are_current():
                return
            self.sources = twins.Sources()
            twins.renew()
            for found, _ in self._modules:
                found.make_views()
            for entry in self._entries:
                entry.follow()

    def _remove(self) -> None:
        for found, before in self._modules:
            found.routing = None
            remove(found.module, found, before)
        for entry in reversed(self._entries):
            entry.remove()
        self._modules.clear()
        self._entries.clear()

    def chosen(self) -> tuple[Chosen, ...]:
        """What holds for a forward that begins now in this thread, innermost block first."""
        blocks = open_blocks(self)
        return blocks if self.applied is None else (*blocks, self.applied)

    def begin(self, chosen: tuple[Chosen, ...], entry: Entry, args: Any, kwargs: Any) -> tuple[ModelCall, torch.device]:
        """A forward begins under these choices, the innermost of which has the run report."""
        given = entry.given(args, kwargs)
        device = _device_of(given.values()) or _device_of(self.model.parameters()) or torch.device("cpu")
        return chosen[0].run(_layers_of(chosen), _scheduler(chosen)).begin(device, given), device

    def run_compiled(
        self, module: AttentionModule, ordinal: int, host: Callable[[], torch.Tensor], is_divided: bool, *call: Any
    ) -> torch.Tensor:
        """An attention call in a compiled graph: part of this thread's forward call, or the start of one.

        Where the whole model was compiled after its stand-ins were set, its forward is in the graph: the first module
        that calls begins a forward then.
        """
        model_call = current()
        inside = model_call is not None and model_call.routing is self
        if not inside:
            chosen = self.chosen()
            if not chosen:
                return host()
            model_call = self._in_graph(chosen, module, ordinal, call[0])
        assert model_call is not None  # noqa: S101
        divider = model_call.run.session(call[0].device).divider
        if divider is not None:
            divider.turn_off(Reason("cards.compiled"))
        outer, before = model_call.module, model_call.ordinal
        model_call.module, model_call.ordinal = module, ordinal
        try:
            if is_divided:
                return calls.run_divided(model_call, host, module.processor._parallel_config, *call)
            return calls.run(model_call, host, *call)
        finally:
            model_call.module, model_call.ordinal = outer, before

    def _in_graph(
        self, chosen: tuple[Chosen, ...], module: AttentionModule, ordinal: int, query: torch.Tensor
    ) -> ModelCall:
        known = getattr(self._local, "in_graph", None)
        first, model_call = known if known is not None else (None, None)
        if model_call is None or model_call.run.is_over or first == (module.path, ordinal) or \
                model_call.run.routing.chosen()[:1] != chosen[:1]:  # fmt: skip
            if model_call is not None and not model_call.run.is_over:
                model_call.run.end(model_call, query.device)
            model_call = chosen[0].run(_layers_of(chosen), _scheduler(chosen)).begin(query.device, {})
            self._local.in_graph = (module.path, ordinal), model_call
        return model_call

    def grids(self, given: dict[str, Any]) -> tuple[GridOf | None, int]:
        """The token grids of a forward with these arguments, and their number; (None, 0) where they do not tell."""
        shapes = tuple((name, tuple(value.shape)) for name, value in given.items() if isinstance(value, torch.Tensor))
        key = (shapes, str(given.get("img_shapes")), *(given.get(name) for name in ("num_frames", "height", "width")))
        found = self._grids.get(key)
        if found is None:
            sizes = sizes_of(self.model, self.family, given)
            found = (0, _no_grid) if sizes is None else (len(self._grids) + 1, grid_finder(self.family, sizes))
            self._grids[key] = found
        return found[1], found[0]

    def forget_plans(self) -> None:
        """Drop the modules' last plans, which hold the sessions of a run; another thread's run plans anew."""
        for found, _ in self._modules:
            found.last[:] = [None] * len(found.last)

    def lost_entry(self) -> str:
        """That another program replaced the model's forward after the stand-in was set, in words; empty if not."""
        lost = any(entry.name == "forward" and not entry.is_in_place() for entry in self._entries)
        return f"the forward of {type(self.model).__name__}, which was replaced since" if lost else ""

    def not_reached(self) -> str:
        """What of the model's attention is not routed, in words; empty if that is nothing."""
        parts = []
        manual = sorted({type(found.processor).__name__ for found, _ in self._modules if not found.is_reached})
        if manual:
            parts.append(f"processors that compute attention by themselves: {', '.join(manual)}")
        others = sorted({name for found, _ in self._modules if (name := found.unrouted_implementation())})
        if others:
            parts.append(f"attention implementation {', '.join(others)}: set_attn_implementation('sdpa') is routed")
        kinds = {type(module) for module in self.model.modules()}
        by_hand = sorted(
            kind.__name__ for kind in kinds if twins.computes_attention(kind) and not twins.methods_of(kind)
        )
        if by_hand:
            parts.append(f"modules that compute attention by themselves: {', '.join(by_hand)}")
        if self._unknown:
            shown = ", ".join(self._unknown[:4]) + (" and others" if len(self._unknown) > 4 else "")
            parts.append(f"modules with a forward from elsewhere: {shown}")
        lost = [found.path for found, _ in self._modules if not found.is_in_place()]
        if lost:
            shown = ", ".join(lost[:4]) + (" and others" if len(lost) > 4 else "")
            parts.append(f"modules whose forward was replaced since: {shown}")
        known = {id(found.module) for found, _ in self._modules}
        new = [
            path for path, module in attention_modules(self.model)
            if id(module) not in known and path not in self._unknown
        ] if self.users else []  # fmt: skip
        if new:
            shown = ", ".join(new[:4]) + (" and others" if len(new) > 4 else "")
            parts.append(f"modules that were added since: {shown}")
        return "; ".join(parts)


def _layers_of(chosen: tuple[Chosen, ...]) -> tuple[AttentionConfig, ...]:
    """The configurations of all, highest first, each once."""
    if len(chosen) == 1:  # without hashing them, at each forward
        return chosen[0].layers
    return tuple(dict.fromkeys(layer for one in chosen for layer in one.layers))


def _scheduler(chosen: tuple[Chosen, ...]) -> Any:
    """The scheduler of the innermost that has one."""
    return next((scheduler for one in chosen if (scheduler := one.scheduler_of()) is not None), None)


def _no_grid(role: str, category: str, q_len: int) -> TokenGrid | None:
    return None


def attention_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The attention modules inside a model, with their paths, without processors that are modules (IP adapters)."""
    kinds: dict[type, bool] = {}
    for path, module in model.named_modules():
        if module is not model and path.rpartition(".")[2] != "processor" and _makes_calls(module, kinds):
            yield path, module


def _makes_calls(module: torch.nn.Module, kinds: dict[type, bool]) -> bool:
    """Whether a module is an attention module: it has a processor, or its own methods make attention calls.

    `kinds`: a cache: class -> whether its methods make attention calls.
    """
    own = module.__dict__
    processor = own.get("processor")
    if processor is None:
        processor = own.get("_modules", {}).get("processor")
    if processor is not None:
        return callable(processor)
    kind = type(module)
    if kind not in kinds:
        kinds[kind] = bool(twins.methods_of(kind))
    return kinds[kind]


def _device_of(values: Any) -> torch.device | None:
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return value[0].device
    return None


_routings: weakref.WeakValueDictionary[int, Routing] = weakref.WeakValueDictionary()
_lock = threading.RLock()
"""For `_routings`, and for stand-ins that are set or removed."""


def routing_of(model: torch.nn.Module) -> Routing | None:
    """The routing of a model, None if it has none; its stand-ins keep it alive."""
    with _lock:
        return _routings.get(id(getattr(model, "_orig_mod", model)))


def use(model: torch.nn.Module) -> Routing:
    """The routing of a model, with one user more: until `Routing.release`."""
    key = id(getattr(model, "_orig_mod", model))
    with _lock:  # else a second thread could make another one before this has its first user
        found = _routings.get(key)
        if found is None or not found.users:
            found = _routings[key] = Routing(model)
        found.use()
        return found
