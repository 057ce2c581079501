"""sageattn3 1.0.0: sageattn3_blackwell as sageattention3_blackwell/sageattn3/api.py has it.

The mask and any keyword are ignored, the scale is always head_dim ** -0.5, grouped heads fail in a matrix product,
and the keys' mean is subtracted in the caller's tensor.
"""

from __future__ import annotations

from typing import Any

import torch

from . import arithmetic

CAPABILITY: tuple[int, int] | None = (12, 0)


def sageattn3_blackwell(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    per_block_mean: bool = True,
    **kwargs: Any,
) -> torch.Tensor:
    arithmetic.CALLS.append("sageattn3_blackwell")
    if q.size(-1) >= 256:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    if CAPABILITY not in ((10, 0), (12, 0), (12, 1)):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("Expected half or bfloat16")
    if q.size(-1) not in (64, 128):
        raise RuntimeError("Unsupported head dim")
    k -= k.mean(dim=-2, keepdim=True)
    means = torch.stack([part.float().mean(dim=2) for part in q.split(128, dim=2)], dim=2)
    spread = means.repeat_interleave(128, dim=2)[:, :, : q.size(2)]
    correction = torch.matmul(spread.to(q.dtype), k.transpose(-2, -1)).float()
    scores = arithmetic.fp4_blocks(q.float() - spread) @ arithmetic.fp4_blocks(k).transpose(-2, -1) + correction
    scores = scores * q.size(-1) ** -0.5 * 1.44269504
    if is_causal:
        scores = scores.masked_fill(~arithmetic.causal_mask(*scores.shape[-2:], bottom_right=False), float("-inf"))
    weights = arithmetic.fp4_weights(arithmetic.softmax_base_2(scores))
    values = arithmetic.fp4_blocks(v.transpose(-2, -1)).transpose(-2, -1)
    return (weights @ values).to(q.dtype)
