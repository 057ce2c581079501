"""Attention calls of models under torch.compile: in the graph each is one opaque op, and all else happens inside it.

While torch traces, nothing of ours is decided, counted or logged. The op gets the call's tensors and two handles, one
of the override and one of the calling module. A handle is a tensor that holds a number: torch neither compiles its
value into the graph nor guards on it, so blocks, runs and branches with other settings share one compiled graph. When
the op runs, its handles are looked up and the call goes the way of every other call, with real tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...backends.engine.opaque import Handles, define

if TYPE_CHECKING:
    from .attention_modules import AttentionModule
    from .override import Override
    from .stand_ins import Stranger

POSITIONAL = ("heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
"""Arguments of ComfyUI's attention functions after query, key and value."""
KNOWN_ARGUMENTS = frozenset(
    {*POSITIONAL, "scale", "enable_gqa", "low_precision_attention", "transformer_options", "_inside_attn_wrapper"}
)
"""A call with another argument than these goes to ComfyUI's own function."""
UNKNOWN_ARGUMENT = "an argument of the call is not known to this version"


def positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Query, key and value where the call names some of them, as each of ComfyUI's functions does; takes those out."""
    for names in (("q", "query"), ("k", "key"), ("v", "value"))[len(args) :]:
        name = next((name for name in names if name in kwargs), None)
        if name is None:
            raise TypeError(f"attention: no {names[1]} was given")
        args = (*args, kwargs.pop(name))
    return args


overrides: Handles[Override] = Handles()
attention_modules: Handles[AttentionModule] = Handles()
strangers: Handles[Stranger] = Handles()


class Running:
    """The attention module whose forward is being traced: its handle, and how many calls it has made.

    Only traces use it. It is a plain value in a trace and None at its end, so that threads that run compiled code at
    the same time do not see each other's.
    """

    def __init__(self) -> None:
        self.attention_module: tuple[torch.Tensor, list[int]] | None = None
        self.asked: list[int] | None = None
        """[calls, modules that made calls] that reached us from the other pack's function being traced."""


running = Running()


def traced_forward(handle: torch.Tensor, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The forward of an attention module in a trace. Where the graph would break inside, torch calls it untraced."""
    outer, asked = running.attention_module, running.asked
    before = 0 if asked is None else asked[0]
    running.attention_module = (handle, [0])
    try:
        return forward(*args, **kwargs)
    finally:
        running.attention_module = outer
        if asked is not None and asked[0] > before:
            asked[1] += 1


def traced_stranger(
    stranger: torch.Tensor | None, other: Callable[..., Any], args: Any, kwargs: Any, *, of_block: bool = False
) -> Any:
    """Trace another pack's function that replaces an attention, a block or a forward.

    A trace shows how many of its calls reach us, not whether it computes attention itself. If none does, the graph
    notifies the run when it runs. For `of_block`, a block's forward, so does the number of modules that made calls.

    Args:
        stranger: the handle of a `Stranger`; None for a patch. That one's handle would be an input of the graph with a
            place in `transformer_options`, which may be gone when a graph without guards on them runs again.
    """
    outer = running.asked
    running.asked = made = [0, 0]
    try:
        output = other(*args, **kwargs)
    finally:
        running.asked = outer
        if outer is not None:
            outer[0] += made[0] or 1  # each is reported once
            outer[1] += made[1]
    return output if made[0] and not of_block else _telling(output, stranger, made[1])


def _telling(output: Any, stranger: torch.Tensor | None, modules: int) -> Any:
    """The output, its first tensor passed through the op that notifies the run."""
    if isinstance(output, torch.Tensor):
        return output if output.requires_grad else _reported(output, stranger, modules)
    if isinstance(output, dict):
        for name, part in output.items():
            if isinstance(part, torch.Tensor):
                return {**output, name: _telling(part, stranger, modules)}
    elif type(output) in (tuple, list):
        for at, part in enumerate(output):
            if isinstance(part, torch.Tensor):
                return type(output)([*output[:at], _telling(part, stranger, modules), *output[at + 1 :]])
    return output


class Routed:
    """What another pack's override gets as `func` in a trace: our op, for any number of calls."""

    def __init__(
        self, override: Override, func: Callable[..., torch.Tensor], ordinal: int, attention_module: Any
    ) -> None:
        self.override = override
        self.func = func
        self.ordinal = ordinal
        self.attention_module = attention_module
        self.called = False

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.called = True
        if len(args) < 3:
            args = positional(args, kwargs)
        return _as_op(self.override, self.func, self.ordinal, self.attention_module, True, args, kwargs)


def traced(override: Override, func: Callable[..., torch.Tensor], args: Any, kwargs: Any) -> torch.Tensor:
    """One attention call of ComfyUI's hook in a trace."""
    if isinstance(func, Routed):  # another pack calls us from below; our later override decides
        return func(*args, **kwargs)
    if running.asked is not None:
        running.asked[0] += 1
    ordinal, attention_module = -1, None
    if running.attention_module is not None:
        attention_module, calls = running.attention_module
        ordinal = calls[0]
        calls[0] = ordinal + 1
    if override.foreign is None:
        return _as_op(override, func, ordinal, attention_module, False, args, kwargs)
    routed = Routed(override, func, ordinal, attention_module)
    output = override.foreign(routed, *args, **kwargs)
    if routed.called:
        return output
    return _counted(output, args[0], args[1], override.handle, attention_module, ordinal, True)


def watched(
    other: Callable[..., torch.Tensor], func: Callable[..., torch.Tensor], args: Any, kwargs: Any
) -> torch.Tensor:
    """One call in a trace of another pack's override that stands on top of ours; counted where that answers it."""
    if running.asked is not None:
        running.asked[0] += 1
    if running.attention_module is None:
        return other(func, *args, **kwargs)
    attention_module, calls = running.attention_module
    ordinal = calls[0]
    output = other(func, *args, **kwargs)
    if calls[0] > ordinal:
        return output
    calls[0] = ordinal + 1
    override = kwargs["transformer_options"]["attention_backends"]
    query, key, *_ = args if len(args) > 1 else positional(args, dict(kwargs))
    return _counted(output, query, key, override.handle, attention_module, ordinal, True)


def _as_op(
    override: Override,
    func: Callable[..., torch.Tensor],
    ordinal: int,
    attention_module: Any,
    composed: bool,
    args: Any,
    kwargs: Any,
) -> torch.Tensor:
    query, key, value = args[0], args[1], args[2]
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return func(*args, **{**kwargs, "_inside_attn_wrapper": True})  # the op has no gradient
    given = {**dict(zip(POSITIONAL, args[3:], strict=False)), **kwargs}
    for name in given:
        if name not in KNOWN_ARGUMENTS:
            output = func(*args, **{**kwargs, "_inside_attn_wrapper": True})
            return _counted(output, query, key, override.handle, attention_module, ordinal, False)
    skip_reshape = bool(given.get("skip_reshape"))
    heads = query.shape[1] if skip_reshape else given["heads"]
    output = _attention(
        query,
        key,
        value,
        given.get("mask"),
        heads,
        skip_reshape,
        bool(given.get("enable_gqa")),
        given.get("scale"),
        given.get("attn_precision"),
        given.get("low_precision_attention"),
        override.handle,
        attention_module,
        ordinal,
        composed,
    )
    if given.get("skip_output_reshape"):
        bhsd: torch.Tensor = output.unflatten(2, (heads, -1)).transpose(1, 2)
        return bhsd
    return output


def comfys_attention() -> Callable[..., torch.Tensor]:
    """What ComfyUI's models call; a graph holds no functions, so it is looked up when the op runs."""
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention


def _run_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    skip_reshape: bool,
    enable_gqa: bool,
    scale: float | None,
    attn_precision: torch.dtype | None,
    low_precision: bool | None,
    override: torch.Tensor,
    attention_module: torch.Tensor | None,
    ordinal: int,
    composed: bool,
) -> torch.Tensor:
    """The op itself: (B, S, H * D), contiguous, whatever layout the caller wants."""
    given = {
        "heads": heads,
        "mask": mask,
        "skip_reshape": skip_reshape or None,
        "enable_gqa": enable_gqa or None,
        "scale": scale,
        "attn_precision": attn_precision,
        "low_precision_attention": low_precision,
    }
    kwargs = {name: argument for name, argument in given.items() if argument is not None}
    func = comfys_attention()
    asked = overrides.get(override)
    if asked is None:  # a graph without guards on its options outlived the node
        output = func(query, key, value, **kwargs)
    else:
        args = (query, key, value)
        output = asked.run_compiled(attention_modules.get(attention_module), ordinal, composed, func, args, kwargs)
    shape = _output_shape(query, value, heads, skip_reshape)
    if output.shape != shape:
        raise ValueError(
            f"attention in a compiled model: the output is {tuple(output.shape)}, and the graph was made for {shape}\n"
            f"  call: query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}, heads {heads}\n"
            "  what to do: run this model without torch.compile"
        )
    return output.to(query.dtype).contiguous()


def _fake_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    skip_reshape: bool,
    *rest: object,
) -> torch.Tensor:
    """The shape of the output; sizes may be symbols."""
    return query.new_empty(_output_shape(query, value, heads, skip_reshape))


def _output_shape(query: torch.Tensor, value: torch.Tensor, heads: int, skip_reshape: bool) -> tuple[int, int, int]:
    """Without `skip_reshape` key and value take the query's batch and head size, whatever their own shapes are."""
    if skip_reshape:
        return query.shape[0], query.shape[2], heads * value.shape[3]
    return query.shape[0], query.shape[1], heads * (query.shape[2] // heads)


def _run_counted(
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    override: torch.Tensor,
    attention_module: torch.Tensor | None,
    ordinal: int,
    by_other: bool,
) -> torch.Tensor:
    """Count a call that did not run here, and return its output unchanged."""
    asked = overrides.get(override)
    if asked is not None:
        asked.count_compiled(attention_modules.get(attention_module), ordinal, query, key, by_other)
    return output.clone()


def _run_reported(output: torch.Tensor, stranger: torch.Tensor | None, modules: int) -> torch.Tensor:
    """Tell the run that another pack's function ran, and return its output unchanged."""
    from .stand_ins import ran_in_graph  # which needs this module

    ran_in_graph(strangers.get(stranger), modules)
    return output.clone()


def _fake_counted(output: torch.Tensor, *rest: object) -> torch.Tensor:
    return torch.empty_like(output)


_attention = define(
    "attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, SymInt heads, bool skip_reshape, bool enable_gqa,"
    " float? scale, ScalarType? attn_precision, bool? low_precision, Tensor override, Tensor? module, int ordinal,"
    " bool composed) -> Tensor",
    _run_attention,
    _fake_attention,
)
_counted = define(
    "counted",
    "(Tensor output, Tensor query, Tensor key, Tensor override, Tensor? module, int ordinal, bool by_other) -> Tensor",
    _run_counted,
    _fake_counted,
)
_reported = define("reported", "(Tensor output, Tensor? stranger, int modules) -> Tensor", _run_reported, _fake_counted)
