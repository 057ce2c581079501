"""`sdpa_math`: PyTorch's unfused attention, pinned alone, in float32 at least; it builds the whole score matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..values.aliases import DIFFUSERS, XFUSER, YUNCHANG, Alias
from ..values.limits import Causal, Dtypes, ValueHeadDim
from ..values.platform import KINDS, Platform
from ..values.request import AttentionCall, AttentionRequest
from .backend import FLOATING, Kernel, Limits, LseKernel
from .support.lse import checked
from .support.precision import float32_is_full, wide_dtype
from .support.sdpa import PinnedSDPA, pinned
from .support.textbook import in_full_precision
from .support.workspace import (
    expanded_bytes,
    inputs_bytes,
    item_bytes,
    key_size,
    mask_size,
    output_size,
    query_size,
    score_size,
)

if TYPE_CHECKING:
    import torch


class SDPAMath(PinnedSDPA):
    """Slow and hungry for memory (q_len x kv_len per head).

    Half types are widened to float32 here: torch does so only until something in the process calls
    `allow_fp16_bf16_reduction_math_sdp`, which importing ComfyUI does. float64 is used while float32 products may be
    computed less exactly (`support/precision.py`).
    """

    id = "sdpa_math"
    summary = (
        "PyTorch's plain matrix form, pinned. Slow and memory-hungry; for finding out whether a fused kernel errs."
    )
    aliases = (Alias(DIFFUSERS, "_native_math"), Alias(YUNCHANG, "TORCH_MATH"), Alias(XFUSER, "SDPA_MATH"))
    arithmetic = "fp32"
    kinds = KINDS
    pin = "MATH"
    holds_scores = True
    lse = True
    limits = Limits(Dtypes(FLOATING), Causal("any"), ValueHeadDim(may_differ=True))

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Scores, weights and which scores are -inf; query and key scaled; inputs and output widened; mask as a bias.

        As _scaled_dot_product_attention_math of torch 2.13 does it (ATen/native/transformers/attention.cpp).
        """
        given = item_bytes(request)
        item = max(given, 4 if platform.kind == "mps" or float32_is_full(platform.kind) else 8)
        widened = (inputs_bytes(request) // given + output_size(request)) * item if given < item else 0
        scaled = (query_size(request) + key_size(request, request.num_heads)) * item
        bias = mask_size(request) * item + mask_size(request) if request.mask != "none" or request.is_causal else 0
        return score_size(request) * (2 * item + 1) + scaled + widened + bias + expanded_bytes(request)

    def load(self, platform: Platform) -> Kernel:
        import torch

        math = pinned(self.pin, platform)

        def run(call: AttentionCall) -> torch.Tensor:
            query, mask = call.query, call.attn_mask
            device = query.device.type
            wide = wide_dtype(query.dtype, device)
            if mask is not None and mask.is_floating_point():
                mask = mask.to(wide)
            with torch.autocast(device, enabled=False):
                output = math(
                    call.changed(query=query.to(wide), key=call.key.to(wide), value=call.value.to(wide), attn_mask=mask)
                )
            return output.to(query.dtype)

        return run

    def load_lse(self, platform: Platform) -> LseKernel:
        """torch's operator gives none, so both come from one matrix of scores, widened as in `load`."""
        return checked(in_full_precision)


BACKENDS = (SDPAMath(),)
