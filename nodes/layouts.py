"""How the tensors of ComfyUI's attention functions, (B, S, H*D) or (B, S, H, D), become BHSD: always as views."""

from __future__ import annotations

from typing import Any

import torch

from ..backends.mask import as_4d
from ..backends.request import AttentionCall

ONE_STEP_DEVICES = ("cpu", "cuda", "xpu")
"""Where torch makes a view by sizes and strides as cheaply as any other; elsewhere that may gather, or not be there."""

Geometry = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes and strides."""


class Views:
    """How one of a caller's tensors, (B, S, H*D) or (B, S, H, D), becomes (B, H, S, D): always a view.

    Calls of one kind have equal shapes, so where their strides are equal too the view is known beforehand, and made in
    one operation instead of two: each costs about a microsecond, and every call needs three views.
    """

    __slots__ = ("known", "one_step", "split")

    def __init__(self, tensor: torch.Tensor, heads: int) -> None:
        self.split = split_heads(tensor, heads)
        self.one_step = tensor.device.type in ONE_STEP_DEVICES and type(tensor) is torch.Tensor
        self.known: dict[tuple[int, ...], Geometry] = {}
        """By the strides of the caller's tensor."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of a tensor whose strides were not seen before."""
        view = tensor.view(self.split).transpose(1, 2)
        if self.one_step:
            self.known[tensor.stride()] = tuple(view.shape), view.stride()
        return view


class Layout:
    """How the caller's tensors become BHSD views, and what stays the same for every call of one kind."""

    __slots__ = ("enable_gqa", "heads", "kv_heads", "scale", "shapes", "skip_output_reshape", "skip_reshape", "views")

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> None:
        self.shapes = query.shape, key.shape, value.shape
        self.skip_reshape = bool(kwargs.get("skip_reshape"))
        self.skip_output_reshape = bool(kwargs.get("skip_output_reshape"))
        self.scale: float | None = kwargs.get("scale")
        if self.skip_reshape:
            self.heads, self.kv_heads = query.shape[1], key.shape[1]
        else:
            self.heads = kwargs["heads"]
            head_dim = query.shape[-1] // self.heads
            self.kv_heads = key.shape[-1] // head_dim if kwargs.get("enable_gqa") else self.heads
            self.views = Views(query, self.heads), Views(key, self.kv_heads), Views(value, self.kv_heads)
        self.enable_gqa = self.heads != self.kv_heads

    def call(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> AttentionCall:
        """The call as kernels see it; only views are made."""
        if not self.skip_reshape:
            of_query, of_key, of_value = self.views
            known = of_query.known.get(query.stride())
            query = query.as_strided(*known) if known is not None else of_query.of(query)
            known = of_key.known.get(key.stride())
            key = key.as_strided(*known) if known is not None else of_key.of(key)
            known = of_value.known.get(value.stride())
            value = value.as_strided(*known) if known is not None else of_value.of(value)
        if mask is not None:
            mask = as_4d(mask)
        return AttentionCall(query, key, value, mask, False, self.scale, self.enable_gqa)


def split_heads(tensor: torch.Tensor, heads: int) -> tuple[int, ...]:
    """The shape of (B, S, H*D) as (B, S, H, D), which SD3's values have already."""
    if tensor.ndim == 4:
        return tensor.shape
    batch, length, inner = tensor.shape
    return batch, length, heads, inner // heads
