"""Where attention calls come from: finds the modules that make them and marks each while its forward runs.

A module counts when its forward reaches one of ComfyUI's attention functions without going through another
module; that is read from its compiled code, once per class. A marked module tells the current thread's scope when
its forward begins and ends. The markers are the same objects in every run, and are on the model only during one.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from . import compiled
from .roles import Family, Role, block_of, family_of, guess, roles_at

current = threading.local()
"""`scope`: the scope of the model call that this thread is in, or None."""
_HOOKED_NAME = "optimized_attention"


class Site:
    """One attention module of one model: its path, the roles of its calls, its block."""

    __slots__ = ("__weakref__", "_module", "block", "handle", "mask_argument", "path", "roles")

    def __init__(self, module: torch.nn.Module, path: str, family: Family | None) -> None:
        self._module = weakref.ref(module)
        self.path = path
        self.block = block_of(path)
        self.roles = roles_at(family, path, type(module).__name__)
        self.mask_argument = family.mask_argument if family is not None else ""
        self.handle = compiled.sites.new(self)

    def role(self, ordinal: int, q_len: int, kv_len: int) -> Role:
        """The role of the call number `ordinal` (from 0) of this module's forward."""
        if self.roles:
            return self.roles[min(ordinal, len(self.roles) - 1)]
        return guess(self.path, q_len, kv_len)

    def preferred_attention(self) -> Any:
        """The function that the checkpoint asks for at this module, or None (ComfyUI 0.37 and newer)."""
        module = self._module()
        return getattr(getattr(module, "comfy_attention", None), "function", None)

    def wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, telling the current thread's scope that it runs; after an exception too.

        While torch traces it tells the call instead, see `compiled`: the thread's scope is no part of a graph.
        """
        handle = self.handle

        def marked(*args: Any, **kwargs: Any) -> Any:
            if is_dynamo_compiling():
                return compiled.traced_forward(handle, forward, args, kwargs)
            scope = getattr(current, "scope", None)
            if scope is None:
                return forward(*args, **kwargs)
            outer, ordinal = scope.site, scope.ordinal
            scope.site, scope.ordinal = self, 0
            try:
                return forward(*args, **kwargs)
            finally:
                scope.site, scope.ordinal = outer, ordinal

        if not self.mask_argument:
            return self._with_code_of_its_own(marked)

        def marked_with_mask(*args: Any, **kwargs: Any) -> Any:
            if is_dynamo_compiling():
                return marked(*args, **kwargs)
            scope = getattr(current, "scope", None)
            if scope is None:
                return forward(*args, **kwargs)
            outer, scope.mask_source = scope.mask_source, kwargs.get(self.mask_argument)
            try:
                return marked(*args, **kwargs)
            finally:
                scope.mask_source = outer

        return self._with_code_of_its_own(marked_with_mask)

    def _with_code_of_its_own(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with a code object for each class of module: torch counts recompilations by code object."""
        codes = _codes.setdefault(type(self._module()), {})
        own = codes.setdefault(function.__code__, function.__code__.replace())
        return types.FunctionType(own, globals(), function.__name__, None, function.__closure__)


_codes: weakref.WeakKeyDictionary[type, dict[types.CodeType, types.CodeType]] = weakref.WeakKeyDictionary()


class Mark:
    """Stands in for one module's `forward` until every run that uses it has removed it.

    One mark serves all runs on a module: with two of them, the run that ends first would leave the other's for good.
    A stand-in rather than a pair of forward hooks: a module with hooks takes torch's slow path at every call.
    """

    __slots__ = ("_before", "_marked", "_module", "_users")

    def __init__(self, module: torch.nn.Module, site: Site) -> None:
        self._module = module
        self._users = 0
        self._before = module.__dict__.get("forward")
        self._marked = site.wrap(module.forward)
        module.__dict__["forward"] = self._marked

    @classmethod
    def on(cls, module: torch.nn.Module, site: Site) -> Mark:
        """The mark of a module, made by the first run that wants it."""
        with _marks_lock:
            mark = _marks.get(module)
            if mark is None:
                mark = _marks[module] = cls(module, site)
            mark._users += 1
            return mark

    def remove(self) -> None:
        """After the last run: put back what was there; leave alone what somebody else has put in our place since."""
        with _marks_lock:
            self._users -= 1
            if self._users:
                return
            del _marks[self._module]
            if self._module.__dict__.get("forward") is not self._marked:
                return
            if self._before is None:
                del self._module.__dict__["forward"]
            else:
                self._module.__dict__["forward"] = self._before


_marks: dict[torch.nn.Module, Mark] = {}
_marks_lock = threading.Lock()


def role_at(site: Site | None, ordinal: int, q_len: int, kv_len: int) -> Role:
    """The role of the current call; guessed where no marked module is running."""
    return site.role(ordinal, q_len, kv_len) if site is not None else guess("", q_len, kv_len)


def current_scope() -> Any:
    """The scope of the model call that this thread is in, or None."""
    return getattr(current, "scope", None)


def set_scope(scope: Any) -> Any:
    """Make `scope` the current one of this thread; return the one before."""
    previous = getattr(current, "scope", None)
    current.scope = scope
    return previous


_sites: weakref.WeakKeyDictionary[torch.nn.Module, Site] = weakref.WeakKeyDictionary()


def family_of_model(diffusion_model: torch.nn.Module) -> Family | None:
    """The family of a diffusion model, compiled or not; None when the role table does not know it."""
    model = getattr(diffusion_model, "_orig_mod", diffusion_model)
    return family_of(tuple(base.__name__ for base in type(model).__mro__))


def attach(diffusion_model: torch.nn.Module) -> list[Mark]:
    """Mark every attention module of a model; each mark is removed by its `remove`."""
    model = getattr(diffusion_model, "_orig_mod", diffusion_model)
    family = family_of_model(model)
    marks = []
    for name, module in model.named_modules():
        if name and makes_attention_calls(module):
            path = name.replace("._orig_mod", "")
            site = _sites.get(module)
            if site is None or site.path != path:
                site = _sites[module] = Site(module, path, family)
            marks.append(Mark.on(module, site))
    return marks


def blocks_of(diffusion_model: torch.nn.Module) -> tuple[str, ...]:
    """The blocks of a model that have attention modules, each once, in the model's order."""
    model = getattr(diffusion_model, "_orig_mod", diffusion_model)
    paths = (name.replace("._orig_mod", "") for name, module in model.named_modules() if makes_attention_calls(module))
    return tuple(dict.fromkeys(block for path in paths if (block := block_of(path))))


_by_class: weakref.WeakKeyDictionary[type, dict[tuple[type, ...], bool]] = weakref.WeakKeyDictionary()


def makes_attention_calls(module: torch.nn.Module) -> bool:
    """True when the module's own forward calls ComfyUI's attention, judged from its code, once per kind."""
    # One class can hold different processors (ACE-Step: linear attention and softmax attention).
    held = tuple(type(value) for value in module.__dict__.values() if callable(value))
    known = _by_class.setdefault(type(module), {})
    if held not in known:
        known[held] = any(_reads_attention(code) for code in _reachable_code(module))
    return known[held]


def _reads_attention(code: types.CodeType) -> bool:
    return any(name.startswith(_HOOKED_NAME) for name in code.co_names)


def _reachable_code(module: torch.nn.Module) -> Iterator[types.CodeType]:
    """Code of forward and of what it calls: own methods, functions of its package, callables it holds."""
    package = type(module).__module__.partition(".")[0]
    pending: list[Any] = [type(module).forward]
    seen: set[types.CodeType] = set()
    while pending:
        function = _plain_function(pending.pop())
        if function is None or function.__code__ in seen:
            continue
        codes = [function.__code__]
        for code in codes:
            seen.add(code)
            yield code
            codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        for name in {name for code in codes for name in code.co_names}:
            held = module.__dict__.get(name)
            found = held if held is not None else getattr(type(module), name, None) or function.__globals__.get(name)
            if found is not None and str(getattr(found, "__module__", "")).partition(".")[0] == package:
                pending.append(found)


def _plain_function(found: Any) -> types.FunctionType | None:
    """The function behind a method, a decorated function or a callable object; None for classes and modules."""
    if isinstance(found, (type, torch.nn.Module)):
        return None
    if not isinstance(found, (types.FunctionType, types.MethodType)):
        found = type(found).__call__ if callable(found) else None
    found = getattr(found, "__func__", found)
    found = getattr(found, "__wrapped__", found)
    return found if isinstance(found, types.FunctionType) else None
