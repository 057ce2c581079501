"""`sdpa_efficient`: the memory-efficient (CUTLASS) kernel inside PyTorch, pinned alone."""

from __future__ import annotations

from ..values.aliases import DIFFUSERS, XFUSER, YUNCHANG, Alias
from ..values.limits import Causal, Dtypes, HeadDim, HeadDimMultiple, ValueHeadDim
from ..values.platform import Platform
from ..values.request import AttentionRequest
from .backend import HALF, Limits
from .support.lse import PinnedWithLse
from .support.workspace import expanded_bytes


class SDPAEfficient(PinnedWithLse):
    """Limits as in ATen/native/transformers/cuda/sdp_utils.cpp: head sizes fill 16-byte vectors."""

    id = "sdpa_efficient"
    summary = "PyTorch's memory-efficient kernel, pinned. Takes masks and float32, and runs on older cards."
    aliases = (
        Alias(DIFFUSERS, "_native_efficient"),
        Alias(YUNCHANG, "TORCH_EFFICIENT"),
        Alias(XFUSER, "SDPA_EFFICIENT"),
    )
    kinds = ("cuda", "rocm")
    min_capability = (5, 0)
    pin = "EFFICIENT_ATTENTION"
    limits = Limits(
        Dtypes(("float16", "bfloat16", "float32")),
        HeadDim(),
        HeadDimMultiple(4),
        HeadDimMultiple(8, HALF),
        Causal("any"),
        ValueHeadDim(may_differ=True),
    )
    old_limits = limits.but(Dtypes(("float16", "float32")), HeadDimMultiple(4), HeadDimMultiple(8, ("float16",)))

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        return expanded_bytes(request)

    def limits_on(self, platform: Platform) -> Limits:
        old = platform.capability is not None and platform.capability < (8, 0)
        return self.old_limits if old else self.limits


BACKENDS = (SDPAEfficient(),)
