"""Inputs of the benchmark, and the exact rows that outputs are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from ..backends.values.devices import device_named
from ..backends.values.platform import Platform
from ..backends.values.request import AttentionCall, AttentionRequest

if TYPE_CHECKING:
    import torch

LARGEST_CACHE = 256 * 2**20
"""Total bytes that the sets of inputs exceed, unless there is one per call: no card has a larger cache."""


@dataclass
class Problem:
    """Sets of inputs for one kind of call, and exact results of some query rows of the first."""

    calls: list[AttentionCall]
    rows: torch.Tensor
    exact: torch.Tensor


def device_of(platform: Platform) -> torch.device:
    """torch's device of a platform; `cuda` for ROCm."""
    return device_named("cuda" if platform.kind == "rocm" else platform.kind)


def random_call(request: AttentionRequest, device: torch.device, seed: int, hidden: int | None = None) -> AttentionCall:
    """Normal noise of the request's shapes and dtype; a mask hides the last `hidden` keys (default: a quarter).

    Drawn on the CPU, so that a seed gives the same numbers on every device.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, request.dtype)
    kv_heads = request.num_kv_heads or request.num_heads

    def noise(heads: int, length: int, size: int) -> torch.Tensor:
        return torch.randn(request.batch, heads, length, size, generator=generator).to(dtype).to(device)

    return AttentionCall(
        noise(request.num_heads, request.q_len, request.head_dim),
        noise(kv_heads, request.kv_len, request.head_dim),
        noise(kv_heads, request.kv_len, request.v_head_dim or request.head_dim),
        make_mask(request, request.kv_len // 4 if hidden is None else hidden, device),
        request.is_causal,
        request.scale,
        request.grouped,
    )


def make_inputs(
    request: AttentionRequest, hidden: int, device: torch.device, seed: int, most: int
) -> list[AttentionCall]:
    """Two to `most` sets of inputs, enough to exceed `LARGEST_CACHE`.

    The first is noise from the seed, the others are the first with its tokens rolled. All share one mask of the
    request's kind, which hides the last `hidden` keys.
    """
    first = random_call(request, device, seed, hidden)
    tensors = (first.query, first.key, first.value)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    count = max(2, min(most, ceil(LARGEST_CACHE / size)))
    moved = [[tensor.roll(move, dims=2) for tensor in tensors] for move in range(1, count)]
    return [first, *(first.changed(query=q, key=k, value=v) for q, k, v in moved)]


def make_mask(request: AttentionRequest, hidden: int, device: torch.device) -> torch.Tensor | None:
    """(batch, 1, 1 or q_len, kv_len): key_padding has one row, bool and bias have a row for each query."""
    import torch

    if request.mask == "none":
        return None
    visible = torch.arange(request.kv_len, device=device) < request.kv_len - hidden
    if request.mask == "key_padding":
        return visible.expand(request.batch, 1, 1, request.kv_len).contiguous()
    rows = visible.expand(request.batch, 1, request.q_len, request.kv_len)
    if request.mask == "bool":
        return rows.contiguous()
    zeros = torch.zeros(rows.shape, device=device, dtype=getattr(torch, request.dtype))
    return zeros.masked_fill_(~rows, float("-inf"))
