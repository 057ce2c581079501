"""spas_sage_attn 0.1.0: `block_sparse_sage2_attn_cuda` as spas_sage_attn/core.py has it, with its defects."""

from __future__ import annotations

import torch

from . import arithmetic

CAPABILITY: tuple[int, int] | None = (8, 9)


def block_sparse_sage2_attn_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask_id: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    smooth_k: bool = True,
    pvthreshd: float = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: torch.dtype = torch.float16,
    return_sparsity: bool = False,
) -> torch.Tensor:
    """`output_dtype` is read by nothing, float32 becomes float16, and without `smooth_k` a name has no value."""
    arithmetic.CALLS.append("block_sparse_sage2_attn_cuda")
    assert tensor_layout == "HND", "the fake has one layout"
    assert q.size(-2) >= 128, "seq_len should be not less than 128."
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float16
    q, k, v = q.to(dtype), k.to(dtype), v.to(torch.float16)
    if not smooth_k:
        raise UnboundLocalError("km")
    rows, columns = (64, 128) if CAPABILITY == (9, 0) else (128, 64)
    assert mask_id is not None
    assert mask_id.dim() == 4
    assert mask_id.is_contiguous()
    head_dim = q.size(-1)
    assert head_dim in (64, 128), "headdim should be in [64, 128]."
    (batch, heads, q_len), kv_len = q.shape[:3], k.shape[2]
    if mask_id.shape != (batch, heads, -(-q_len // rows), -(-kv_len // columns)):
        raise RuntimeError("Tensor lut must have shape (batch, num_qo_heads, blocks of queries, blocks of keys)")
    if heads % k.shape[1]:
        raise ValueError("num_qo_heads must be divisible by num_kv_heads")
    key = arithmetic.int8_blocks(k.float() - k.float().mean(2, keepdim=True), columns)
    visible = mask_id.bool().repeat_interleave(rows, 2)[:, :, :q_len].repeat_interleave(columns, 3)[..., :kv_len]
    scale = head_dim**-0.5 if scale is None else scale
    return arithmetic.exact(arithmetic.int8_blocks(q, rows), key, arithmetic.fp8_channels(v), scale, visible).to(dtype)
