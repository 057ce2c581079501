"""`sdpa_math`: PyTorch's unfused attention, pinned alone; it builds the whole score matrix."""

from __future__ import annotations

from ..backend import FLOATING, Limits
from ..kernel_support.sdpa import PinnedSDPA
from ..memory import expanded_bytes, inputs_bytes, item_bytes, key_size, mask_size, query_size, score_size
from ..platform import KINDS, Platform
from ..request import AttentionRequest


class SDPAMath(PinnedSDPA):
    """Slow and hungry for memory (q_len x kv_len per head); half types are computed in float32,
    but where the program allows less, as ComfyUI does."""

    id = "sdpa_math"
    summary = (
        "PyTorch's plain matrix form, pinned. Slow and memory-hungry; for finding out whether a fused kernel errs."
    )
    kinds = KINDS
    pin = "MATH"
    limits = Limits(dtypes=FLOATING, causal_cross=True, mixed_head_dims=True)

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Scores, weights and which scores are -inf; query and key scaled; half types as float32; the mask as a bias.

        As _scaled_dot_product_attention_math of torch 2.13 does it (ATen/native/transformers/attention.cpp). ComfyUI
        lets it compute in half types, for the whole process: then nothing is widened.
        """
        import torch

        half = getattr(torch.backends.cuda, "fp16_bf16_reduction_math_sdp_allowed", bool)()  # holds for the CPU too
        item = item_bytes(request) if half else max(4, item_bytes(request))
        widened = inputs_bytes(request) // item_bytes(request) * item if item_bytes(request) < item else 0
        scaled = (query_size(request) + key_size(request, request.num_heads)) * item
        bias = mask_size(request) * item + mask_size(request) if request.mask != "none" or request.is_causal else 0
        return score_size(request) * (2 * item + 1) + scaled + widened + bias + expanded_bytes(request)
