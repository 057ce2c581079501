"""Checks mode: validates every attention call before its kernel runs; an error names what was given and the remedy.

Off by default: kernels refuse most of this themselves. `DIFFUSERS_ATTN_CHECKS` (1, on, yes or true, in any case)
switches it on, as in Diffusers; so does `with checks():` for calls through `backends.api`. Checks read shapes, dtypes
and devices, no values, so they cost no synchronisation. What is refused with checks off too stands here as well:
shapes, layouts, grids.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from operator import index
from typing import TYPE_CHECKING

from ..values.grid import TokenGrid
from ..values.request import AttentionCall

if TYPE_CHECKING:
    import torch

    from ..kernels.backend import Kernel

VARIABLE = "DIFFUSERS_ATTN_CHECKS"
ON = ("1", "on", "yes", "true")
Grid = tuple[int, int, int]
"""Frames, height and width of the tokens of a call."""

LAYOUTS = ("BHSD", "BSHD")


class CheckError(ValueError):
    """An invalid call; the message says what was given and what to do."""


class DifferingTensorsError(CheckError):
    """A host's call whose tensors have different dtypes or devices: only the host's own function may take it."""


def differing(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> str:
    """Text of the dtypes or devices that differ; empty where they agree. The mask's dtype may differ."""
    if not query.dtype == key.dtype == value.dtype:
        return "dtypes differ: " + ", ".join(str(each.dtype).removeprefix("torch.") for each in (query, key, value))
    if not query.device == key.device == value.device:
        return "devices differ: " + ", ".join(str(each.device) for each in (query, key, value))
    if mask is not None and mask.device != query.device:
        return f"devices differ: query {query.device}, mask {mask.device}"
    return ""


def checks_from_environment(environ: Mapping[str, str] | None = None) -> bool:
    """Whether the environment switches checks on."""
    environ = os.environ if environ is None else environ
    return environ.get(VARIABLE, "").strip().lower() in ON


def check(call: AttentionCall, *, only_shapes: bool = False, any_kv_len: bool = False) -> None:
    """Refuse a call whose tensors do not fit together, in any memory layout.

    `only_shapes` checks shapes only, of tensors with four dimensions. Shapes are checked for each kind of call even
    with checks off: PyTorch's CPU kernels read beyond the shorter one of key and value. `any_kv_len`: 0 is allowed.

    Raises:
        CheckError: lists every problem with its remedy, and the shapes, dtypes and devices.
    """
    problems = list(_shapes(call, any_kv_len) if only_shapes else _problems(call))
    if not problems:
        return
    given = [("query", call.query), ("key", call.key), ("value", call.value)]
    if call.attn_mask is not None:
        given.append(("mask", call.attn_mask))
    lines = [f"attention checks: {len(problems)} wrong with this call"]
    lines += [f"  {name}: {tuple(tensor.shape)} {_name(tensor)} on {tensor.device}" for name, tensor in given]
    lines.append(
        f"  is_causal {call.is_causal}, enable_gqa {call.enable_gqa}; shapes are (batch, heads, length, head_dim)"
    )
    lines += [f"  {problem}; what to do: {remedy}" for problem, remedy in problems]
    raise CheckError("\n".join(lines))


def checked(kernel: Kernel) -> Kernel:
    """The kernel with a check before each call."""

    def run(call: AttentionCall) -> torch.Tensor:
        check(call)
        return kernel(call)

    return run


def _problems(call: AttentionCall) -> Iterator[tuple[str, str]]:
    """(problem, remedy) pairs."""
    query, key, value, mask = call.query, call.key, call.value, call.attn_mask
    tensors = {"query": query, "key": key, "value": value}
    flat = [f"{name} has {tensor.ndim} dimensions, not 4" for name, tensor in tensors.items() if tensor.ndim != 4]
    if flat:
        yield "; ".join(flat), "give (batch, heads, length, head_dim), or layout='BSHD' with heads and length swapped"
        return
    devices = {tensor.device for tensor in (query, key, value, mask) if tensor is not None}
    if len(devices) > 1:
        yield f"{len(devices)} devices: {', '.join(sorted(map(str, devices)))}", "move all of them to one device"
    if not query.dtype == key.dtype == value.dtype:
        yield (
            f"dtypes differ: query {_name(query)}, key {_name(key)}, value {_name(value)}",
            "cast key and value to the query's dtype",
        )
    yield from _shapes(call)
    if mask is not None:
        yield from _mask(call, mask)


def _shapes(call: AttentionCall, any_kv_len: bool = False) -> Iterator[tuple[str, str]]:
    query, key, value = call.query.shape, call.key.shape, call.value.shape
    if not query[0] == key[0] == value[0]:
        yield f"batch sizes differ: {query[0]}, {key[0]}, {value[0]}", "expand the smaller ones to the query's batch"
    if key[1] != value[1]:
        yield f"key has {key[1]} heads, value {value[1]}", "give both the same heads"
    if key[1] == 0 or query[1] % key[1]:
        yield f"{query[1]} query heads are not a multiple of {key[1]} key heads", "check heads and layout"
    elif query[1] != key[1] and not call.enable_gqa:
        yield f"{query[1]} query heads over {key[1]} key heads without enable_gqa", "set enable_gqa=True"
    if key[2] != value[2]:
        yield f"kv_len of key {key[2]} != {value[2]} of value", "give one value for each key"
    if key[2] == 0 and not any_kv_len:
        yield "kv_len 0: there is no key to attend to", "leave this call out"
    if query[3] != key[3]:
        yield f"head_dim of key {key[3]} != {query[3]} of query", "project both to the same size"


def _mask(call: AttentionCall, mask: torch.Tensor) -> Iterator[tuple[str, str]]:
    import torch

    batch, heads, q_len, _ = call.query.shape
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        remedy = "make it boolean (True: visible) or floating-point (added to scores, as integers are)"
        yield f"mask of dtype {_name(mask)}", remedy
    elif mask.dtype != torch.bool and mask.dtype != call.query.dtype:
        yield f"mask of dtype {_name(mask)}, query {_name(call.query)}", "cast the mask to the query's dtype"
    full = (batch, heads, q_len, call.key.shape[2])
    if mask.ndim != 4 or any(size not in (1, wanted) for size, wanted in zip(mask.shape, full, strict=True)):
        yield f"mask {tuple(mask.shape)} cannot be broadcast to {full}", "give each dimension its size or 1"
    if call.is_causal:
        yield "is_causal together with a mask", "put the causal part into the mask, or leave one of them out"


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_meaning(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, layout: str
) -> None:
    """Refuse an unknown layout or shapes that do not fit; called once per kind of call."""
    only_tensors(query, key, value, mask)
    if layout not in LAYOUTS:
        raise CheckError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes):
        raise CheckError(f"query, key and value {shapes} must have 4 dimensions each, in the order {layout}")
    if mask is None:
        return
    if mask.ndim == 3:
        raise CheckError(
            f"attn_mask {tuple(mask.shape)} could be by head or by sample; give it 4 dimensions, with 1 for the missing"
        )
    if not 1 <= mask.ndim <= 4:
        raise CheckError(f"attn_mask {tuple(mask.shape)} must have 1, 2 or 4 dimensions")
    if mask.is_complex():
        raise CheckError(f"attn_mask of dtype {mask.dtype} is neither boolean nor a number that is added to scores")


def token_grid_of(grid: Grid | None, before: int, after: int) -> TokenGrid:
    """The grid as given to `attention`.

    Raises:
        CheckError: it is none, or there is none beside which the other tokens could stand.
    """
    if grid is None:
        raise CheckError(f"tokens_before {before!r} and tokens_after {after!r} stand beside a grid; give grid too")
    given = (*(grid if isinstance(grid, tuple | list) else ()), before, after)
    try:
        sizes = [index(size) for size in given if not isinstance(size, bool)]  # NumPy's numbers too
    except TypeError:
        sizes = []
    if len(given) != 5 or len(sizes) != 5 or min(sizes[:3]) < 1 or min(sizes) < 0:
        raise CheckError(
            f"grid {grid!r} with tokens_before {before!r} and tokens_after {after!r} is not three whole "
            "numbers from 1, with whole numbers from 0"
        )
    frames, height, width, before, after = sizes
    return TokenGrid(frames, height, width, before, after)


def only_tensors(*given: object) -> None:
    import torch

    for value in given:
        if value is not None and not isinstance(value, torch.Tensor):
            kind = f"{type(value).__module__}.{type(value).__name__}"
            raise CheckError(f"attention takes torch tensors, not {kind}; torch.as_tensor makes one of an array")
