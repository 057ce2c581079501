"""flashinfer 0.7.2: single_prefill_with_kv_cache as flashinfer/prefill.py and include/flashinfer/attention have it."""

from __future__ import annotations

import torch

from . import arithmetic

HEAD_DIMS = (64, 128, 256)


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_q: torch.Tensor | None = None,
    scale_k: torch.Tensor | None = None,
    scale_v: torch.Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: object | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> torch.Tensor:
    arithmetic.CALLS.append("single_prefill_with_kv_cache")
    if q.ndim != 3 or kv_layout != "NHD":
        raise ValueError("q must be (qo_len, num_qo_heads, head_dim)")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"Unsupported dtype: {q.dtype}")
    if q.shape[-1] not in HEAD_DIMS:
        raise RuntimeError(f"Unsupported head_dim: {q.shape[-1]}")
    if any(tensor.stride(-1) != 1 for tensor in (q, k, v)):
        raise RuntimeError("the last dimension must be contiguous")
    visible = None
    if custom_mask is not None:  # `causal` is not looked at then
        packed = custom_mask.contiguous().view(-1)
        visible = packed.view(q.shape[0], k.shape[0]).bool()  # a float mask is packed as if it were bits
    elif causal:
        visible = arithmetic.causal_mask(q.shape[0], k.shape[0], bottom_right=True)
    query, key, value = (arithmetic.as_32_bit_code_reads(tensor).transpose(0, 1)[None] for tensor in (q, k, v))
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    return arithmetic.exact(query, key, value, scale, visible)[0].transpose(0, 1)
