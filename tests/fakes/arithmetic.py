"""The arithmetic that the fakes share: attention in float32 on BHSD tensors, and rounding to 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

INT32 = 2**31 - 1
"""The offset beyond which a fake with 32-bit indices reads elsewhere; a test lowers it."""

CALLS: list[str] = []
"""The library functions that were called, so that a test can see that none was."""


def reach(tensor: torch.Tensor) -> int:
    """The offset of a tensor's last element."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def as_32_bit_code_reads(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a kernel with 32-bit offsets reads it: past the limit, what lies at the start of the memory."""
    if reach(tensor) <= INT32:
        return tensor
    offsets = sum(
        torch.arange(size).reshape([-1 if index == dim else 1 for index in range(tensor.ndim)]) * stride
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
    )
    memory = tensor.as_strided((reach(tensor) + 1,), (1,))
    return memory[offsets % (INT32 + 1)]


def for_heads(query: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Key or value with each head repeated for the query heads that share it."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def causal_mask(q_len: int, kv_len: int, *, bottom_right: bool) -> torch.Tensor:
    """True where a query sees a key; the diagonal ends in the bottom right corner or begins in the top left one."""
    return torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len if bottom_right else 0)


def softmax_base_2(scores: torch.Tensor) -> torch.Tensor:
    """Weights from scores in log2 units; a row of -inf alone gives zeros."""
    highest = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = torch.exp2(scores - highest)
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30)


def exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention as fused half-precision kernels compute it: float32 sums, weights rounded to the input's dtype."""
    key, value = for_heads(query, key), for_heads(query, value)
    scores = query.float() @ key.float().transpose(-2, -1) * (scale / torch.log(torch.tensor(2.0)))
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = softmax_base_2(scores).to(query.dtype).float()
    return (weights @ value.float()).to(query.dtype)


def log_sum_exp(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    visible: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    base_2: bool = False,
    empty: float = 0.0,
) -> torch.Tensor:
    """(batch, num_heads, q_len), float32, in base e or 2; `empty` is what a row gets whose keys are all hidden."""
    scores = query.float() @ for_heads(query, key).float().transpose(-2, -1) * scale
    scores = scores if bias is None else scores + bias.float()
    scores = scores if visible is None else scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    return torch.where(lse.isneginf(), empty, lse / (torch.log(torch.tensor(2.0)) if base_2 else 1.0))


def by_sequence(
    attend: Callable[..., torch.Tensor],
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> torch.Tensor:
    """A kernel over packed tokens: `attend` on the BHSD tensors of each sequence, (tokens, heads, head_dim) out.

    Rows beyond the longest length that it was told, or in no sequence, are not computed, as in a real grid.
    """
    q, k, v = tensors
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32, "cu_seqlens_q must have dtype int32"
    assert len(cu_seqlens_q) == len(cu_seqlens_k), "cu_seqlens_k must have shape (batch_size + 1)"
    assert all(tensor.ndim == 3 and tensor.stride(-1) == 1 for tensor in tensors)
    rows, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if rows[-1] != len(q) or keys[-1] != len(k):
        raise IndexError("CUDA error: an illegal memory access was encountered")
    output = torch.full((*q.shape[:2], v.shape[-1]), float("nan"), dtype=q.dtype)
    for (a, b), (c, d) in zip(pairwise(rows), pairwise(keys), strict=True):
        assert b > a, "the fakes are given no empty sequence"
        assert d > c, "no kernel is called without keys"
        b, d = min(b, a + (max_seqlen_q or b)), min(d, c + (max_seqlen_k or d))
        query, key, value = (part.transpose(0, 1)[None] for part in (q[a:b], k[c:d], v[c:d]))
        output[a:b] = attend(query, key, value)[0].transpose(0, 1)
    return output


def int8_blocks(tensor: torch.Tensor, block: int) -> torch.Tensor:
    """(batch, heads, length, head_dim) rounded to INT8, one scale per `block` tokens, half away from zero."""
    parts = []
    for part in tensor.float().split(block, dim=2):
        scale = part.abs().amax(dim=(2, 3), keepdim=True).clamp(min=1e-30) / 127
        steps = part / scale
        parts.append(torch.trunc(steps + 0.5 * torch.where(steps >= 0, 1.0, -1.0)) * scale)
    return torch.cat(parts, dim=2)


def int8_channels(value: torch.Tensor) -> torch.Tensor:
    """Values rounded to INT8, one scale per head and channel."""
    scale = value.float().abs().amax(dim=2, keepdim=True).clamp(min=1e-30) / 127
    return (value.float() / scale).round() * scale


def int8_weights(weights: torch.Tensor) -> torch.Tensor:
    """Softmax weights rounded to unsigned INT8, relative to the row's largest."""
    peak = weights.amax(dim=-1, keepdim=True).clamp(min=1e-30)
    return (weights / peak * 255).round() / 255 * peak


def fp8_channels(value: torch.Tensor) -> torch.Tensor:
    """Values rounded to FP8 (E4M3), one scale per head and channel."""
    scale = value.float().abs().amax(dim=2, keepdim=True).clamp(min=1e-30) / 448
    return (value.float() / scale).to(torch.float8_e4m3fn).float() * scale


def fp4_blocks(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to FP4 (E2M1) along the last dimension, one FP8 scale per 16 numbers (NVFP4)."""
    length = tensor.shape[-1]
    blocks = torch.nn.functional.pad(tensor.float(), (0, -length % 16)).unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(dim=-1, keepdim=True) / 6).to(torch.float8_e4m3fn).float().clamp(min=2**-9)
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    nearest = levels[((blocks / scale).abs().unsqueeze(-1) - levels).abs().argmin(dim=-1)]
    return (nearest * blocks.sign() * scale).flatten(-2)[..., :length]


def fp8_weights(weights: torch.Tensor) -> torch.Tensor:
    """Softmax weights rounded to FP8 (E4M3), with the fixed scale that fits numbers up to 1."""
    return (weights * 448).to(torch.float8_e4m3fn).float() / 448


def fp4_weights(weights: torch.Tensor) -> torch.Tensor:
    """Softmax weights rounded to FP4 after they were spread over the range of FP8 scales (SageAttention 3)."""
    return fp4_blocks(weights * (448 * 6)) / (448 * 6)
