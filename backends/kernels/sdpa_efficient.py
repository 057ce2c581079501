"""`sdpa_efficient`: the memory-efficient (CUTLASS) kernel inside PyTorch, pinned alone."""

from __future__ import annotations

from dataclasses import replace

from ..values.platform import Platform
from ..values.request import AttentionRequest
from .backend import Limits
from .support.sdpa import PinnedSDPA
from .support.workspace import expanded_bytes


class SDPAEfficient(PinnedSDPA):
    """Limits as in ATen/native/transformers/cuda/sdp_utils.cpp: head sizes fill 16-byte vectors."""

    id = "sdpa_efficient"
    summary = "PyTorch's memory-efficient kernel, pinned. Takes masks and float32, and runs on older cards."
    kinds = ("cuda", "rocm")
    min_capability = (5, 0)
    pin = "EFFICIENT_ATTENTION"
    limits = Limits(
        dtypes=("float16", "bfloat16", "float32"),
        head_dim_multiple=4,
        head_dim_steps=(("float16", 8), ("bfloat16", 8)),
        causal_cross=True,
        mixed_head_dims=True,
    )
    old_limits = replace(limits, dtypes=("float16", "float32"))

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        return expanded_bytes(request)

    def limits_on(self, platform: Platform) -> Limits:
        old = platform.capability is not None and platform.capability < (8, 0)
        return self.old_limits if old else self.limits
