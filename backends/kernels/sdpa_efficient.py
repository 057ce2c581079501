"""`sdpa_efficient`: the memory-efficient (CUTLASS) kernel inside PyTorch, pinned alone."""

from __future__ import annotations

from ..backend import Limits
from ..platform import Platform
from ..request import AttentionRequest
from ..sdpa import PinnedSDPA


class SDPAEfficient(PinnedSDPA):
    """Limits as in ATen/native/transformers/cuda/sdp_utils.cpp: head sizes fill 16-byte vectors."""

    id = "sdpa_efficient"
    summary = "PyTorch's memory-efficient kernel, pinned. Takes masks and float32, and runs on older cards."
    kinds = ("cuda", "rocm")
    min_capability = (5, 0)
    pin = "EFFICIENT_ATTENTION"
    expands_gqa = True
    limits = Limits(
        dtypes=("float16", "bfloat16", "float32"), head_dim_multiple=4, causal_cross=True, mixed_head_dims=True
    )

    def unsupported_reasons(self, request: AttentionRequest, platform: Platform) -> list[str]:
        reasons = super().unsupported_reasons(request, platform)
        if request.dtype in ("float16", "bfloat16"):
            for size in dict.fromkeys((request.head_dim, request.v_head_dim or request.head_dim)):
                if size % 8:
                    reasons.append(f"head_dim {size} is not a multiple of 8 for {request.dtype}")
        if request.dtype == "bfloat16" and platform.capability is not None and platform.capability < (8, 0):
            reasons.append(
                f"dtype bfloat16 needs compute capability 8.0 > {platform.capability[0]}.{platform.capability[1]}"
            )
        return reasons
