"""fastvideo-kernel 0.3.5: `block_sparse_attn` as fastvideo_kernel/block_sparse_attn.py and its kernels have it."""

from __future__ import annotations

import torch

from . import arithmetic

CAPABILITY: tuple[int, int] | None = (9, 0)
BLOCK = 64


def block_sparse_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    variable_block_sizes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale is that of head_dim; key heads are read as if there were one for each query head."""
    arithmetic.CALLS.append("block_sparse_attn")
    batch, heads, q_len, size = q.shape
    kv_len = k.shape[2]
    if block_map.dim() != 4:
        raise ValueError(f"block_map must be [B,H,Q,KV] (or [H,Q,KV]), got shape={tuple(block_map.shape)}")
    assert q_len % BLOCK == 0, f"q length must be a multiple of 64, but got {q_len}"
    assert kv_len % BLOCK == 0, f"kv length must be a multiple of 64, but got {kv_len}"
    assert block_map.shape[2] == q_len // BLOCK
    assert variable_block_sizes.numel() == kv_len // BLOCK
    if CAPABILITY == (9, 0) and q_len != kv_len:
        raise RuntimeError("K sequence length dimension - idx 2 - must match for all inputs")
    if any(tensor.dtype != torch.bfloat16 for tensor in (q, k, v)) or size not in (64, 128):
        raise RuntimeError("the kernel is for bfloat16 and head sizes of 64 and 128")
    if k.shape[:2] != (batch, heads) or v.shape[:2] != (batch, heads) or block_map.shape[:2] != (batch, heads):
        raise IndexError("CUDA error: an illegal memory access was encountered")
    place = torch.arange(kv_len)
    live = place % BLOCK < variable_block_sizes.repeat_interleave(BLOCK)
    visible = block_map.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3) & live
    output = arithmetic.exact(q, k, v, size**-0.5, visible)
    return output, arithmetic.log_sum_exp(q, k, size**-0.5, visible, base_2=True)
