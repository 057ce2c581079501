"""flash_attn 2.8.3: `flash_attn_func` with the checks of csrc/flash_attn/flash_api.cpp."""

from __future__ import annotations

import torch

from . import arithmetic


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arithmetic.CALLS.append("flash_attn_func")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise RuntimeError("query and key must have the same dtype")
    if q.shape[-1] > 256:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    if q.shape[2] % k.shape[2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    if k.shape[-1] != q.shape[-1] or v.shape != k.shape:
        raise RuntimeError("v must have shape (batch_size, seqlen_k, num_heads_k, head_size)")
    query, key, value = (arithmetic.as_32_bit_code_reads(tensor).transpose(1, 2) for tensor in (q, k, v))
    visible = arithmetic.causal_mask(q.shape[1], k.shape[1], bottom_right=True) if causal else None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    output = arithmetic.exact(query, key, value, scale, visible).transpose(1, 2)
    if not return_attn_probs:
        return output
    return output, arithmetic.log_sum_exp(query, key, scale, visible, empty=float("inf")), q.new_empty(0)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    arithmetic.CALLS.append("flash_attn_varlen_func")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if q.shape[-1] > 256 or q.shape[1] % k.shape[1]:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return arithmetic.exact(query, key, value, scale)

    return arithmetic.by_sequence(attend, (q, k, v), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
