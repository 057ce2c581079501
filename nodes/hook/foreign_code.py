"""Finds code of other packs that runs inside a model call, between its attention calls.

A mask plan is kept from block to block only if no other code can write into the mask meanwhile, or make another one
from the same source. Looked for are replaced methods and modules, class patches, hooks, wrappers, replaced functions of
the model's own modules, and torch's modes; code of torch, ComfyUI and the model's own package is trusted.
"""

from __future__ import annotations

import functools
import re
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.modules import module as torch_module

ALLOWED = frozenset(
    {
        *("comfy", "comfy_aimdo", "comfy_api", "comfy_api_nodes", "comfy_execution", "comfy_extras", "comfy_kitchen"),
        *("nodes", "torch", "torchvision", "torchaudio", "triton", "einops", "numpy", "transformers", "safetensors"),
        *sys.stdlib_module_names,
    }
)
"""Packages whose code may be in any model: ComfyUI's own, and libraries that models are written with."""
NODE_FOLDER = "custom_nodes"
OUTSIDE_MODEL_CALLS = ("outer_sample", "prepare_sampling", "sampler_sample", "predict_noise", "calc_cond_batch", "on_")
"""How ComfyUI's kinds of wrappers and callbacks begin that do not run while the diffusion model does."""
LAYERS = ("Linear", "Embedding", "LayerNorm", "GroupNorm", "RMSNorm", "Conv1d", "Conv2d", "Conv3d")
"""Another pack's subclass of one of torch's that holds no module computes a layer, such as one of quantised weights."""
FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
OF_THE_COMPILER = ("__compiled_fn_", "__resume_at_")
"""How names begin that torch.compile adds to the module of a function: code that it made of that function."""


class ForeignCode:
    """The code of other packs in one diffusion model; searched once, and again after a change."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._found = ""
        self._is_known = False

    def found(self) -> str:
        """A description of the first code of another pack; empty if there is none."""
        if not self._is_known or self._changed():
            self._is_known = True
            self._found = self._look()
        return self._found

    def _changed(self) -> bool:
        """Whether a module got or lost a hook, an attribute or a module, or has another method than it had.

        A model has thousands of modules and this runs in each model call, so sizes are compared, not contents.
        """
        return (
            sum(map(len, self._sized)) != self._size
            or any(own.get(name) is not value for own, name, value in self._functions)
            or any(tuple(submodules.values()) != modules for submodules, modules in self._modules)
            or any(getattr(kind, "forward", None) is not forward for kind, forward in self._classes)
        )

    def _look(self) -> str:
        model = getattr(self._model, "_orig_mod", self._model)
        home = frozenset({package_of(type(model).__module__)})
        if not home & ALLOWED:  # a pack's own model, written with whatever packages
            home |= {package_of(type(module).__module__) for module in self._model.modules()}
        self._sized: list[Mapping[str, Any]] = []
        self._functions: list[tuple[dict[str, Any], str, Any]] = []
        self._modules: list[tuple[Mapping[str, Any], tuple[Any, ...]]] = []
        kinds: set[tuple[type, bool]] = set()
        found = ""
        for path, module in self._model.named_modules():
            own = module.__dict__
            hooks = [getattr(module, name) for name in HOOKS]
            self._sized += own, module._modules, *hooks
            if module._modules:
                self._modules.append((module._modules, tuple(module._modules.values())))
            kind = type(module)
            for name, value in own.items():
                if not callable(value) or isinstance(value, type):
                    continue
                if isinstance(value, FUNCTIONS) or hasattr(kind, name):
                    self._functions.append((own, name, value))
                    if not found and is_foreign(value, home):
                        found = f"{name} of {path or 'the model'} ({described(value)})"
            if (kind, bool(module._modules)) not in kinds:
                kinds.add((kind, bool(module._modules)))
                if not found and (module._modules or not _is_layer(kind)):
                    found = _foreign_class(kind, path, home)
            found = found or next(
                (f"a hook of {path or 'the model'} ({described(hook)})" for some in hooks for hook in some.values()
                 if is_foreign(hook, home)), ""
            )  # fmt: skip
        self._size = sum(map(len, self._sized))
        bases = dict.fromkeys(base for kind, _ in kinds for base in kind.__mro__ if base is not object)
        self._classes = [(kind, getattr(kind, "forward", None)) for kind, _ in kinds]
        return found or _foreign_methods(bases, home) or _foreign_functions(bases, home)


def in_a_call(options: Mapping[str, Any]) -> str:
    """Code of another pack that runs in a model call with these transformer options; empty if none does."""
    for kind, by_key in (*(options.get("wrappers") or {}).items(), *(options.get("callbacks") or {}).items()):
        if str(kind).startswith(OUTSIDE_MODEL_CALLS):
            continue
        for function in (one for several in by_key.values() for one in several):
            if is_foreign(function):
                return f"a wrapper ({described(function)})"
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        for hook in getattr(torch_module, name, {}).values():
            if is_foreign(hook):
                return f"a hook of all modules ({described(hook)})"
    for mode in _modes():
        if is_foreign(mode):
            return f"a mode of torch ({described(mode)})"
    return ""


def function_wrapper(model_options: Mapping[str, Any]) -> str:
    """Another pack's function that calls the model instead of ComfyUI and may change it meanwhile; or empty."""
    found = model_options.get("model_function_wrapper")
    return f"a function around the model ({described(found)})" if found is not None and is_foreign(found) else ""


def _modes() -> list[Any]:
    """The modes of torch through which every operation of this thread goes."""
    from torch import overrides
    from torch.utils import _python_dispatch

    stacks = (
        getattr(overrides, "_get_current_function_mode_stack", list),
        getattr(_python_dispatch, "_get_current_dispatch_mode_stack", list),
    )
    return [mode for stack in stacks for mode in stack()]


def _is_layer(kind: type) -> bool:
    return any(base.__module__.startswith("torch.nn.") and base.__name__ in LAYERS for base in kind.__mro__)


def _foreign_class(kind: type, path: str, home: frozenset[str]) -> str:
    """A module that another pack put into the model."""
    if _is_allowed(package_of(kind.__module__), home):
        return ""
    return f"the module {path or 'around the model'} ({kind.__module__}.{kind.__qualname__})"


def _foreign_methods(kinds: Mapping[type, Any], home: frozenset[str]) -> str:
    for kind in kinds:
        mine = home | {package_of(kind.__module__)}
        for name, value in vars(kind).items():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, FUNCTIONS) and is_foreign(function, mine):
                return f"{kind.__qualname__}.{name} ({described(function)})"
    return ""


def _foreign_functions(kinds: Mapping[type, Any], home: frozenset[str]) -> str:
    """Functions that another pack put into ComfyUI's modules of the model's classes, or into those that they use."""
    seen = {kind.__module__ for kind in kinds if package_of(kind.__module__) == "comfy"}
    pending = sorted(seen)
    while pending:
        name = pending.pop()
        module = sys.modules.get(name)
        for key, value in list(vars(module).items()) if module is not None else ():
            if not isinstance(value, FUNCTIONS) or key.startswith(OF_THE_COMPILER):
                continue
            if is_foreign(value, home | {package_of(name)}):
                return f"{key} of {name} ({described(value)})"
            used = _module_of(value)
            if used not in seen and used.startswith("comfy.ldm."):
                seen.add(used)
                pending.append(used)
    return ""


def is_foreign(value: Any, home: frozenset[str] = frozenset()) -> bool:
    """Whether a function, method or callable object has code of another pack; `home` are packages that may."""
    return any(not _is_allowed(package_of(_module_of(layer)), home) for layer in _layers(value))


def described(value: Any) -> str:
    """The name of the first part of a callable that is another pack's."""
    layers = list(_layers(value)) or [value]
    layer = next((one for one in layers if not _is_allowed(package_of(_module_of(one)), frozenset())), layers[0])
    return f"{_module_of(layer)}.{getattr(layer, '__qualname__', type(layer).__qualname__)}"


def _layers(value: Any) -> Iterator[Any]:
    """The Python functions and objects that a callable is made of, what it wraps included."""
    pending, seen = [value], set()
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, functools.partial):
            given = (*one.args, *one.keywords.values())
            pending += [one.func, *(argument for argument in given if isinstance(argument, FUNCTIONS))]
        elif isinstance(one, types.MethodType):
            pending.append(one.__func__)
        elif isinstance(one, types.FunctionType):
            yield one
            if hasattr(one, "__wrapped__"):
                pending.append(one.__wrapped__)
            if package_of(_module_of(one)) == OWN:
                pending += [argument for argument in _held(one) if callable(argument)]
        elif not isinstance(one, types.BuiltinFunctionType | type):
            yield one


def _held(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


def _module_of(value: Any) -> str:
    """Where the code is from: functools.wraps gives a function the module name of another one."""
    if isinstance(value, types.FunctionType):
        return str(value.__globals__.get("__name__", ""))
    return str(type(value).__module__)


@functools.lru_cache(maxsize=4096)
def package_of(module: str) -> str:
    """The package that a Python module belongs to; ComfyUI names the modules of nodes by their paths."""
    parts = [part for part in re.split(r"[/\\]", module) if part]
    if len(parts) < 2:
        return module.partition(".")[0]
    if NODE_FOLDER in parts[:-1]:
        return f"{NODE_FOLDER}/{parts[parts.index(NODE_FOLDER) + 1].partition('.')[0]}"
    return parts[-2] if parts[-2] in ALLOWED else module


OWN = package_of(__name__)
"""This package: its stand-ins count as what they replace."""


def _is_allowed(package: str, home: frozenset[str]) -> bool:
    return package in ALLOWED or package in home or package == OWN
