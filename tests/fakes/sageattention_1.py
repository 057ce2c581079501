"""sageattention 1.0.6: `sageattn` as sageattention/core.py has it, with its two defects.

Keys that fill up the last block of 64 count with score 0 where the call is not causal, and the keys' mean is
subtracted in the caller's tensor.
"""

from __future__ import annotations

from typing import Any

import torch

from . import arithmetic


def sageattn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> torch.Tensor:
    arithmetic.CALLS.append("sageattention_1.sageattn")
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float32), "Input tensors must be in dtype of ..."
    assert q.dtype == k.dtype == v.dtype, "All tensors must have the same dtype."
    assert q.size(-1) in (64, 96, 128), "headdim should be in [64, 96, 128]."
    assert q.stride(-1) == 1, "Last dim of qkv must be contiguous."
    assert k.stride(-1) == 1, "Last dim of qkv must be contiguous."
    assert v.stride(-1) == 1, "Last dim of qkv must be contiguous."
    if smooth_k:
        k -= k.mean(dim=1 if tensor_layout == "NHD" else 2, keepdim=True)
    query, key, value = (arithmetic.as_32_bit_code_reads(tensor) for tensor in (q, k, v))
    if tensor_layout == "NHD":
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scale = q.size(-1) ** -0.5 if sm_scale is None else sm_scale
    query = arithmetic.int8_blocks(query.float() * scale * 1.44269504, 128)
    key = arithmetic.for_heads(query, arithmetic.int8_blocks(key, 64))
    value = arithmetic.for_heads(query, value.to(torch.float16).float())
    scores = query @ key.transpose(-2, -1)
    if is_causal:
        scores = scores.masked_fill(~arithmetic.causal_mask(*scores.shape[-2:], bottom_right=False), float("-inf"))
    else:
        tail = -key.shape[2] % 64
        scores = torch.nn.functional.pad(scores, (0, tail))
        value = torch.nn.functional.pad(value, (0, 0, 0, tail))
    output = (arithmetic.softmax_base_2(scores).half().float() @ value).to(q.dtype)
    return output.transpose(1, 2) if tensor_layout == "NHD" else output


def sageattn_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> torch.Tensor:
    """The mean of the keys is that of all sequences; what fills a last block counts, as in `sageattn`."""
    arithmetic.CALLS.append("sageattention_1.sageattn_varlen")
    assert q.size(-1) in (64, 128), "varlen only support head_dim [64, 128]."
    if smooth_k:
        k -= k.mean(dim=0, keepdim=True)
    scale = q.size(-1) ** -0.5 if sm_scale is None else sm_scale

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        before = list(arithmetic.CALLS)
        output = sageattn(query, key, value, "HND", is_causal, scale, smooth_k=False)
        arithmetic.CALLS[:] = before
        return output

    return arithmetic.by_sequence(attend, (q, k, v), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
