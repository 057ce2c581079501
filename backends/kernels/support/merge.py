"""Merges partial results of one attention call over disjoint sets of keys, as in ring attention.

Softmax over all keys is a mean of the softmaxes over the parts, weighted by exp(LSE): FlashAttention
(arXiv:2205.14135), section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge (output, LSE) pairs over disjoint sets of keys, as `attention(..., return_lse=True)` returns them.

    Args:
        parts: each an output (batch, num_heads, q_len, v_head_dim) and its LSE (batch, num_heads, q_len), the natural
            logarithm, -inf for a row that sees no key of this part.

    Returns:
        The output, in the dtype of the first part's, and the LSE over all keys, in float32 (float64 if a part is); a
        row that sees no key in any part has zeros and -inf.

    With a float32 LSE the result of float64 outputs has a relative error of up to 1e-6.

    Raises:
        ValueError: there is no part, or their shapes disagree.
    """
    import torch

    outputs, sums = [output for output, _ in parts], [lse for _, lse in parts]
    if not parts or any(
        output.shape != outputs[0].shape or lse.shape != outputs[0].shape[:-1] for output, lse in parts
    ):
        shapes = [(tuple(output.shape), tuple(lse.shape)) for output, lse in parts]
        raise ValueError(f"parts to merge must have one shape, and there must be some: {shapes}")
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in (*outputs, *sums)) else torch.float32
    lse = torch.stack(sums).to(wide)
    highest = lse.amax(dim=0)
    highest = highest.masked_fill(highest.isneginf(), 0.0)  # -inf minus -inf would be NaN
    weights = torch.exp(lse - highest)
    total = weights.sum(dim=0)
    weights = weights / total.masked_fill(total == 0, 1.0)
    whole = torch.zeros_like(outputs[0], dtype=wide)
    for output, weight in zip(outputs, weights, strict=True):
        # Rows of weight 0 may have NaN, and 0 * NaN is NaN.
        whole += output.to(wide).masked_fill((weight == 0)[..., None], 0.0) * weight[..., None]
    return whole.to(outputs[0].dtype), highest + total.log()
