"""`reference`: attention by its definition, in float64 (float32 where a device has no float64)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..values.aliases import LISTED, SMART_DIFFUSION, Alias
from ..values.limits import Causal, Dtypes, MaskWithCausal, ValueHeadDim
from ..values.platform import KINDS, Platform
from ..values.request import AttentionCall, AttentionRequest
from .backend import FLOATING, Backend, Kernel, Limits, LseKernel
from .support.lse import checked
from .support.textbook import attention, attention_with_lse
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
    lse = True
    limits = Limits(Dtypes(FLOATING), Causal("any"), MaskWithCausal(taken=True), ValueHeadDim(may_differ=True))

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Everything in float64, and three matrices of scores: before the mask, after it, and as weights."""
        heads = request.num_heads
        inputs = query_size(request) + key_size(request, heads) + value_size(request, heads)
        return (3 * score_size(request) + 2 * inputs + output_size(request)) * 8

    def load(self, platform: Platform) -> Kernel:
        return reference_attention

    def load_lse(self, platform: Platform) -> LseKernel:
        return checked(lambda call: attention_with_lse(call, _wide(call)))


def reference_attention(call: AttentionCall) -> torch.Tensor:
    """Compute one call in float64 and return it in the query's dtype; rows without a visible key give zeros."""
    return attention(call, _wide(call))


def _wide(call: AttentionCall) -> torch.dtype:
    import torch

    return torch.float32 if call.query.device.type == "mps" else torch.float64


BACKENDS = (Reference(),)
