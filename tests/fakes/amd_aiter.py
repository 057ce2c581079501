"""aiter (amd-aiter 0.1.7): flash_attn_func as aiter/ops/mha.py has it, over Composable Kernel."""

from __future__ import annotations

import torch

from . import arithmetic

RETURNS_TUPLE = False
"""Versions of early 2025 returned a tuple of one."""


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    arithmetic.CALLS.append("aiter.flash_attn_func")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if q.shape[-1] > 256:
        raise RuntimeError("CK FlashAttention forward only supports head dimension at most 256")
    if q.shape[2] % k.shape[2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    if any(tensor.stride(-1) != 1 for tensor in (q, k, v)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    query, key, value = (arithmetic.as_32_bit_code_reads(tensor).transpose(1, 2) for tensor in (q, k, v))
    visible = arithmetic.causal_mask(q.shape[1], k.shape[1], bottom_right=True) if causal else None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    output = arithmetic.exact(query, key, value, scale, visible).transpose(1, 2)
    return (output,) if RETURNS_TUPLE else output
