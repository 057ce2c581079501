"""What is chosen for one model: configurations that are applied, `with` blocks, and the stand-ins that serve both.

The stand-ins are on the model while it has an applied configuration or an open block, and are removed with the last.
A forward of the model in a thread without either is not routed.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from ...backends.config import AttentionConfig
from ...backends.context import add_up
from ...backends.report import RunReport
from ...backends.values.grid import TokenGrid
from ...backends.values.reasons import Reason
from . import calls, twins
from .grids import GridOf, grid_finder, sizes_of
from .model_calls import ModelCall, current
from .roles import family_of
from .runs import Run
from .stand_ins import AttentionModule, get, is_ours, put, remove, set_inside, stand_in

ENTRIES = ("forward", "encode", "decode", "_compiled_call_impl")
"""Methods by which a model is called; the last is what `model.compile()` sets."""

_blocks: ContextVar[tuple[Chosen, ...]] = ContextVar("attention_backends_diffusers", default=())


class Chosen:
    """One configuration for one model: applied, or of a `with` block."""

    def __init__(self, routing: Routing, layers: tuple[AttentionConfig, ...], scheduler: Any) -> None:
        self.routing = routing
        self.layers = layers
        self.scheduler = scheduler
        self.is_open = True
        self._runs: dict[int, Run] = {}
        self._lock = threading.Lock()

    def run(self, layers: tuple[AttentionConfig, ...]) -> Run:
        """This thread's run; a new one after the scheduler's `set_timesteps`."""
        thread = threading.get_ident()
        run = self._runs.get(thread)
        if run is None or run.layers != layers or not run.is_of(self.scheduler):
            if run is not None:
                run.close()
            with self._lock:
                run = self._runs[thread] = Run(self.routing, layers, self.scheduler)
                run.run_report.bypass = self.routing.not_reached()
        return run

    def report(self) -> RunReport:
        """The run report of the latest run; of several threads, their calls added up."""
        with self._lock:
            runs = list(self._runs.values())
        for run in runs:
            run.settle()
        if not runs:
            return RunReport(layers=self.layers)
        reports = [run.run_report for run in runs]
        reports[0].bypass = self.routing.not_reached()
        if len(reports) == 1:
            return reports[0]
        total = RunReport(layers=self.layers)
        total.model, total.bypass, total.steps = reports[0].model, reports[0].bypass, reports[0].steps
        for report in reports:
            add_up(total, report)
            total.categories.update(report.categories)
            total.notes.update(report.notes)
            total.timeline.model_calls += report.timeline.model_calls
        return total

    def close(self) -> None:
        """End the runs."""
        self.is_open = False
        for run in list(self._runs.values()):
            run.close()


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
        outer = getattr(current, "model_call", None)
        if outer is not None and outer.run.routing is routing:  # one of its methods calls another
            return self.original(*args, **kwargs)
        chosen = routing.chosen()
        if not chosen:
            return self.original(*args, **kwargs)
        model_call, device = routing.begin(chosen, self, args, kwargs)
        current.model_call = model_call
        module, ordinal = model_call.module, model_call.ordinal
        try:
            return model_call.run.guarded(model_call, lambda: self.original(*args, **kwargs))
        finally:
            current.model_call = outer
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
        self._lock = threading.RLock()

    def use(self) -> None:
        """One more user: the first puts the stand-ins on the model."""
        with self._lock:
            self.users += 1
            if self.users == 1:
                self._set()

    def release(self) -> None:
        """One user less: the last removes the stand-ins."""
        with self._lock:
            self.users -= 1
            if self.users == 0:
                self._remove()

    def _set(self) -> None:
        twins.renew()
        self._unknown = []
        for path, module in self.model.named_modules():
            if module is self.model or not makes_calls(module):
                continue
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
        blocks = [block for block in reversed(_blocks.get()) if block.routing is self and block.is_open]
        return (*blocks, self.applied) if self.applied is not None else tuple(blocks)

    def begin(self, chosen: tuple[Chosen, ...], entry: Entry, args: Any, kwargs: Any) -> tuple[ModelCall, torch.device]:
        """A forward begins under these choices, the innermost of which has the run report."""
        given = entry.given(args, kwargs)
        device = _device_of(given.values()) or _device_of(self.model.parameters()) or torch.device("cpu")
        layers = tuple(layer for one in chosen for layer in one.layers)
        scheduler = next((one.scheduler for one in chosen if one.scheduler is not None), None)
        if chosen[0].scheduler is None:
            chosen[0].scheduler = scheduler
        run = chosen[0].run(tuple(dict.fromkeys(layers)))
        return run.begin(device, given), device

    def run_compiled(
        self, module: AttentionModule, ordinal: int, host: Callable[[], torch.Tensor], *call: Any
    ) -> torch.Tensor:
        """An attention call in a compiled graph: part of this thread's forward call, or the start of one.

        Where the whole model was compiled after its stand-ins were set, its forward is in the graph: the first module
        that calls begins a forward then.
        """
        model_call = getattr(current, "model_call", None)
        inside = model_call is not None and model_call.run.routing is self
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
            run = chosen[0].run(tuple(dict.fromkeys(layer for one in chosen for layer in one.layers)))
            model_call = run.begin(query.device, {})
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

    def not_reached(self) -> str:
        """What of the model's attention is not routed, in words; empty if that is nothing."""
        parts = []
        manual = sorted({type(found.processor).__name__ for found, _ in self._modules if not found.is_reached})
        if manual:
            parts.append(f"processors that compute attention by themselves: {', '.join(manual)}")
        if self._unknown:
            shown = ", ".join(self._unknown[:4]) + (" and others" if len(self._unknown) > 4 else "")
            parts.append(f"modules with a forward from elsewhere: {shown}")
        lost = [found.path for found, _ in self._modules if not found.is_in_place()]
        if lost:
            shown = ", ".join(lost[:4]) + (" and others" if len(lost) > 4 else "")
            parts.append(f"modules whose forward was replaced since: {shown}")
        known = {id(found.module) for found, _ in self._modules}
        new = [
            path
            for path, module in self.model.named_modules()
            if module is not self.model and id(module) not in known and path not in self._unknown
            and makes_calls(module)
        ] if self.users else []  # fmt: skip
        if new:
            shown = ", ".join(new[:4]) + (" and others" if len(new) > 4 else "")
            parts.append(f"modules that were added since: {shown}")
        return "; ".join(parts)


def _no_grid(role: str, category: str, q_len: int) -> TokenGrid | None:
    return None


def makes_calls(module: torch.nn.Module) -> bool:
    """Whether a module is an attention module: it has a processor, or its own methods make attention calls."""
    own = module.__dict__
    processor = own.get("processor")
    if processor is None:
        processor = own.get("_modules", {}).get("processor")
    if processor is not None:
        return callable(processor)
    return bool(twins.methods_of(type(module)))


def _device_of(values: Any) -> torch.device | None:
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return value[0].device
    return None


_routings: weakref.WeakValueDictionary[int, Routing] = weakref.WeakValueDictionary()
_routings_lock = threading.Lock()


def routing_of(model: torch.nn.Module, *, make: bool = False) -> Routing | None:
    """The routing of a model; its stand-ins keep it alive."""
    model = getattr(model, "_orig_mod", model) if not make else model
    key = id(getattr(model, "_orig_mod", model))
    with _routings_lock:
        found = _routings.get(key)
        if found is not None and (found.users or not make):
            return found
        if not make:
            return None
        found = _routings[key] = Routing(model)
        return found


def open_block(chosen: Chosen) -> None:
    """Begin a `with` block of this thread's context."""
    _blocks.set((*_blocks.get(), chosen))


def close_block(chosen: Chosen) -> None:
    """End it, wherever it is in the stack; a thread that copied the context sees it closed."""
    chosen.close()
    _blocks.set(tuple(block for block in _blocks.get() if block is not chosen and block.is_open))
