"""flash_attn_interface 3.0.0 (folder hopper/ of flash-attention), with the checks of hopper/flash_api.cpp."""

from __future__ import annotations

import torch

from . import arithmetic

CAPABILITY: tuple[int, int] | None = (9, 0)
RETURNS_LSE = False
"""Betas before August 2025 always returned (output, log-sum-exp)."""


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    arithmetic.CALLS.append("flash_attn_3.flash_attn_func")
    if CAPABILITY != (9, 0):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only supports fp16, bf16, and fp8_e4m3 data type")
    if q.shape[-1] > 256:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    if q.shape[-1] % 8:
        raise RuntimeError("head_size should be a multiple of 8")
    query, key, value = (tensor.transpose(1, 2) for tensor in (q, k, v))
    visible = arithmetic.causal_mask(q.shape[1], k.shape[1], bottom_right=True) if causal else None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    output = arithmetic.exact(query, key, value, scale, visible).transpose(1, 2)
    if not return_attn_probs and not RETURNS_LSE:
        return output
    return output, arithmetic.log_sum_exp(query, key, scale, visible, empty=float("-inf"))


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    arithmetic.CALLS.append("flash_attn_3.flash_attn_varlen_func")
    if CAPABILITY != (9, 0):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > 256 or q.shape[-1] % 8:
        raise RuntimeError("FlashAttention only supports fp16, bf16, and fp8_e4m3 data type")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return arithmetic.exact(query, key, value, scale)

    output = arithmetic.by_sequence(attend, (q, k, v), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return (output, torch.zeros(q.shape[1], q.shape[0])) if RETURNS_LSE else output
