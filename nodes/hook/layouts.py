"""How ComfyUI's attention functions read their tensors, and how those become BHSD views with the query's batch.

Without `skip_reshape`, ComfyUI reshapes the elements of query, key and value to (batch of the query, -1, heads,
head_dim of the query), in their order. So keys of another batch are folded: with q (4, 6, C) and k (1, 24, C), sample n
sees keys 6n to 6n + 5. HyperTile relies on it. With `skip_reshape` nothing is folded, and what disagrees is broadcast,
folded or refused, by which function runs.
"""

from __future__ import annotations

from typing import Any

import torch

from ...backends.engine.call_checks import CheckError, differing
from ...backends.values.masks import as_4d
from ...backends.values.request import AttentionCall

ONE_STEP_DEVICES = ("cpu", "cuda", "xpu")
"""Where torch makes a view by sizes and strides as cheaply as any other; elsewhere that may gather, or not be there."""

EMPTY = "there is nothing to compute"
"""How the reason begins for a call with a size of 0."""

Geometry = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes and strides."""


class Views:
    """How one of a caller's tensors becomes (B, H, S, D): a view, or a copy where no view has these elements in order.

    Calls of one kind have equal shapes, so where their strides are equal too the view is known beforehand, and made in
    one operation instead of two: each costs about a microsecond, and every call needs three views.
    """

    __slots__ = ("known", "one_step", "split")

    def __init__(self, tensor: torch.Tensor, split: tuple[int, ...]) -> None:
        self.split = split
        """(B, S, H, D)."""
        self.one_step = tensor.device.type in ONE_STEP_DEVICES and type(tensor) is torch.Tensor
        self.known: dict[tuple[int, ...], Geometry] = {}
        """By the strides of the caller's tensor."""

    def new_view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of a tensor whose strides were not seen before, or its copy."""
        view = tensor.reshape(self.split).transpose(1, 2)
        if self.one_step and view.data_ptr() == tensor.data_ptr():
            self.known[tensor.stride()] = tuple(view.shape), view.stride()
        return view


class Layout:
    """How the caller's tensors become BHSD views, and what stays the same for every call of one kind."""

    __slots__ = ("enable_gqa", "heads", "kv_heads", "scale", "shapes", "skip_output_reshape", "skip_reshape", "views")

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """The tensors must be ones in which `only_comfyui` finds nothing."""
        self.shapes = query.shape, key.shape, value.shape
        self.skip_reshape = bool(kwargs.get("skip_reshape"))
        self.skip_output_reshape = bool(kwargs.get("skip_output_reshape"))
        self.scale: float | None = kwargs.get("scale")
        if self.skip_reshape:
            self.heads, self.kv_heads = query.shape[1], key.shape[1]
        else:
            splits = splits_of(query, key, value, kwargs)
            self.heads, self.kv_heads = splits[0][2], splits[1][2]
            self.views = Views(query, splits[0]), Views(key, splits[1]), Views(value, splits[2])
        self.enable_gqa = self.heads != self.kv_heads

    def call(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> AttentionCall:
        """The call as kernels see it; keys that are folded can need a copy, else only views are made."""
        if not self.skip_reshape:
            of_query, of_key, of_value = self.views
            known = of_query.known.get(query.stride())
            query = query.as_strided(*known) if known is not None else of_query.new_view(query)
            known = of_key.known.get(key.stride())
            key = key.as_strided(*known) if known is not None else of_key.new_view(key)
            known = of_value.known.get(value.stride())
            value = value.as_strided(*known) if known is not None else of_value.new_view(value)
        if mask is not None:
            mask = as_4d(mask)
        call = AttentionCall.__new__(AttentionCall)  # all of `__init__` here, without its 0.1 us
        call.query, call.key, call.value, call.attn_mask = query, key, value, mask
        call.is_causal, call.scale, call.enable_gqa = False, self.scale, self.enable_gqa
        call.memo, call.owned = None, False
        return call


Splits = tuple[tuple[int, int, int, int], tuple[int, int, int, int], tuple[int, int, int, int]]


def splits_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> Splits:
    """The (B, S, H, D) that ComfyUI reshapes query, key and value to without `skip_reshape`.

    Raises:
        ValueError: there is none, in words.
    """
    for name, tensor in (("key", key), ("value", value)):
        if tensor.ndim < 3:
            raise ValueError(f"{name} {_sizes(tensor)} has fewer than 3 dimensions")
    heads = kwargs.get("heads")
    if not isinstance(heads, int) or heads < 1 or query.ndim != 3 or query.shape[2] % heads:
        raise ValueError(f"query {_sizes(query)} is not (batch, length, heads * head_dim) with {heads} heads")
    batch, _, inner = query.shape
    head_dim = inner // heads
    kv_heads = heads
    if kwargs.get("enable_gqa"):
        if key.shape[-1] != value.shape[-1] or key.shape[-1] % head_dim or heads % max(key.shape[-1] // head_dim, 1):
            raise ValueError(
                f"key {_sizes(key)} and value {_sizes(value)} have no heads of size {head_dim} that {heads} query "
                "heads can share"
            )
        kv_heads = key.shape[-1] // head_dim
    sizes = [query.shape[1]]
    for name, tensor in (("key", key), ("value", value)):
        length, rest = divmod(tensor.numel(), batch * kv_heads * head_dim)
        if rest:
            raise ValueError(f"{name} {_sizes(tensor)} cannot be folded to ({batch}, length, {kv_heads}, {head_dim})")
        sizes.append(length)
    q_len, k_len, v_len = sizes
    return (batch, q_len, heads, head_dim), (batch, k_len, kv_heads, head_dim), (batch, v_len, kv_heads, head_dim)


def kv_len_of(query: torch.Tensor, key: torch.Tensor, kwargs: dict[str, Any]) -> int:
    """Keys of each sample after folding, where batches or dimensions differ; 0 where that is no number."""
    if kwargs.get("skip_reshape"):
        return key.shape[-2]
    each = query.shape[0] * key.shape[-1] if kwargs.get("enable_gqa") else query.numel() // max(query.shape[1], 1)
    return key.numel() // each if each else 0


def only_comfyui(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> str:
    """Why ComfyUI's own function alone can say what this call means; empty where kernels can compute it.

    Raises:
        CheckError: key and value have different lengths. On the CPU PyTorch would read memory beyond the shorter one.
    """
    scale = kwargs.get("scale")
    if scale is not None and not isinstance(scale, int | float):
        return f"scale is a {type(scale).__name__}, not a number"
    if text := differing(query, key, value, mask):
        return text
    if not (query.numel() and key.numel() and value.numel()):
        return f"{EMPTY}: query {_sizes(query)}, key {_sizes(key)}, value {_sizes(value)}"
    if kwargs.get("skip_reshape"):
        reason = _disagreement(query, key, value, kwargs)
        k_len, v_len = (key.shape[2], value.shape[2]) if not reason else (0, 0)
    else:
        try:
            _, (_, k_len, _, _), (_, v_len, _, _) = splits_of(query, key, value, kwargs)
        except ValueError as error:
            return str(error)
        reason = ""
    if k_len != v_len:
        raise CheckError(
            f"attention: key {_sizes(key)} has {k_len} tokens a sample and value {_sizes(value)} has {v_len}\n"
            "  what to do: give one value for each key"
        )
    return reason


def _disagreement(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> str:
    """What does not fit together in tensors that are (B, H, S, D) already."""
    if not query.ndim == key.ndim == value.ndim == 4:
        return f"skip_reshape with query {_sizes(query)}, key {_sizes(key)}, value {_sizes(value)}, not 4 dimensions"
    (batch, heads, _, head_dim), kv_heads = query.shape, key.shape[1]
    if not batch == key.shape[0] == value.shape[0]:
        return f"batches differ: query {batch}, key {key.shape[0]}, value {value.shape[0]}"
    if heads != kwargs.get("heads"):
        return f"query {_sizes(query)} has {heads} heads, and heads is {kwargs.get('heads')}"
    grouped = bool(kwargs.get("enable_gqa"))
    if value.shape[1] != kv_heads or (heads % kv_heads if grouped else heads != kv_heads):
        return f"heads differ: query {heads}, key {kv_heads}, value {value.shape[1]}, enable_gqa {grouped}"
    if key.shape[3] != head_dim:
        return f"head_dim of key {key.shape[3]} != {head_dim} of query"
    if value.shape[3] != head_dim and not kwargs.get("skip_output_reshape"):
        return f"head_dim of value {value.shape[3]} != {head_dim} of query without skip_output_reshape"
    return ""


def _sizes(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
