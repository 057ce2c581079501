"""Where attention calls come from: the modules that make them, each marked while one of its methods makes calls.

Which modules those are, and through which of their methods, is in `callers.py`. A marked module sets itself in the
current thread's model call while such a method runs. The marks are on the model only during a run.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from . import callers, compiled, origins
from .callers import calling_methods
from .roles import Family, Role, block_of, family_of, guess, roles_at

current = threading.local()
"""`model_call`: the model call that this thread is in, or None."""


HOLDER = "comfy_attention"
"""The attribute in which a module of ComfyUI 0.37 and newer holds the checkpoint's preferred attention."""


class AttentionModule:
    """One attention module of one model: its path, the roles of its calls, its block."""

    __slots__ = (
        "__weakref__", "_module", "block", "class_module", "handle", "mask_argument", "most", "path", "preferred_at",
        "roles",
    )  # fmt: skip

    def __init__(self, module: torch.nn.Module, path: str, family: Family | None) -> None:
        self._module = weakref.ref(module)
        self.path = path
        self.block = block_of(path)
        self.roles = roles_at(family, path, type(module).__name__)
        self.mask_argument = family.mask_argument if family is not None else ""
        self.preferred_at = family.preferred_at if family is not None else ()
        self.class_module = type(module).__module__
        self.most = 0
        """Most calls that one forward made to us in the runs that are going on; 0 before the first."""
        self.handle = compiled.attention_modules.new(self)

    def role(self, ordinal: int, q_len: int, kv_len: int) -> Role:
        """The role of the call number `ordinal` (from 0) of one run of this module's method."""
        if self.roles:
            return self.roles[min(ordinal, len(self.roles) - 1)]
        return guess(self.path, q_len, kv_len)

    def is_of(self, module: torch.nn.Module) -> bool:
        """Whether this is that module's."""
        return self._module() is module

    def is_at_home(self, home: str) -> bool:
        """Whether its class belongs to the package of `home`, the Python module of the model's class."""
        return self.class_module.partition(".")[0] == home.partition(".")[0]

    def preferred_attention(self, ordinal: int, holder: Any = None) -> Any:
        """The function that the checkpoint asks for in a call of this module, or None (ComfyUI 0.37 and newer).

        Args:
            ordinal: the number of the call, from 0.
            holder: the module passed with the call; None if unknown, as in a compiled graph.
        """
        if holder is None:
            holder = self._holder(ordinal)
        return getattr(holder, "function", None)

    def _holder(self, ordinal: int) -> Any:
        """The module that holds the preference: this one, or the submodules that its family names, in order."""
        module = self._module()
        if self.preferred_at:
            for name in self.preferred_at[min(ordinal, len(self.preferred_at) - 1)].split("."):
                module = getattr(module, name, None)
            return getattr(module, HOLDER, None)
        if module is None or hasattr(module, HOLDER):
            return getattr(module, HOLDER, None)
        holders = []
        for one in module.modules():
            holder = getattr(one, HOLDER, None)
            if getattr(holder, "function", None) is not None:
                holders.append(holder)
        return holders[min(ordinal, len(holders) - 1)] if holders else None

    def wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method: while it runs, this is the running module of the model call; cleared after exceptions.

        While torch traces, it passes its handle instead (`compiled`): the thread's model call is not in the graph.
        """
        handle, method = self.handle, getattr(forward, "__name__", "")

        def marked(*args: Any, **kwargs: Any) -> Any:
            if is_dynamo_compiling():
                return compiled.traced_forward(handle, forward, args, kwargs)
            model_call = getattr(current, "model_call", None)
            if model_call is None:
                return self._without_model_call(forward, args, kwargs)
            outer, ordinal = model_call.attention_module, model_call.ordinal
            if outer is self:  # one of its methods calls another
                return forward(*args, **kwargs)
            model_call.attention_module, model_call.ordinal = self, 0
            try:
                output = forward(*args, **kwargs)
                if model_call.ordinal != self.most or not self.most:
                    self._unusual(model_call, args, kwargs)
                return output
            finally:
                model_call.attention_module, model_call.ordinal = outer, ordinal

        if not self.mask_argument:
            return self._with_code_of_its_own(marked, method)

        def marked_with_mask(*args: Any, **kwargs: Any) -> Any:
            if is_dynamo_compiling():
                return marked(*args, **kwargs)
            model_call = getattr(current, "model_call", None)
            if model_call is None:
                return marked(*args, **kwargs)
            outer, model_call.mask_source = model_call.mask_source, kwargs.get(self.mask_argument)
            try:
                return marked(*args, **kwargs)
            finally:
                model_call.mask_source = outer

        return self._with_code_of_its_own(marked_with_mask, method)

    def _without_model_call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The method runs outside our model calls; in a sampler's step, the run is notified."""
        output = forward(*args, **kwargs)
        run = getattr(current, "run", None)
        if run is not None:
            run.others.ran_without_us(self, args, kwargs)
        return output

    def _unusual(self, model_call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward made an unusual number of calls; if fewer, another pack may have computed them."""
        if model_call.ordinal > self.most:
            self.most = model_call.ordinal
        else:
            model_call.run.others.missed(model_call, self, args, kwargs)

    def _with_code_of_its_own(self, function: Callable[..., Any], method: str) -> Callable[..., Any]:
        """`function` with a code object for each class and method: torch counts recompilations by code object."""
        codes = _codes.setdefault(type(self._module()), {})
        own = codes.setdefault((function.__code__, method), function.__code__.replace())
        return types.FunctionType(own, globals(), function.__name__, None, function.__closure__)


_codes: weakref.WeakKeyDictionary[type, dict[tuple[types.CodeType, str], types.CodeType]] = weakref.WeakKeyDictionary()


class ForwardPatch:
    """Replaces the methods by which one module makes attention calls, until every run has removed it.

    One mark serves all runs on a module: with two, the run that ends first would leave the other's in place for ever.
    Replaced methods and not forward hooks: a module with hooks takes torch's slow path at every call, and hooks
    see `forward` alone.
    """

    __slots__ = ("_attention_module", "_home", "_marked", "_module", "_users")

    def __init__(self, module: torch.nn.Module, attention_module: AttentionModule | None, home: str) -> None:
        """`attention_module` is None for a block: only a forward that another pack replaced is watched.

        `home` is the Python module of the model's class.
        """
        self._module = module
        self._home = home
        self._attention_module = attention_module
        self._users = 0
        self._marked: dict[str, tuple[Any, Callable[..., Any]]] = {}
        """method -> (the entry in the module's `__dict__` before, our replacement)."""

    @classmethod
    def on(
        cls, module: torch.nn.Module, attention_module: AttentionModule | None, methods: tuple[str, ...], home: str
    ) -> ForwardPatch:
        """The patch of a module, made by the first run that needs it; counts this run as a user, and adds `methods`."""
        with _marks_lock:
            mark = _marks.get(module)
            if mark is None:
                mark = _marks[module] = cls(module, attention_module, home)
            mark._users += 1
            mark.cover(methods)
            return mark

    def cover(self, methods: tuple[str, ...]) -> None:
        """Replace these methods too."""
        own = self._module.__dict__
        for name in methods:
            if name not in self._marked:
                before = own.get(name)
                method = getattr(self._module, name)
                if origins.is_foreign(method, self._home):
                    from .stand_ins import watched  # which needs this module

                    method = watched(self._attention_module, method, self._module)
                own[name] = method if self._attention_module is None else self._attention_module.wrap(method)
                self._marked[name] = before, own[name]

    def stands(self) -> list[tuple[dict[str, Any], str, Any]]:
        """For each method: the module's `__dict__`, the name in it, and our replacement."""
        return [(self._module.__dict__, name, marked) for name, (_, marked) in self._marked.items()]

    def renew(self) -> None:
        """Replace again the methods that other code replaced during the run."""
        own = self._module.__dict__
        with _marks_lock:
            gone = tuple(name for name, (_, marked) in self._marked.items() if own.get(name) is not marked)
            for name in gone:
                del self._marked[name]
            self.cover(gone)

    def remove(self) -> None:
        """After the last run: restore the methods, except those that other code has replaced since."""
        with _marks_lock:
            self._users -= 1
            if self._users:
                return
            del _marks[self._module]
            own = self._module.__dict__
            for name, (before, marked) in self._marked.items():
                if own.get(name) is not marked:
                    continue
                if before is None:
                    del own[name]
                else:
                    own[name] = before


_marks: dict[torch.nn.Module, ForwardPatch] = {}
_marks_lock = threading.Lock()


def current_model_call() -> Any:
    """The model call that this thread is in, or None."""
    return getattr(current, "model_call", None)


def set_model_call(model_call: Any) -> Any:
    """Make `model_call` the current one of this thread; return the one before."""
    previous = getattr(current, "model_call", None)
    current.model_call = model_call
    return previous


_sites: weakref.WeakKeyDictionary[torch.nn.Module, AttentionModule] = weakref.WeakKeyDictionary()


def attention_module_of(module: torch.nn.Module) -> AttentionModule | None:
    """The attention module of a module that was marked at some time; None for others."""
    return _sites.get(module)


def family_of_model(diffusion_model: torch.nn.Module) -> Family | None:
    """The family of a diffusion model, compiled or not; None when the role table does not know it."""
    model = getattr(diffusion_model, "_orig_mod", diffusion_model)
    names: list[str] = []
    for base in type(model).__mro__:
        names += base.__name__, ".".join([*base.__module__.split(".")[-2:], base.__name__])
    return family_of(tuple(names))


class ForwardPatches(list[ForwardPatch]):
    """The marks of one model in one run."""

    def __init__(self, diffusion_model: torch.nn.Module) -> None:
        super().__init__()
        self.model = getattr(diffusion_model, "_orig_mod", diffusion_model)
        self.family = family_of_model(self.model)
        self._of: dict[torch.nn.Module, ForwardPatch] = {}
        self._models_own: dict[int, Any] = {}
        """Forwards of blocks that are the model's own, by id: each is checked once."""
        self.cover()

    def cover(self) -> None:
        """Mark every module known to make attention calls."""
        home = type(self.model).__module__
        for name, module in self.model.named_modules():
            methods = calling_methods(module) if name else ()
            if not methods and name and origins.is_foreign(type(module).forward, home):
                # A pack's module, or the class's forward replaced: it is an attention module by its place.
                methods = ("forward",) if roles_at(self.family, name, type(module).__name__) else ()
            if module in self._of:
                self._of[module].cover(methods)
            elif methods:
                attention_module = _attention_module_of(module, name.replace("._orig_mod", ""), self.family)
                attention_module.most = 0
                self._of[module] = mark = ForwardPatch.on(module, attention_module, methods, home)
                self.append(mark)
        self._around = self._blocks()
        self._cover_blocks()
        self._note_what_stands()

    def _blocks(self) -> list[torch.nn.Module]:
        """The modules that contain marked ones, without the model itself."""
        paths = {name for name, module in self.model.named_modules() if module in self._of}
        around = {path[:at] for path in paths for at, character in enumerate(path) if character == "."}
        return [module for name in around if (module := self.model.get_submodule(name)) not in self._of]

    def _cover_blocks(self) -> None:
        home, known = type(self.model).__module__, self._models_own
        for module in self._around:
            forward = module.__dict__.get("forward") or type(module).forward
            if known.get(id(forward)) is forward or module in self._of:
                continue
            if origins.is_foreign(forward, home):
                self._of[module] = mark = ForwardPatch.on(module, None, ("forward",), home)
                self.append(mark)
            else:
                known[id(forward)] = forward

    def _note_what_stands(self) -> None:
        """Store what `renew` compares at each model call; replacements are rare."""
        self._stands: list[tuple[dict[str, Any], str, Any]] = [
            (module.__dict__, "forward", module.__dict__.get("forward")) for module in self._around
        ]
        for mark in self:
            self._stands += mark.stands()
        kinds = {type(module) for module in self._around}
        self._forwards = [(kind, kind.forward) for kind in kinds]

    def renew(self) -> None:
        """Before another model call: replace again what other code has replaced since."""
        for own, name, value in self._stands:
            if own.get(name) is not value:
                break
        else:
            for kind, forward in self._forwards:
                if kind.forward is not forward:
                    break
            else:
                return
        for mark in self:
            mark.renew()
        self._cover_blocks()
        self._note_what_stands()

    def learn(self, caller: callers.Caller) -> AttentionModule | None:
        """The attention module of an unmarked module that makes a call; None if it is not part of this model.

        All modules of its class are marked from now on.
        """
        module = caller.module
        if module is None or module is self.model or module not in set(self.model.modules()):
            return None
        callers.learn(module, caller.method)
        self.cover()
        return _sites.get(module)


def patch_forwards(diffusion_model: torch.nn.Module) -> ForwardPatches:
    """Mark every attention module of a model; each mark is removed by its `remove`."""
    return ForwardPatches(diffusion_model)


def maker(model_call: Any) -> tuple[AttentionModule | None, Any]:
    """The attention module of the call that is being planned, and the module that holds its preferred attention or
    None.

    The running marked module, unless the stack shows that a module within it makes the call.
    """
    caller = callers.caller()
    if caller.module is None or (
        model_call.attention_module is not None and model_call.attention_module.is_of(caller.module)
    ):
        return model_call.attention_module, caller.preferred
    for patches in model_call.run.forward_patches():
        attention_module = patches.learn(caller)
        if attention_module is not None:
            return attention_module, caller.preferred
    return model_call.attention_module, caller.preferred


def _attention_module_of(module: torch.nn.Module, path: str, family: Family | None) -> AttentionModule:
    attention_module = _sites.get(module)
    if attention_module is None or attention_module.path != path:
        attention_module = _sites[module] = AttentionModule(module, path, family)
    return attention_module


def blocks_of(diffusion_model: torch.nn.Module) -> tuple[str, ...]:
    """The blocks of a model that have attention modules, each once, in the model's order."""
    model = getattr(diffusion_model, "_orig_mod", diffusion_model)
    paths = (name.replace("._orig_mod", "") for name, module in model.named_modules() if calling_methods(module))
    return tuple(dict.fromkeys(block for path in paths if (block := block_of(path))))
