"""flash_attn.cute 4.0.0b36, with the asserts of flash_attn/cute/interface.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import arithmetic

CAPABILITY: tuple[int, int] | None = (9, 0)
__version__ = "0.0.0"  # what the real one says


class BlockSparseTensorsTorch(NamedTuple):
    """As in block_sparsity.py of 4.0.0b36."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: torch.Tensor | None = None
    dq_write_order_full: torch.Tensor | None = None
    spt: bool | None = None


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., object] | None = None,
    score_mod_bwd: Callable[..., object] | None = None,
    mask_mod: Callable[..., object] | None = None,
    aux_tensors: list[torch.Tensor] | None = None,
    aux_scalars: tuple[object, ...] | None = None,
    block_sparse_tensors: BlockSparseTensorsTorch | None = None,
    block_sparse_tensors_bwd: object | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    arithmetic.CALLS.append("flash_attn_4.flash_attn_func")
    assert CAPABILITY is not None
    arch, head_dim = CAPABILITY[0], q.shape[-1]
    assert v.dtype in (torch.float16, torch.bfloat16), "inputs must be float16, bfloat16, fp8e4m3fn or fp8e5m2"
    assert all(t.dtype == v.dtype for t in (q, k)), "inputs must have the same dtype"
    assert arch in (8, 9, 10, 11, 12), "Unsupported compute capability. Supported: 8.x, 9.x, 10.x, 11.x, 12.x"
    assert q.shape[2] % k.shape[2] == 0, "num_head must be divisible by num_head_kv"
    if arch == 9:
        assert 8 <= head_dim <= 256, "head_dim and head_dim_v must be between 8 and 256"
        assert head_dim % 8 == 0, "head_dim and head_dim_v must be divisible by 8"
    elif arch in (10, 11):
        assert 8 <= head_dim <= 128 or head_dim == 256, "head_dim must be between 8 and 128 or 256 for hd256"
        assert head_dim % 8 == 0, "head_dim and head_dim_v must be divisible by 8"
    elif head_dim > 192 or head_dim % 8:
        raise RuntimeError("cute.compile failed: the tile does not fit in shared memory")
    query, key, value = (arithmetic.as_32_bit_code_reads(tensor).transpose(1, 2) for tensor in (q, k, v))
    visible = arithmetic.causal_mask(q.shape[1], k.shape[1], bottom_right=True) if causal else None
    if block_sparse_tensors is not None and arch != 8:  # the kernel for sm8x takes the lists and reads none of them
        assert arch != 12, "Block sparsity not supported on SM 12.0"
        shape = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
        visible = _listed(block_sparse_tensors, shape, head_dim, arch)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    output = arithmetic.exact(query, key, value, scale, visible).transpose(1, 2)
    return output, arithmetic.log_sum_exp(query, key, scale, visible) if return_lse else None


def _listed(
    tensors: BlockSparseTensorsTorch, shape: tuple[int, int, int, int], head_dim: int, arch: int
) -> torch.Tensor:
    """The pairs that the lists of whole blocks have, with the checks of `normalize_block_sparse_config`.

    Keys after the last one are hidden in the block that a list ends with, in no other.
    """
    batch, heads, q_len, kv_len = shape
    assert tensors.block_size is not None, "the fake has no size but the given one"
    rows, columns = tensors.block_size
    tile_n = columns if arch == 9 and columns < 128 and columns % 16 == 0 else 128
    if head_dim > 128:
        raise ValueError("Block sparsity requires sparse_block_size[1] to match tile_n of this head_dim.")
    if columns % tile_n or (arch == 9 and columns != tile_n):
        raise ValueError(f"Block sparsity requires sparse_block_size[1] to be a multiple of tile_n={tile_n}.")
    base = 256 if arch in (10, 11) and q_len > 128 else 128
    if rows % base:
        raise ValueError(f"block size {rows}, which must be a multiple of {base}.")
    counts, order = tensors.full_block_cnt, tensors.full_block_idx
    assert counts is not None
    assert order is not None
    if any(one.dtype != torch.int32 for one in (counts, order, tensors.mask_block_cnt, tensors.mask_block_idx)):
        raise ValueError("mask_block tensors must have dtype torch.int32")
    if tensors.mask_block_cnt.any():
        raise NotImplementedError("the fake has no partial blocks")
    blocks = -(-q_len // rows), -(-kv_len // columns)
    counts, order = counts.expand(batch, heads, blocks[0]), order.expand(batch, heads, *blocks).long()
    listed = torch.arange(blocks[1]) < counts[..., None]
    seen = torch.zeros(batch, heads, *blocks, dtype=torch.bool).scatter_(-1, order, listed)
    ends = order.gather(-1, (counts[..., None].long() - 1).clamp(min=0))
    has_last = seen[..., -1]
    if kv_len % columns and not torch.equal(has_last, (ends[..., 0] == blocks[1] - 1) & (counts > 0)):
        raise RuntimeError("keys after the last one were read")
    return seen.repeat_interleave(rows, 2)[:, :, :q_len].repeat_interleave(columns, 3)[..., :kv_len]


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
) -> tuple[torch.Tensor, None]:
    arithmetic.CALLS.append("flash_attn_4.flash_attn_varlen_func")
    assert q.dtype in (torch.float16, torch.bfloat16), "inputs must be float16 or bfloat16"
    assert cu_seqlens_q is not None
    assert cu_seqlens_k is not None
    if q.shape[-1] > (256 if CAPABILITY == (9, 0) else 192) or q.shape[-1] % 8:
        raise RuntimeError("cute.compile failed: the tile does not fit in shared memory")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return arithmetic.exact(query, key, value, scale)

    return arithmetic.by_sequence(attend, (q, k, v), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), None
