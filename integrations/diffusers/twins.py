"""Twins of processors' functions: the same code, with globals in which attention calls lead to `calls.py`.

Diffusers' processors call `dispatch_attention_fn`, which 59 of its files import by name, or
`torch.nn.functional.scaled_dot_product_attention`. A twin shares the code object of the original function and has
another dictionary of globals, so that neither the module nor anything else that uses it changes.
"""

from __future__ import annotations

import dis
import inspect
import threading
from collections.abc import Iterator, Mapping
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as functional

from . import calls

DISPATCH = "dispatch_attention_fn"
SDPA = "scaled_dot_product_attention"
INTERFACES = "ALL_ATTENTION_FUNCTIONS"
"""In transformers 5, whose models are text encoders: the table of attention functions, SDPA's among them."""
_lock = threading.RLock()


def names_of(code: CodeType) -> Iterator[str]:
    """Names that a function's code uses, with those of functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_of(constant)


def reaches_attention(function: Any, seen: frozenset[CodeType] = frozenset()) -> bool:
    """Whether a Python function makes attention calls: itself, in a function of its module, or one that it wraps."""
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return False
    names = set(names_of(function.__code__))
    if DISPATCH in names or SDPA in names or {INTERFACES, "get_interface"} <= names:
        return True
    seen |= {function.__code__}
    own = function.__globals__
    helpers = (own[name] for name in names if isinstance(own.get(name), FunctionType))
    inside = (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
    return any(
        reaches_attention(other, seen) for other in (*(one for one in helpers if one.__globals__ is own), *inside)
    )


def _is_filled(cell: CellType) -> bool:
    try:
        return bool(cell.cell_contents) or True
    except ValueError:
        return False


class _Space:
    """The globals of twins from one module: a copy of the module's, with ours for what calls attention."""

    def __init__(self, source: dict[str, Any]) -> None:
        self.source = source
        self.names: dict[str, Any] = {}
        self.used: dict[str, Any] = {}
        """What the twins' code names, with the values that were copied."""
        self._seen: dict[str, Any] = {}
        self.renew()

    def renew(self) -> None:
        """Copy the module's globals again if they have changed."""
        source, seen = self.source, self._seen
        if len(source) == len(seen) and all(seen.get(name, self) is value for name, value in source.items()):
            return
        self._seen = dict(source)
        made = {name: self._replaced(name, value) for name, value in source.items() if name != "__name__"}
        # Without `__name__`, by which torch.compile would look globals up in the original module.
        self.names.update(made)
        self.used = {name: source.get(name, self) for name in self.used}

    def _replaced(self, name: str, value: Any) -> Any:
        if name == DISPATCH and callable(value):
            return calls.routed(value, bshd=True)
        if name == INTERFACES and hasattr(value, "get_interface"):
            return _RoutedInterfaces(value)
        if value is functional:
            return _functional()
        if value is torch and self._reads_torch():
            return _torch()
        if value is functional.scaled_dot_product_attention:
            return calls.routed(value, bshd=False)
        if isinstance(value, FunctionType) and value.__globals__ is self.source and reaches_attention(value):
            return self.twin(value)
        return value

    def _reads_torch(self) -> bool:
        """Whether the module's functions spell out `torch.nn.functional.scaled_dot_product_attention`."""
        kinds = [value for value in self.source.values() if isinstance(value, type)]
        functions = [*self.source.values(), *(method for kind in kinds for method in vars(kind).values())]
        return any(
            isinstance(function, FunctionType) and {"functional", SDPA} <= set(names_of(function.__code__))
            for function in functions
        )

    def twin(self, function: FunctionType) -> FunctionType:
        """The twin of a function of this module."""
        names = (name for name in names_of(function.__code__) if name in self._seen)
        self.used = {**self.used, **{name: self._seen[name] for name in names}}  # other threads read the old one
        return _with_globals(function, self.names)


def _with_globals(
    function: FunctionType, names: dict[str, Any], closure: tuple[CellType, ...] | None = None
) -> FunctionType:
    cells = function.__closure__ if closure is None else closure
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    made.__qualname__, made.__doc__, made.__module__ = function.__qualname__, function.__doc__, function.__module__
    made.__annotations__ = function.__annotations__
    if not hasattr(function, "__wrapped__"):
        # Modules of Diffusers read their processor's parameters in each forward, which takes 16 us more without this.
        made.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return made


class _RoutedInterfaces(Mapping[str, Any]):
    """transformers' table of attention functions, in which those that call SDPA are routed."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self._twins = {function: twin(function) for function in table.values() if reaches_attention(function)}

    def get_interface(self, name: Any, default: Any) -> Any:
        """The function that transformers gives, or its twin."""
        function = self._table.get_interface(name, default)
        return self._twins.get(function, function)

    def __getitem__(self, name: str) -> Any:
        function = self._table[name]
        return self._twins.get(function, function)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)


_spaces: dict[int, _Space] = {}
"""By the id of a module's globals, which the space keeps alive."""


def twin(function: FunctionType) -> FunctionType:
    """The twin of a function that reaches attention. A decorator's wrapper keeps its globals, and wraps a twin."""
    with _lock:
        inside = tuple(
            CellType(twin(cell.cell_contents)) if _is_filled(cell) and reaches_attention(cell.cell_contents) else cell
            for cell in function.__closure__ or ()
        )
        wraps = any(new is not old for new, old in zip(inside, function.__closure__ or (), strict=True))
        if wraps:
            return _with_globals(function, function.__globals__, inside)
        own = function.__globals__
        space = _spaces.get(id(own))
        if space is None:
            space = _spaces[id(own)] = _Space(own)
        return space.twin(function)


def renew() -> None:
    """Follow changes of the modules and classes whose functions have twins; before a model is patched."""
    with _lock:
        for space in list(_spaces.values()):
            space.renew()
        for kind, methods in list(_methods.items()):
            if any(getattr(kind, name, None) is not method for name, method in methods.items()):
                del _methods[kind]
                _classes.pop(kind, None)


class Sources:
    """What one model's stand-ins and twins were made from: tells whether another program has replaced any of it."""

    def __init__(self) -> None:
        self._methods: dict[tuple[type, str], Any] = {}
        self._added: set[tuple[Any, ...]] = set()

    def add(self, kind: type, *names: str) -> None:
        """Watch these methods of a class, and those that its subclass here has twins of."""
        if (kind, *names) in self._added:
            return
        self._added.add((kind, *names))
        found = {(kind, name): getattr(kind, name, None) for name in (*names, *_methods.get(kind, ()))}
        self._methods = {**self._methods, **found}  # other threads read the old one

    def are_current(self) -> bool:
        """Whether all are what they were; at each forward of the model."""
        for (kind, name), method in self._methods.items():
            if getattr(kind, name, None) is not method:
                return False
        for space in list(_spaces.values()):
            source = space.source
            for name, value in space.used.items():
                if source.get(name, space) is not value:
                    return False
        return True


def _copied(module: ModuleType, **replaced: Any) -> ModuleType:
    made = ModuleType(module.__name__, module.__doc__)
    made.__dict__.update({**vars(module), **replaced})
    return made


_modules: dict[str, ModuleType] = {}


def _functional() -> ModuleType:
    """`torch.nn.functional` with our attention."""
    if "functional" not in _modules:
        _modules["functional"] = _copied(functional, **{SDPA: calls.routed(getattr(functional, SDPA), bshd=False)})
    return _modules["functional"]


def _torch() -> ModuleType:
    """`torch` with our `torch.nn.functional`."""
    if "torch" not in _modules:
        _modules["torch"] = _copied(torch, nn=_copied(torch.nn, functional=_functional()))
    return _modules["torch"]


_classes: dict[type, dict[tuple[str, ...], type]] = {}
_methods: dict[type, dict[str, Any]] = {}
"""Of each class in `_classes`, its `forward` or `__call__`, and the methods that its subclasses have twins of."""


def methods_of(kind: type) -> dict[str, FunctionType]:
    """The methods of a class that make attention calls, without those of torch's."""
    found: dict[str, FunctionType] = {}
    hidden: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.nn.", "transformers.modeling_utils")) or base is object:
            continue
        for name, method in vars(base).items():
            if name in hidden or name in found:
                continue
            if name not in ("__init__", "__new__") and isinstance(method, FunctionType) and reaches_attention(method):
                found[name] = method
            hidden.add(name)
    return found


PRODUCTS = frozenset(("matmul", "bmm", "baddbmm", "einsum"))
OF_TORCH = frozenset(("multi_head_attention_forward", "flex_attention"))


def computes_attention(kind: type) -> bool:
    """Whether the `forward` of a module's class computes attention in ways that no twin reaches.

    That is a softmax between products of matrices, or torch's multi-head and flex attention.
    """
    if issubclass(kind, torch.nn.MultiheadAttention):
        return True
    forward = getattr(kind, "forward", None)
    function = inspect.unwrap(forward) if callable(forward) else None
    if not isinstance(function, FunctionType) or function.__module__.startswith("torch."):
        return False
    names = set(names_of(function.__code__))
    if "softmax" not in names:
        return bool(names & OF_TORCH)
    return bool(names & PRODUCTS) or any(step.argrepr == "@" for step in dis.get_instructions(function))


def subclass(kind: type, slots: tuple[str, ...] = (), properties: dict[str, property] | None = None) -> type:
    """A subclass with the twins of the methods that make attention calls, and the same name; one for each class."""
    with _lock:
        made = _classes.setdefault(kind, {})
        key = (*slots, *(properties or ()), "properties" if properties else "")
        if key not in made:
            methods = methods_of(kind)
            called = {name: getattr(kind, name) for name in ("forward", "__call__") if hasattr(kind, name)}
            _methods[kind] = {**called, **methods}
            body: dict[str, Any] = {name: twin(method) for name, method in methods.items()}
            body |= {"__slots__": slots, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
            if slots and getattr(kind, "__getattr__", None) is torch.nn.Module.__getattr__:
                body["__getattr__"] = _modules_first
            made[key] = type(kind)(kind.__name__, (kind,), body | (properties or {}))
        return made[key]


def _modules_first(view: torch.nn.Module, name: str) -> Any:
    """`Module.__getattr__` looks among parameters and buffers first; a processor reads eight submodules per call."""
    modules = view.__dict__["_modules"]
    return modules[name] if name in modules else torch.nn.Module.__getattr__(view, name)


def view_of(thing: Any, slots: tuple[str, ...] = (), properties: dict[str, property] | None = None) -> Any:
    """Another object with the attributes of `thing`, now and later, whose methods are twins.

    The two share one `__dict__`. `slots`: attributes that the view has for itself, unset; `properties`: others.
    """
    made: Any = object.__new__(subclass(type(thing), slots, properties))
    object.__setattr__(made, "__dict__", thing.__dict__)
    return made


def routed(processor: Any) -> Any | None:
    """A processor like this one whose attention calls are routed; None if it makes none that can be."""
    if isinstance(processor, FunctionType):
        return twin(processor) if reaches_attention(processor) else None
    if not methods_of(type(processor)) or not hasattr(processor, "__dict__"):
        return None
    return view_of(processor)
