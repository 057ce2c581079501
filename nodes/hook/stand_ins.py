"""Stand-ins for other packs' functions in a model call; each counts attention that does not go through our hook.

- an override on top of ours is replaced by an `OnTop` for the model call, which sees every call of the hook;
- a patch that replaces a block or an attention is called through a `Replaced`;
- a forward that is not the model's own runs in `watched`, whether of an attention module or of a block around some.

`operator_watch.py` tells computing from skipping: patches that return what they are given, or what they kept from an
earlier step, compute no attention and are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from ...backends.config.names import AUTOTUNE
from ...backends.report import BY_ANOTHER
from ...backends.values.errors import NoBackendError
from ...backends.values.reasons import Reason
from . import attention_modules, compiled
from .attention_modules import current
from .operator_watch import WATCHES, Work, counted_elsewhere
from .roles import CROSS, SELF, Role

if TYPE_CHECKING:
    from .model_call import ModelCall

ON_TOP = "attention_backends_on_top"
"""The attribute of another pack's override that holds its `OnTop`, so that compiled graphs see the same object."""
NOT_KNOWN = "-"
"""The mask kind of a call that did not reach our hook."""


def count(model_call: ModelCall, other: Any, role: Role, calls: int = 1, block: str | None = None) -> None:
    """Count calls of a role that another pack computed, with one note.

    Raises:
        NoBackendError: a backend was named for this role, strictly.
    """
    run = model_call.run
    title, choice = run.others.title(other), model_call.choice(role.name, role.category)
    if block is None:
        block = model_call.attention_module.block if model_call.attention_module is not None else ""
    run.run_report.categories[role.name] = role.category
    row = run.run_report.row(
        role.name, block, BY_ANOTHER, choice.source, NOT_KNOWN, Reason("another.it", pack=title), choice.asked
    )
    row.member = title
    row.calls += calls
    model_call.elsewhere += calls
    run.reached = True
    run.run_report.another[title] = run.others.stands(other)
    if run.run_report.recorder is not None:
        run.run_report.recorder.not_repeated[
            f"{title} computed calls of role {role.name}; a repeat needs that node"
        ] = None
    text = Reason("another.computed", pack=title, role=role.name)
    if choice.asked not in (None, AUTOTUNE) and model_call.session.settings.strict:
        remedy = run.others.order(other) or f"remove or bypass {title}"
        raise NoBackendError(
            f"{text}, but {choice.asked} was asked for strictly via {choice.source}\n"
            f"  what to do: {remedy}, or switch strict off"
        )
    order = run.others.order(other)
    run.note(Reason("another.ordered", text=text, order=order) if order else text)


class OnTop:
    """Replaces another pack's override during a model call and counts the calls that it does not pass to our hook."""

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
        """`container_function` and any other attribute of the other override."""
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
        model_call = getattr(current, "model_call", None)
        if model_call is None:
            return call(*given, **kwargs)
        before, ordinal = model_call.routed + model_call.elsewhere, model_call.ordinal
        tensors = args if len(args) > 1 else compiled.positional(args, dict(kwargs))
        q_len, kv_len = (getattr(one, "tensor", one).shape[-2] for one in tensors[:2])
        with counted_elsewhere():
            output = call(*given, **kwargs)
        if model_call.routed + model_call.elsewhere == before:
            count(model_call, self.other, model_call.role(ordinal, q_len, kv_len))
        model_call.ordinal = ordinal + 1  # one call of the model, for any number of calls of the other override
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
        model_call = getattr(current, "model_call", None)
        if model_call is None:
            return self.other(*args, **kwargs)
        before = model_call.routed + model_call.elsewhere
        habit = model_call.run.others.habit((self.kind, self.place))
        work = Work() if habit.is_looked_at() else None
        extra = next((one for one in args if isinstance(one, dict) and "original_block" in one), None)
        original = extra["original_block"] if extra is not None else None
        if extra is not None and original is not None and work is not None:
            args = tuple({**one, "original_block": work.without(original)} if one is extra else one for one in args)
        with work or nullcontext():
            output = self.other(*args, **kwargs)
        came = model_call.routed + model_call.elsewhere > before
        computed = habit.saw(work, came)
        if original is not None:
            if computed and not came:
                found = _attention_modules_of(original, model_call)
                if not found:
                    count(model_call, self.other, SELF)
                for attention_module in found:
                    for ordinal in range(max(attention_module.most, 1)):
                        count(model_call, self.other, role_of(attention_module, ordinal), block=attention_module.block)
        elif computed:
            role = {"attn1": SELF, "attn2": CROSS}.get(self.kind, SELF)
            count(model_call, self.other, role, block=_unet_block(args))
        return output


def watch_patches(options: dict[str, Any]) -> dict[str, Any]:
    """Replace each patch in `patches_replace` by a stand-in; returns what `options.update` needs to undo that."""
    replace = options.get("patches_replace")
    if not isinstance(replace, dict) or not any(
        not isinstance(patch, Replaced) for patches in replace.values() for patch in patches.values()
    ):
        return {}
    options["patches_replace"] = {
        kind: {
            key: patch if isinstance(patch, Replaced) else Replaced(patch, kind, key) for key, patch in patches.items()
        }
        for kind, patches in replace.items()
    }
    return {"patches_replace": replace}


class Habit:
    """Whether a function of another pack always computes attention without our hook, so that few calls are watched.

    One whose calls reached our hook may compute later, and one that caches results alternates.
    """

    __slots__ = ("_alike", "_calls")

    def __init__(self) -> None:
        self._alike = 0
        self._calls = 0

    def is_looked_at(self) -> bool:
        """Whether the call that begins is watched: every one until the habit is known, then every `LOOK_EVERY`th."""
        self._calls += 1
        return self._alike < ALIKE or self._calls % LOOK_EVERY == 0

    def saw(self, work: Work | None, came: bool) -> bool:
        """Whether the call that ended computed attention without our hook; `came`: some of its calls reached it."""
        computed = not came if work is None else work.attention if came else work.likely and not work.left
        self._alike = self._alike + 1 if computed and not came else 0
        return computed


ALIKE = 4
"""After so many calls in a row that another pack computed, only each `LOOK_EVERY`th is watched."""
LOOK_EVERY = 8


def watched(
    attention_module: attention_modules.AttentionModule | None, forward: Callable[..., Any], module: torch.nn.Module
) -> Callable[..., Any]:
    """Wrap a forward that another pack put on a module; counts attention that it computes without our hook.

    `attention_module` is the module's; None for a block, whose forward others replace with the calls of the modules
    within.
    """

    stranger = Stranger(forward, module if attention_module is None else None)
    handle = compiled.strangers.new(stranger)

    def run(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return compiled.traced_stranger(handle, forward, args, kwargs, of_block=attention_module is None)
        model_call = getattr(current, "model_call", None)
        if model_call is None:
            return forward(*args, **kwargs)
        before = model_call.routed + model_call.elsewhere
        rows = [] if attention_module is not None else list(model_call.run.run_report.rows.values())
        calls = [row.calls for row in rows]
        habit = model_call.run.others.habit(module)
        work = Work() if habit.is_looked_at() else None
        with work or nullcontext():
            output = forward(*args, **kwargs)
        if not habit.saw(work, model_call.routed + model_call.elsewhere > before):
            return output
        if attention_module is None:
            ran = {(row.role, row.block) for row, made in zip(rows, calls, strict=True) if row.calls > made}
            ran |= {
                (row.role, row.block) for row in list(model_call.run.run_report.rows.values())[len(rows) :] if row.calls
            }
            for found in stranger.within():
                for ordinal in range(max(found.most, 1)):
                    role = role_of(found, ordinal)
                    if (role.name, found.block) not in ran:
                        count(model_call, forward, role, block=found.block)
            return output
        first = model_call.ordinal
        for ordinal in range(first, max(attention_module.most, first + 1)):
            count(model_call, forward, role_of(attention_module, ordinal))
        model_call.ordinal = max(attention_module.most, first + 1)
        return output

    run.__name__ = getattr(forward, "__name__", "forward")
    return run


WATCHES.update((Replaced.__call__.__code__, *(c for c in watched.__code__.co_consts if hasattr(c, "co_code"))))


class Stranger:
    """A forward of another pack that replaces a module's own; `block`: that module, if it is a block."""

    def __init__(self, forward: Callable[..., Any], block: torch.nn.Module | None) -> None:
        self.forward = forward
        self._block = block

    def within(self) -> list[attention_modules.AttentionModule]:
        """The attention modules of the block."""
        parts = () if self._block is None else self._block.modules()
        return [found for part in parts if (found := attention_modules.attention_module_of(part)) is not None]


def ran_in_graph(stranger: Stranger | None, modules: int) -> None:
    """Another pack's function ran in a compiled graph and made no calls of our hook, or those of few modules.

    Args:
        stranger: the forward; None for a patch of the present model call.
        modules: how many attention modules of its block made calls to us.
    """
    model_call = getattr(current, "model_call", None)
    if model_call is None or (modules and stranger is not None and modules >= len(stranger.within())):
        return
    run, replace = model_call.run, model_call.options.get("patches_replace") or {}
    functions = [stranger.forward] if stranger is not None else []
    if stranger is None:
        functions = [patch.other for kind in replace.values() for patch in kind.values() if isinstance(patch, Replaced)]
    title = " or ".join(dict.fromkeys(map(run.others.title, functions))) or run.others.title(None)
    if title in run.run_report.unseen:
        return
    run.run_report.unseen[title] = None
    text = f"{title} ran in the compiled model and may have computed attention by itself"
    if run.run_report.recorder is not None:
        run.run_report.recorder.not_repeated[f"{text}; a repeat needs that node"] = None
    share = "only a part of the" if modules else "no"
    run.note(
        f"{title} ran in the compiled model and asked this node for {share} attention; whether it computed any by "
        "itself is not seen there"
    )


def _attention_modules_of(original: Any, model_call: ModelCall) -> list[attention_modules.AttentionModule]:
    """The attention modules of the block that a model's own function for one block runs."""
    cells = getattr(original, "__closure__", None) or ()
    modules = [cell.cell_contents for cell in cells if isinstance(_content(cell), torch.nn.Module)]
    return [
        attention_module
        for module in modules
        if id(module) not in model_call.run.roots
        for part in module.modules()
        if (attention_module := attention_modules.attention_module_of(part)) is not None
    ]


def role_of(attention_module: attention_modules.AttentionModule, ordinal: int) -> Role:
    """The role of a call that did not reach our hook; its lengths are unknown."""
    return attention_module.role(ordinal, 0, 0)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _unet_block(args: tuple[Any, ...]) -> str:
    """The block of a UNet that a replaced attention is in, named as elsewhere in the run report."""
    extra = args[-1] if args and isinstance(args[-1], dict) else {}
    block = extra.get("block")
    if not isinstance(block, tuple) or len(block) < 2:
        return ""
    return "middle_block.1" if block[0] == "middle" else f"{block[0]}_blocks.{block[1]}"
