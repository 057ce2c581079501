"""Which methods of a module make attention calls: read from its code, or from the stack of a call.

Read from code: a method counts when it reaches one of ComfyUI's attention functions, or calls a function argument as
one calls attention, without going through another module. What code does not show, for example a function that is
taken out of a dictionary, is learnt from the first call: `caller` walks its stack.
"""

from __future__ import annotations

import ast
import dis
import inspect
import sys
import textwrap
import threading
import types
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

HOOK_KEY = "optimized_attention_override"
"""The key by which ComfyUI's attention functions find an override: a function with it in its code asks the hook."""
HOOKED_NAME = "optimized_attention"
QUERY_KEY_VALUE = 3
"""A function argument counts as attention if it is called with at least this many positional arguments."""
MOST_FRAMES = 200
"""How far up the stack a call's module is looked for."""
FROM_COMPILED: set[types.CodeType] = set()
"""Our functions that a compiled graph calls; filled where they are defined."""

_OF_TORCH = frozenset(vars(torch.nn.Module)) - {"forward"}
"""Methods by which torch loads, saves, moves and prints a module: one that names attention there only keeps it."""
_UNKNOWN, _SELF = object(), object()

_by_class: weakref.WeakKeyDictionary[type, dict[tuple[Any, ...], tuple[str, ...]]] = weakref.WeakKeyDictionary()
_learnt: weakref.WeakKeyDictionary[type, tuple[str, ...]] = weakref.WeakKeyDictionary()
_handed: dict[types.CodeType, bool] = {}
_parsing = threading.Lock()


def calling_methods(module: torch.nn.Module) -> tuple[str, ...]:
    """Names of the methods through which others have this module make attention calls; empty for most modules."""
    kind = type(module)
    # One class can hold different processors (ACE-Step: linear attention and softmax attention).
    processors = tuple(
        (name, _identity(value))
        for name, value in module.__dict__.items()
        if callable(value) and not isinstance(value, torch.nn.Module)
    )
    known = _by_class.setdefault(kind, {})
    if processors not in known:
        known[processors] = _entries(module)
    learnt = _learnt.get(kind, ())
    return known[processors] + tuple(name for name in learnt if name not in known[processors])


def learn(module: torch.nn.Module, method: str) -> None:
    """Remember that modules of this class make attention calls in `method`, which a call has just shown."""
    kind = type(module)
    if method not in _learnt.get(kind, ()):
        _learnt[kind] = (*_learnt.get(kind, ()), method)


def _identity(value: Any) -> Any:
    function = _function_of(value)
    return type(value) if function is None else function.__code__


def _entries(module: torch.nn.Module) -> tuple[str, ...]:
    """The methods that reach attention, without those that only serve another one of them."""
    reaching: dict[str, set[str]] = {}
    for name in _methods(type(module)):
        reached, own = _reaches_attention(module, name)
        if reached:
            reaching[name] = own
    serving = {other for name, own in reaching.items() for other in own if other != name}
    return tuple(name for name in reaching if name not in serving)


def _methods(kind: type) -> Iterator[str]:
    seen = set()
    for base in kind.__mro__:
        if base is torch.nn.Module or base.__module__.partition(".")[0] == "torch":
            continue
        for name, value in base.__dict__.items():
            if name in _OF_TORCH or name.startswith("__"):
                continue
            if name not in seen and isinstance(value, types.FunctionType):
                seen.add(name)
                yield name


def _reaches_attention(module: torch.nn.Module, method: str) -> tuple[bool, set[str]]:
    """Whether a method of the module calls attention, and the module's own methods that it goes through."""
    package = type(module).__module__.partition(".")[0]
    pending: list[tuple[types.FunctionType, Any]] = [(f, module) for f in _definitions(type(module), method)]
    own: set[str] = set()
    seen: set[tuple[types.CodeType, int]] = set()
    reached = False
    while pending:
        function, owner = pending.pop()
        if (function.__code__, id(owner)) in seen:
            continue
        seen.add((function.__code__, id(owner)))
        if owner is module and _calls_what_it_is_handed(function):
            reached = True
        for name, found in _references(function, owner):
            if found is _SELF:
                own.update({name} if owner is module else ())
                attribute = getattr(owner, "__dict__", {}).get(name)
                called = (
                    _owned(attribute)
                    if attribute is not None
                    else [(f, owner) for f in _definitions(type(owner), name)]
                )
                reached = reached or any(_asks_the_hook(f.__code__) for f, _ in called)
                pending += called
            elif name.startswith(HOOKED_NAME):
                reached = True
            elif found is not _UNKNOWN:
                called = _owned(found)
                if any(_asks_the_hook(f.__code__) for f, _ in called):
                    reached = True
                elif str(getattr(found, "__module__", "")).partition(".")[0] in (package, "comfy"):
                    pending += called
    return reached, own


def _references(function: types.FunctionType, owner: Any) -> Iterator[tuple[str, Any]]:
    """What a function's code reads: (name, object) of functions, and (name, _SELF) of attributes of `self`.

    `owner` is what its first argument is, or None for a function that is no method.
    """
    first = function.__code__.co_varnames[0] if owner is not None and function.__code__.co_argcount else None
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
    codes = [function.__code__]
    for code in codes:
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        value: Any = _UNKNOWN
        for instruction in dis.get_instructions(code):
            name, argument = instruction.opname, instruction.argval
            if name in ("PUSH_NULL", "CACHE", "NOP", "EXTENDED_ARG", "PRECALL"):
                continue
            if name in ("LOAD_GLOBAL", "LOAD_NAME"):
                value = function.__globals__.get(argument, _UNKNOWN)
                if argument == "super" and owner is not None:
                    yield from ((attribute, _SELF) for attribute in code.co_names if attribute != "super")
                yield argument, value
            elif name.startswith("LOAD_FAST") or name == "LOAD_DEREF":
                argument = argument[-1] if isinstance(argument, tuple) else argument
                value = _SELF if argument == first else _UNKNOWN
                if name == "LOAD_DEREF" and value is _UNKNOWN and argument in cells:
                    value = _content(cells[argument])
                    yield argument, value
            elif name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD"):
                if value is _SELF or name.startswith("LOAD_SUPER"):
                    yield argument, _SELF
                    value = _UNKNOWN
                else:
                    value = getattr(value, argument, _UNKNOWN) if isinstance(value, types.ModuleType) else _UNKNOWN
                    yield argument, value
            else:
                value = _UNKNOWN


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return _UNKNOWN


def _definitions(kind: type, name: str) -> list[types.FunctionType]:
    """Every definition of a method along the class and its bases: one may call the next by `super`."""
    found = (base.__dict__.get(name) for base in kind.__mro__ if base is not torch.nn.Module)
    found = (value.fget if isinstance(value, property) else value for value in found)
    return [value for value in (getattr(value, "__func__", value) for value in found)
            if isinstance(value, types.FunctionType)]  # fmt: skip


def _owned(found: Any) -> list[tuple[types.FunctionType, Any]]:
    """The function that a call of `found` runs, with what its first argument then is; none for classes and modules."""
    if isinstance(found, (type, torch.nn.Module)):
        return []
    owner = None
    while isinstance(found, partial):
        found = found.func
    if isinstance(found, types.MethodType):
        owner, found = found.__self__, found.__func__
    elif not isinstance(found, types.FunctionType) and callable(found):
        owner, found = found, type(found).__call__
    if isinstance(owner, (type, torch.nn.Module)):
        owner = None
    functions = [found] if isinstance(found, types.FunctionType) else []
    inner = getattr(found, "__wrapped__", None)
    return [(f, owner) for f in functions + ([inner] if isinstance(inner, types.FunctionType) else [])]


def _function_of(found: Any) -> types.FunctionType | None:
    owned = _owned(found)
    return owned[0][0] if owned else None


def _asks_the_hook(code: types.CodeType) -> bool:
    """Whether this is the code of one of ComfyUI's attention functions."""
    return code.co_name.startswith(HOOKED_NAME) or HOOK_KEY in code.co_consts


def _calls_what_it_is_handed(function: types.FunctionType) -> bool:
    """Whether a method calls one of its parameters with query, key and value."""
    code = function.__code__
    if code not in _handed:
        _handed[code] = _reads_a_handed_call(function)
    return _handed[code]


def _parsed(source: str) -> ast.Module:
    """The tree of a source. Python 3.11 may raise SystemError where several threads parse, as those of two cards do.

    See https://github.com/python/cpython/issues/106905.
    """
    with _parsing:
        try:
            return ast.parse(source)
        except SystemError:  # the other thread is not ours
            return ast.parse(source)


def _reads_a_handed_call(function: types.FunctionType) -> bool:
    try:
        tree = _parsed(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, IndentationError):  # no source: the first call tells
        return False
    code = function.__code__
    handed = set(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in handed
        and len(node.args) >= QUERY_KEY_VALUE
        for node in ast.walk(tree)
    )


class Caller(NamedTuple):
    """Which module and method make the current attention call, from the stack."""

    module: torch.nn.Module | None
    """The innermost module that is running, if its own code makes the call; None if another pack's code does."""
    method: str
    """The method of it that others called."""
    preferred: Any
    """The call's argument `preferred_attention` (ComfyUI 0.37 and newer): a module, or None."""


NO_CALLER = Caller(None, "", None)
_OURS = __name__.rpartition(".")[0].rpartition(".")[0]
_CALLS = ("_call_impl", "_wrapped_call_impl", "__call__")
"""Functions of torch that run a module's forward."""


def caller() -> Caller:
    """Which module makes the attention call that is running on this thread's stack. For planning only: it is slow."""
    frames = _frames()
    preferred = None
    for index, frame in enumerate(frames):
        if frame.f_code.co_name.startswith(HOOKED_NAME) or HOOK_KEY in frame.f_code.co_consts:
            preferred, frames = _local(frame, "preferred_attention"), frames[index + 1 :]
            break
    module, method, packages = None, "", set()
    for frame in frames:
        code = frame.f_code
        first = _local(frame, code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, torch.nn.Module) and callable(getattr(type(first), code.co_name, None)):
            if module is not None and first is not module:
                break
            module, method = first, "forward" if code.co_name in _CALLS else code.co_name
        if module is None:
            packages.add(str(frame.f_globals.get("__name__", "")).partition(".")[0])
    if module is None or not packages <= {type(module).__module__.partition(".")[0], "comfy", "torch"}:
        return NO_CALLER._replace(preferred=preferred)
    return Caller(module, method, preferred)


def _frames() -> list[types.FrameType]:
    """The stack from the call outwards, without this package's; empty where the call comes from a compiled graph."""
    frames: list[types.FrameType] = []
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and len(frames) < MOST_FRAMES:
        if frame.f_globals.get("__name__", "").startswith(f"{_OURS}."):
            if frame.f_code in FROM_COMPILED:
                return []
        else:
            frames.append(frame)
        frame = frame.f_back
    return frames


def _local(frame: types.FrameType, name: str) -> Any:
    """A local variable of a running function, or None; no other local is kept alive."""
    if name not in frame.f_code.co_varnames:
        return None
    found = frame.f_locals
    value = found.get(name)
    if isinstance(found, dict) and found is not frame.f_globals:
        found.clear()  # before Python 3.13 a copy, which would hold every tensor of the function until it ends
    return value
