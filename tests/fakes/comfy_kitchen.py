"""comfy-kitchen 0.2.31: int8_attention as sage_attention.py and backends/cuda/sage_attention have it.

Rows that do not begin at multiples of 16 bytes are an error (8 bytes for query and key in half precision). The
rotation is left out, and where the package subtracts a key that it picks, this subtracts the mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import arithmetic

CAPABILITY: tuple[int, int] | None = (8, 9)
EXTENSION = True
"""Whether the wheel's compiled part could be loaded."""


def int8_attention_is_available(device: torch.device | int | None = None) -> bool:
    return CAPABILITY is not None and CAPABILITY >= (7, 5) and EXTENSION


def int8_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    attn_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    arithmetic.CALLS.append("int8_attention")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"q, k, and v must be float32, float16, or bfloat16, got {q.dtype}")
    if not int8_attention_is_available():
        raise RuntimeError("INT8 attention requires the comfy-kitchen CUDA extension on SM75 or newer")
    if v.shape != (*k.shape[:3], q.shape[3]):
        raise ValueError("v must have shape [q.batch, k.heads, k.sequence, q.head_dim]")
    if not 0 < q.shape[3] <= 256:
        raise ValueError(f"head_dim must be in [1, 256], got {q.shape[3]}")
    if any(tensor.stride(-1) != 1 for tensor in (q, k, v)):
        raise ValueError("the last dimension of q, k, and v must be contiguous")
    if q.shape[3] in (64, 128, 256):  # others are padded, into memory of their own
        _check_alignment(q, 4 * q.element_size())
        _check_alignment(k, 4 * k.element_size())
        _check_alignment(v, 16)
    query, key = q.float(), k.float() - k.float().mean(dim=2, keepdim=True)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    key, value = (
        arithmetic.for_heads(q, arithmetic.int8_blocks(key, 16)),
        arithmetic.for_heads(q, arithmetic.int8_channels(v)),
    )
    scores = arithmetic.int8_blocks(query, 16) @ key.transpose(-2, -1) * (factor * 1.44269504)
    hidden = torch.zeros((), dtype=torch.bool)
    if attn_mask is not None:
        if attn_mask.dtype not in (torch.bool, torch.float16, torch.bfloat16, torch.float32):
            raise TypeError("attn_mask must be bool, float16, bfloat16, or float32")
        mask = attn_mask.expand(scores.shape)
        hidden = ~mask if mask.dtype == torch.bool else ~mask.isfinite()
        bias = 0.0 if mask.dtype == torch.bool else mask.float() * 1.44269504
        scores = torch.where(hidden, -50_000.0, scores + bias)
    weights = arithmetic.softmax_base_2(scores)
    output = (arithmetic.int8_weights(weights) @ value).masked_fill(
        hidden.expand(scores.shape).all(dim=-1, keepdim=True), 0.0
    )
    kept = torch.bfloat16 if q.dtype == torch.float32 else q.dtype
    return output.to(kept).to(q.dtype)


def prequantize_int8_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    attn_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Stands for the 8-bit copies: what the second step needs, in memory of its own."""
    arithmetic.CALLS.append("prequantize_int8_attention")
    return int8_attention(q, k, v, scale=scale, attn_mask=attn_mask).clone(), q.new_zeros(1)


def int8_attention_from_prequantized(quantized: tuple[torch.Tensor, ...]) -> torch.Tensor:
    FREED.append(all(reference() is None for reference in WATCHED))
    return quantized[0]


WATCHED: list[Callable[[], torch.Tensor | None]] = []
"""Weak references to tensors that a test handed over."""
FREED: list[bool] = []
"""For each second step, whether all of them were gone by then."""


def _check_alignment(tensor: torch.Tensor, size: int) -> None:
    rows = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    fits = all(length < 2 or (stride > 0 and stride * tensor.element_size() % size == 0) for length, stride in rows)
    if tensor.data_ptr() % size or not fits:
        raise RuntimeError("quant_qk_per_thread_int8: Q/K base pointers and B/H/N strides must preserve alignment")
