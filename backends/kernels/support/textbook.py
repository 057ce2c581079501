"""Attention by its definition, softmax(scale * Q K^T + mask) V, with the whole matrix of scores: Vaswani et al. 2017
(arXiv:1706.03762), equation 1. What is exact for others to be compared with, and where no fused kernel gives an LSE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...values.request import AttentionCall
from .precision import wide_dtype
from .sdpa import expand_kv

if TYPE_CHECKING:
    import torch


def attention(call: AttentionCall, wide: torch.dtype) -> torch.Tensor:
    """Compute one call in `wide` and return it in the query's dtype; rows without a visible key give zeros."""
    key, value = expand_kv(call)
    return _weighted(_scores(call, key, wide), value, call)


def attention_with_lse(call: AttentionCall, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The output as from `attention`, and the log-sum-exp of each row in `wide`, -inf where no key is visible."""
    key, value = expand_kv(call)
    scores = _scores(call, key, wide)
    return _weighted(scores, value, call), scores.logsumexp(dim=-1)


def in_full_precision(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_with_lse` in float32, or float64 where torch may compute float32 less exactly."""
    import torch

    device = call.query.device.type
    with torch.autocast(device, enabled=False):
        return attention_with_lse(call, wide_dtype(call.query.dtype, device))


def _scores(call: AttentionCall, key: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """(batch, num_heads, q_len, kv_len), scaled, -inf where a key is hidden."""
    import torch

    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = call.query.to(wide) @ key.to(wide).transpose(-2, -1) * scale
    if call.attn_mask is not None:
        if call.attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~call.attn_mask, float("-inf"))
        else:
            scores = scores + call.attn_mask.to(wide)
    if call.is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores


def _weighted(scores: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    import torch

    # Of a row without a visible key softmax makes NaN. NaN of the inputs stays: it is the answer.
    unseen = scores.isneginf().all(dim=-1, keepdim=True)
    weights = torch.softmax(scores, dim=-1).masked_fill(unseen, 0.0)
    return (weights @ value.to(scores.dtype)).to(call.query.dtype)
