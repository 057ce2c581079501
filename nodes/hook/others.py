"""Who else computed attention of a model: counted, named and, under strict, refused.

What came to us is known. What did not is found by what happened in a model call, not by names of packs:

- an override on top of ours is replaced by an `OnTop` for the model call, which sees every call of the hook;
- a patch that replaces a block or an attention is called through a `Replaced`;
- a forward that is not the model's own runs in `watched`, whether of an attention module or of a block around some;
- a marked module whose forward made fewer calls than usual asks `Others.missed`: another override may have been put
  into its options inside the model call, all of ours may have been taken out of them, or its module's attention
  function was replaced; one that runs outside our model calls during a sampler's step asks `Others.ran_without_us`.

`Work` tells computing from skipping: patches that return what they are given, or what they kept from an earlier step,
compute no attention and count for nothing.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ...backends.config.names import MEASURED
from ...backends.report import BY_ANOTHER
from ...backends.values.errors import NoBackendError
from ..history import runs
from . import attention_modules, compiled, whose
from .attention_modules import current
from .roles import CROSS, SELF, Role

if TYPE_CHECKING:
    from .model_call import ModelCall
    from .run import Run

KEY = "attention_backends"
"""Where our override stands in `transformer_options`, beside ComfyUI's own key for it."""
OVERRIDE = "optimized_attention_override"
ON_TOP = "attention_backends_on_top"
"""The attribute of another pack's override that holds its `OnTop`, so that compiled graphs see the same object."""
NOT_KNOWN = "-"
"""Kind of mask of a call that did not come to us."""


class Others:
    """What others computed in one run, and where they stand."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._titles: dict[tuple[str, str, str], str] = {}
        self._habits: dict[Any, Habit] = {}
        self.on_top: Any = None
        """The override that stood on top of ours at the last model call; None where ours did."""
        self.at_start: Any = None
        """The override that was on the model when its sampler began; None where no sampler is known."""

    def habit(self, place: Any) -> Habit:
        """What is known of the function that others put at this place."""
        return self._habits.setdefault(place, Habit())

    def title(self, other: Any) -> str:
        """What a person calls the node behind a function."""
        key = whose.origin(other) if other is not None else ("", "", "")
        if key not in self._titles:
            self._titles[key] = whose.title_of(other, runs.queued(runs.executing()[0]))
        return self._titles[key]

    def stands(self, other: Any) -> str:
        """Where an override stands in the graph, as far as that is certain; empty else."""
        if other is self._run.override.foreign:
            selector = self._selector_below(other)
            return "before this node" if selector is None else f"and {self.title(selector)} before this node"
        if self.at_start is None:
            return "after this node" if whose.is_selector(other) else ""
        return "after this node" if self._was_there(other) else ""

    def _was_there(self, other: Any) -> bool:
        """Whether an override was on the model when the sampler began: one that a node puts there, not a callback."""
        return self.at_start is None or whose.origin(other) == whose.origin(self.at_start)

    def order(self, other: Any) -> str:
        """Which order of the nodes makes this node's choice hold; empty where none does."""
        title, selector = self.title(other), self._selector_below(other)
        if selector is not None:
            return f"put this pack's node in place of {self.title(selector)}, which stands before {title}"
        if not whose.is_selector(other) or not self._was_there(other):
            return ""
        return f"put this pack's node after {title} or in place of it"

    def _selector_below(self, other: Any) -> Any:
        """The choice of a kernel below another pack's override that ours is composed with, and that wins below it."""
        return whose.below(other, whose.is_selector) if other is self._run.override.foreign else None

    def around(self, options: dict[str, Any]) -> str:
        """Who stands around the whole model with a wrapper of its own that ComfyUI calls; empty where nobody does."""
        wrappers = options.get("wrappers") or {}
        found = wrappers.get("diffusion_model") or {}
        held = [one for name, several in found.items() if name != KEY for one in several]
        held += [self._run.function_wrapper] if self._run.function_wrapper is not None else []
        return ", ".join(dict.fromkeys(self.title(one) for one in held if whose.is_foreign(one, "comfy")))

    def _in_between(self, options: dict[str, Any]) -> Any:
        """What of another pack stands between our node and the model's modules, as far as it is known; None else."""
        wrappers = options.get("wrappers") or {}
        held = [self._run.function_wrapper]
        for kind in ("apply_model", "diffusion_model"):
            held += [one for name, several in (wrappers.get(kind) or {}).items() if name != KEY for one in several]
        for root in (marks.model for marks in self._run.marks()):
            held += [one for one in vars(root).values() if isinstance(one, types.FunctionType | types.MethodType)]
        return next((one for one in held if one is not None and whose.is_foreign(one, "comfy")), None)

    def watch(self, options: dict[str, Any]) -> dict[str, Any]:
        """Before a model call: see what others do in it. Returns what `options` held, to be put back."""
        before = {}
        installed = options.get(OVERRIDE)
        # In one step: on several cards another thread may ask meanwhile.
        self.on_top = None if installed is self._run.override else installed
        if self.on_top is not None:
            before[OVERRIDE] = installed
            options[OVERRIDE] = OnTop.of(installed)
        wrappers = options.get("wrappers") or {}
        if wrappers.get("diffusion_model") or set(wrappers.get("apply_model") or ()) - {KEY}:
            before["wrappers"] = wrappers
            inmost = {**(wrappers.get("diffusion_model") or {}), KEY: [self._inmost]}
            options["wrappers"] = {**wrappers, "diffusion_model": inmost}
        return before | _watch_patches(options)

    def _inmost(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Within all other wrappers of a model call, which may have put patches into its options."""
        options = kwargs.get("transformer_options")
        if options is None:
            options = next((one for one in args if isinstance(one, dict) and KEY in one), None)
        before = {} if options is None else _watch_patches(options)
        try:
            return executor(*args, **kwargs)
        finally:
            if before:
                options.update(before)

    def missed(
        self, scope: ModelCall, site: attention_modules.AttentionModule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """The forward of a marked module ended with fewer calls to us than it usually makes."""
        options = kwargs.get("transformer_options")
        if options is None:
            options = next((one for one in args if isinstance(one, dict) and KEY in one), {})
        elif KEY not in options and KEY in scope.options:  # somebody took out what comes from our node
            count(scope, self._in_between(scope.options), _role(site, scope.ordinal), max(site.most, 1))
            return
        other = options.get(OVERRIDE)
        if isinstance(other, OnTop):
            return  # it counts by itself
        if other is self._run.override or KEY not in options:
            homes = (type(marks.model).__module__ for marks in self._run.marks())
            other = _replaced_function(site) if any(map(site.is_at_home, homes)) else None
            if other is None:
                return  # the module has a branch without attention, or calls ComfyUI's function without options
        first = scope.ordinal
        for ordinal in range(first, max(site.most, first + 1)):
            count(scope, other, _role(site, ordinal))

    def ran_without_us(
        self, site: attention_modules.AttentionModule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A marked module ran in a sampler's step and in no model call of ours, maybe without our options."""
        options = kwargs.get("transformer_options")
        if not isinstance(options, dict) or KEY in options:
            return  # its calls come to us all the same
        tensor = next((one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)), None)
        if tensor is not None:
            other = self._in_between({})
            count(self._run.scope(tensor.device), other, _role(site, 0), max(site.most, 1), block=site.block)


def _watch_patches(options: dict[str, Any]) -> dict[str, Any]:
    """Put a stand-in in place of each patch that replaces something. Returns what is to be put back."""
    replace = options.get("patches_replace")
    if not isinstance(replace, dict) or not any(
        not isinstance(patch, Replaced) for patches in replace.values() for patch in patches.values()
    ):
        return {}
    options["patches_replace"] = {
        kind: {
            place: patch if isinstance(patch, Replaced) else Replaced(patch, kind, place)
            for place, patch in patches.items()
        }
        for kind, patches in replace.items()
    }
    return {"patches_replace": replace}


@contextmanager
def counted_elsewhere() -> Iterator[None]:
    """What another pack's override runs is counted for that: no watch around it looks at it too."""
    works = _works()
    works.append(None)
    try:
        yield
    finally:
        works.pop()


def count(scope: ModelCall, other: Any, role: Role, calls: int = 1, block: str | None = None) -> None:
    """Another pack computed calls of a role: into the account; once as a note.

    Raises:
        NoBackendError: a backend was named for this role, strictly.
    """
    run = scope.run
    title, choice = run.others.title(other), scope.choice(role)
    if block is None:
        block = scope.site.block if scope.site is not None else ""
    run.trace.categories[role.name] = role.category
    row = run.trace.row(role.name, block, BY_ANOTHER, choice.source, NOT_KNOWN, f"{title} computed it", choice.asked)
    row.member = title
    row.calls += calls
    scope.elsewhere += calls
    run.reached = True
    run.trace.another[title] = run.others.stands(other)
    if run.trace.ledger is not None:
        run.trace.ledger.not_repeated[f"{title} computed calls of role {role.name}; a repeat needs that node"] = None
    text = f"{title} computed attention of role {role.name} by itself"
    if choice.asked not in (None, MEASURED) and scope.session.settings.strict:
        remedy = run.others.order(other) or f"remove or bypass {title}"
        raise NoBackendError(
            f"{text}, but {choice.asked} was asked for strictly via {choice.source}\n"
            f"  what to do: {remedy}, or switch strict off"
        )
    order = run.others.order(other)
    run.note(f"{text}; {order}" if order else text)


class OnTop:
    """Stands in for another pack's override during a model call and counts what that computes without asking us."""

    def __init__(self, other: Callable[..., Any]) -> None:
        self.other = other

    @classmethod
    def of(cls, other: Callable[..., Any]) -> OnTop:
        """The stand-in of an override, the same one each time where the override can hold it."""
        found = getattr(other, "__dict__", {}).get(ON_TOP)
        if found is None:
            found = cls(other)
            try:
                setattr(other, ON_TOP, found)
            except (AttributeError, TypeError):  # a method, or an object with slots
                return found
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> OnTop:
        return self

    def __getattr__(self, name: str) -> Any:
        """`container_function`, where the other override has one; and whatever else it has."""
        if name in ("other", "__setstate__"):
            raise AttributeError(name)
        found = getattr(self.other, name)
        if name != "container_function":
            return found
        return lambda *args, **kwargs: self._counted(found, args, args, kwargs)

    def __call__(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return compiled.watched(self.other, func, args, kwargs)
        return self._counted(self.other, (func, *args), args, kwargs)

    def _counted(self, call: Callable[..., Any], given: tuple[Any, ...], args: Any, kwargs: dict[str, Any]) -> Any:
        scope = getattr(current, "scope", None)
        if scope is None:
            return call(*given, **kwargs)
        before, ordinal = scope.routed + scope.elsewhere, scope.ordinal
        tensors = args if len(args) > 1 else compiled.positional(args, dict(kwargs))
        q_len, kv_len = (getattr(one, "tensor", one).shape[-2] for one in tensors[:2])
        with counted_elsewhere():
            output = call(*given, **kwargs)
        if scope.routed + scope.elsewhere == before:
            count(scope, self.other, scope.role(ordinal, q_len, kv_len))
        scope.ordinal = ordinal + 1  # however often the other one calls, it is one call of the model
        return output


class Replaced:
    """Stands in for a patch that replaces a block or an attention during a model call."""

    def __init__(self, other: Callable[..., Any], kind: str, place: Any) -> None:
        self.other = other
        self.kind = kind
        self.place = place

    def __deepcopy__(self, memo: dict[int, Any]) -> Replaced:
        return self

    def __getattr__(self, name: str) -> Any:
        if name in ("other", "kind", "place", "__setstate__"):
            raise AttributeError(name)
        return getattr(self.other, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return compiled.traced_stranger(None, self.other, args, kwargs)
        scope = getattr(current, "scope", None)
        if scope is None:
            return self.other(*args, **kwargs)
        before = scope.routed + scope.elsewhere
        habit = scope.run.others.habit((self.kind, self.place))
        work = Work() if habit.is_looked_at() else None
        extra = next((one for one in args if isinstance(one, dict) and "original_block" in one), None)
        original = extra["original_block"] if extra is not None else None
        if original is not None and work is not None:
            args = tuple({**one, "original_block": work.without(original)} if one is extra else one for one in args)
        with work or nullcontext():
            output = self.other(*args, **kwargs)
        came = scope.routed + scope.elsewhere > before
        computed = habit.saw(work, came)
        if original is not None:
            if computed and not came:
                found = _sites_of(original, scope)
                if not found:
                    count(scope, self.other, SELF)
                for site in found:
                    for ordinal in range(max(site.most, 1)):
                        count(scope, self.other, _role(site, ordinal), block=site.block)
        elif computed:
            role = {"attn1": SELF, "attn2": CROSS}.get(self.kind, SELF)
            count(scope, self.other, role, block=_unet_block(args))
        return output


class Habit:
    """Whether a function of another pack always computes attention without calling us, so that few calls are watched.

    Only that: one whose calls came to us may compute later, and what keeps results for some steps alternates.
    """

    __slots__ = ("_alike", "_calls")

    def __init__(self) -> None:
        self._alike = 0
        self._calls = 0

    def is_looked_at(self) -> bool:
        """Whether the call that begins is watched: each one until it is known, then every eighth."""
        self._calls += 1
        return self._alike < ALIKE or self._calls % LOOK_EVERY == 0

    def saw(self, work: Work | None, came: bool) -> bool:
        """Whether attention was computed past us in the call that ended; `came`: some of its calls came to us."""
        computed = not came if work is None else work.attention if came else work.likely and not work.left
        self._alike = self._alike + 1 if computed and not came else 0
        return computed


ALIKE = 4
"""After so many calls in a row that another pack computed, only each `LOOK_EVERY`th is watched."""
LOOK_EVERY = 8


def watched(
    site: attention_modules.AttentionModule | None, forward: Callable[..., Any], module: torch.nn.Module
) -> Callable[..., Any]:
    """A forward that another pack put in place of a module's own, counting attention that it computes by itself.

    `site` is the module's; None for a block, whose forward others replace with the calls of the modules within.
    """

    stranger = Stranger(forward, module if site is None else None)
    handle = compiled.strangers.new(stranger)

    def run(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return compiled.traced_stranger(handle, forward, args, kwargs, of_block=site is None)
        scope = getattr(current, "scope", None)
        if scope is None:
            return forward(*args, **kwargs)
        before = scope.routed + scope.elsewhere
        rows = [] if site is not None else list(scope.run.trace.rows.values())
        calls = [row.calls for row in rows]
        habit = scope.run.others.habit(module)
        work = Work() if habit.is_looked_at() else None
        with work or nullcontext():
            output = forward(*args, **kwargs)
        if not habit.saw(work, scope.routed + scope.elsewhere > before):
            return output
        if site is None:
            ran = {(row.role, row.block) for row, made in zip(rows, calls, strict=True) if row.calls > made}
            ran |= {(row.role, row.block) for row in list(scope.run.trace.rows.values())[len(rows) :] if row.calls}
            for found in stranger.within():
                for ordinal in range(max(found.most, 1)):
                    role = _role(found, ordinal)
                    if (role.name, found.block) not in ran:
                        count(scope, forward, role, block=found.block)
            return output
        first = scope.ordinal
        for ordinal in range(first, max(site.most, first + 1)):
            count(scope, forward, _role(site, ordinal))
        scope.ordinal = max(site.most, first + 1)
        return output

    run.__name__ = getattr(forward, "__name__", "forward")
    return run


class Stranger:
    """A forward of another pack that stands in place of a module's own; `block`: that module, where it is a block."""

    def __init__(self, forward: Callable[..., Any], block: torch.nn.Module | None) -> None:
        self.forward = forward
        self._block = block

    def within(self) -> list[attention_modules.AttentionModule]:
        """The attention modules of the block."""
        parts = () if self._block is None else self._block.modules()
        return [found for part in parts if (found := attention_modules.site_of(part)) is not None]


def ran_in_graph(stranger: Stranger | None, modules: int) -> None:
    """Another pack's function ran in a compiled graph and asked us for nothing, or for the calls of few modules.

    Args:
        stranger: the forward; None for a patch of the present model call.
        modules: how many attention modules of its block made calls to us.
    """
    scope = getattr(current, "scope", None)
    if scope is None or (modules and stranger is not None and modules >= len(stranger.within())):
        return
    run, replace = scope.run, scope.options.get("patches_replace") or {}
    held = [stranger.forward] if stranger is not None else []
    if stranger is None:
        held = [patch.other for kind in replace.values() for patch in kind.values() if isinstance(patch, Replaced)]
    title = " or ".join(dict.fromkeys(map(run.others.title, held))) or run.others.title(None)
    if title in run.trace.unseen:
        return
    run.trace.unseen[title] = None
    text = f"{title} ran in the compiled model and may have computed attention by itself"
    if run.trace.ledger is not None:
        run.trace.ledger.not_repeated[f"{text}; a repeat needs that node"] = None
    asked = "only a part of the" if modules else "no"
    run.note(
        f"{title} ran in the compiled model and asked this node for {asked} attention; whether it computed any by "
        "itself is not seen there"
    )


def _works() -> list[Work | None]:
    """The watches of this thread, the inmost last; None where something in it counts what it runs by itself."""
    found: list[Work | None] | None = getattr(current, "works", None)
    if found is None:
        found = current.works = []
    return found


class Work(TorchDispatchMode):
    """Sees the operators that another pack's function runs, to tell whether it computes attention.

    Kernels that are called past torch's dispatcher still allocate their output through it.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions stay compiled inside."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self._product = False
        """A product of two activations, as attention makes, or a package's kernel; not only projections."""
        self._unfilled: dict[int, StorageWeakRef] = {}
        """Memory that was asked for and that no operator of torch has filled: maybe a kernel's output."""
        self.attention = False
        """Certainly attention, and not ours: a function for it, or weights by softmax and then a product with them."""
        self._weights = False
        self.left = False
        """The model's own block was called."""

    @property
    def likely(self) -> bool:
        """Whether attention may have been computed."""
        return self._product or bool(self._unfilled)

    def __enter__(self) -> Work:
        _works().append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _works().pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = _kinds.get(func)
        if kind is None:
            kind = _kinds[func] = _kind(func)
        if kind >= KERNEL:
            self._product = True
            if kind >= PRODUCT and not self.attention and _works()[-1] is self and not _is_ours(sys._getframe(1)):
                self.attention = kind == ATTENTION or (kind == PRODUCT and self._weights)
                self._weights = self._weights or kind == SOFTMAX
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if kind == MEMORY:
            if isinstance(output, torch.Tensor) and output.numel():
                storage = StorageWeakRef(output.untyped_storage())
                self._unfilled[storage.cdata] = storage
        elif self._unfilled and func in _filling:
            for filled in (*args[:1], *kwargs.values()):
                if isinstance(filled, torch.Tensor):
                    self._unfilled.pop(StorageWeakRef(filled.untyped_storage()).cdata, None)
        return output

    def without(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, run outside this watch: it is the model's own."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.left = True
            self.__exit__(None, None, None)
            try:
                return function(*args, **kwargs)
            finally:
                self.__enter__()

        run.__dict__["__wrapped__"] = function
        return run


NOTHING, MEMORY, KERNEL, PRODUCT, SOFTMAX, ATTENTION = range(6)
_kinds: dict[Any, int] = {}
_filling: set[Any] = set()
"""Operators that write into memory that they are given, of those in `_kinds`."""
_FILLING = ("copy_", "fill_", "zero_")
_NO_ATTENTION = frozenset({"mm", "gemm", "linear", "quantize", "dequantize", "rope", "norm", "layernorm", "rmsnorm"})
"""Words in the names of packages' operators for weights of few bits, positions and norms."""
_OURS = (f"{__package__}.hook_calls", "route")
"""The function through which every call that comes to us goes."""


def _kind(func: Any) -> int:
    """What an operator says about who runs it."""
    namespace, _, name = (func.name() if hasattr(func, "name") else str(func)).rpartition("::")
    base, _, overload = name.partition(".")
    if base in _FILLING or overload.endswith("out"):
        _filling.add(func)
    if any(word in name for word in ("scaled_dot_product", "attention", "attn")):
        return ATTENTION
    if "softmax" in name:
        return SOFTMAX
    if any(word in name for word in ("bmm", "matmul", "einsum")):
        return PRODUCT
    if name.startswith(("empty", "new_empty")):
        return MEMORY
    if namespace not in ("aten", "prim", "prims") and not _NO_ATTENTION & set(base.split("_")):
        return KERNEL
    return NOTHING


def _is_ours(frame: Any) -> bool:
    """Whether an operator runs for a call that came to us."""
    while frame is not None and frame.f_code not in _WATCHING:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == _OURS:
            return True
        frame = frame.f_back
    return False


_WATCHING = {Replaced.__call__.__code__, *(c for c in watched.__code__.co_consts if hasattr(c, "co_code"))}
"""Where a watch begins: what called it is not looked at."""


def _sites_of(original: Any, scope: ModelCall) -> list[attention_modules.AttentionModule]:
    """The attention modules of the block that a model's own function for one block runs."""
    cells = getattr(original, "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells if isinstance(_content(cell), torch.nn.Module)]
    return [
        site
        for module in held
        if id(module) not in scope.run.roots
        for part in module.modules()
        if (site := attention_modules.site_of(part)) is not None
    ]


def _role(site: attention_modules.AttentionModule, ordinal: int) -> Role:
    """The role of a call that did not come to us, so that its lengths are not known."""
    return site.role(ordinal, 0, 0)


def _replaced_function(site: attention_modules.AttentionModule) -> Any:
    """What stands in place of ComfyUI's attention functions in the module that defines a class; None without any."""
    module = sys.modules.get(site.class_module)
    for name, found in vars(module).items() if module is not None else ():
        named = "attention" in name or "attn" in name
        if named and isinstance(found, types.FunctionType) and whose.is_foreign(found, site.class_module):
            return found
    return None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _unet_block(args: tuple[Any, ...]) -> str:
    """The block of a UNet that a replaced attention is in, named as elsewhere in the account."""
    extra = args[-1] if args and isinstance(args[-1], dict) else {}
    place = extra.get("block")
    if not isinstance(place, tuple) or len(place) < 2:
        return ""
    return "middle_block.1" if place[0] == "middle" else f"{place[0]}_blocks.{place[1]}"
