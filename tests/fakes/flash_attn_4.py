"""flash_attn.cute 4.0.0b36, with the asserts of flash_attn/cute/interface.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import arithmetic

CAPABILITY: tuple[int, int] | None = (9, 0)
__version__ = "0.0.0"  # what the real one says


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
    block_sparse_tensors: object | None = None,
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
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    output = arithmetic.exact(query, key, value, scale, visible).transpose(1, 2)
    return output, arithmetic.log_sum_exp(query, key, scale, visible) if return_lse else None


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
