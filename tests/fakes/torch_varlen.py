"""torch.nn.attention.varlen of 2.10, and of 2.12 and later: FlashAttention on CUDA, float16 and bfloat16 only."""

from __future__ import annotations

from types import ModuleType

import torch

from . import arithmetic


def _attend(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], offsets: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int], scale: float | None,
) -> torch.Tensor:  # fmt: skip
    query = tensors[0]
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    factor = query.shape[-1] ** -0.5 if scale is None else scale

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return arithmetic.exact(q, k, v, factor)

    return arithmetic.by_sequence(attend, tensors, *offsets, *longest)


def first_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: object | None = None,
) -> torch.Tensor:
    """2.10: no scale."""
    arithmetic.CALLS.append("varlen_attn")
    return _attend((query, key, value), (cu_seq_q, cu_seq_k), (max_q, max_k), None)


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: object | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """From 2.12 on: grouped heads only where they are announced."""
    arithmetic.CALLS.append("varlen_attn")
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError("Expect query and key/value to have the same number of heads; set enable_gqa=True")
    assert cu_seq_k is not None
    return _attend((query, key, value), (cu_seq_q, cu_seq_k), (max_q, max_k), scale)


def module(version: str) -> ModuleType:
    """torch.nn.attention.varlen as of `version` of torch."""
    made = ModuleType("torch.nn.attention.varlen")
    made.varlen_attn = first_varlen_attn if version.startswith("2.10") else varlen_attn  # type: ignore[attr-defined]
    return made
