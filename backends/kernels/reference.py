"""`reference`: attention by its definition, in float64 (float32 where a device has no float64)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..values.aliases import LISTED, SMART_DIFFUSION, Alias
from ..values.limits import Causal, Dtypes, MaskWithCausal, ValueHeadDim
from ..values.platform import KINDS, Platform
from ..values.request import AttentionCall, AttentionRequest
from .backend import FLOATING, Backend, Kernel, Limits
from .support.sdpa import expand_kv
from .support.workspace import key_size, output_size, query_size, score_size, value_size

if TYPE_CHECKING:
    import torch


class Reference(Backend):
    """softmax(scale * Q K^T + mask) V, Vaswani et al. 2017 (arXiv:1706.03762), equation 1; for tests and checks."""

    id = "reference"
    summary = (
        "Attention by its textbook definition in double precision. Very slow; the yardstick for every other backend."
    )
    aliases = (Alias(SMART_DIFFUSION, "ref", f"{LISTED}; here it is the slow double-precision reference"),)
    arithmetic = "fp32"
    kinds = KINDS
    candidate = False
    by_name_only = True
    holds_scores = True
    limits = Limits(Dtypes(FLOATING), Causal("any"), MaskWithCausal(taken=True), ValueHeadDim(may_differ=True))

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Everything in float64, and three matrices of scores: before the mask, after it, and as weights."""
        heads = request.num_heads
        inputs = query_size(request) + key_size(request, heads) + value_size(request, heads)
        return (3 * score_size(request) + 2 * inputs + output_size(request)) * 8

    def load(self, platform: Platform) -> Kernel:
        return reference_attention


def reference_attention(call: AttentionCall) -> torch.Tensor:
    """Compute one call in float64 and return it in the query's dtype; rows without a visible key give zeros."""
    import torch

    wide = torch.float32 if call.query.device.type == "mps" else torch.float64
    key, value = expand_kv(call)
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
    # Of a row without a visible key softmax makes NaN. NaN of the inputs stays: it is the answer.
    unseen = scores.isneginf().all(dim=-1, keepdim=True)
    weights = torch.softmax(scores, dim=-1).masked_fill(unseen, 0.0)
    return (weights @ value.to(wide)).to(call.query.dtype)


BACKENDS = (Reference(),)
