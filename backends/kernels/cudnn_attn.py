"""`cudnn_attn`: cuDNN's fused attention through PyTorch, pinned alone."""

from __future__ import annotations

from ..values.aliases import DIFFUSERS, SGLANG, VLLM_OMNI, XFUSER, YUNCHANG, Alias
from ..values.limits import Batch, HeadDim, HeadDimMultiple, Heads, KeyLength
from ..values.platform import Platform
from ..values.reasons import Reason, template
from ..values.request import AttentionRequest
from .backend import Limits
from .support.layout import GRID
from .support.sdpa import PinnedSDPA

MIN_CUDNN = 90500
"""vLLM-Omni's minimum for selecting cuDNN automatically; newer reports say 9.7 for native Blackwell kernels."""

WIDE_CUDNN = 92200
"""cuDNN must be newer than this for head sizes above 128, and only on sm90 and sm10x (torch's own check)."""

SMALL_QUERY = 128 * 1024
"""Query elements below which ComfyUI found cuDNN slower than PyTorch's other kernels (ComfyUI pull request 15296)."""

NEEDS = f"cuDNN>={MIN_CUDNN // 10000}.{MIN_CUDNN // 100 % 100}"
OLD_CUDNN = template("cudnn", "cuDNN {found} < {min}")
NO_CUDNN = template("cudnn.none", "PyTorch has no cuDNN")
SWITCHED_OFF = template("cudnn.off", "something in this process called torch.backends.cuda.enable_cudnn_sdp(False)")
SMALL = template("cudnn.small", "query of {elements} elements < {min}, where cuDNN is not the fastest")


class CudnnAttn(PinnedSDPA):
    """Limits as in check_cudnn_tensor_shapes of ATen/native/transformers/cuda/sdp_utils.cpp."""

    id = "cudnn_attn"
    summary = "cuDNN's fused attention, pinned. Fast with masks; the usual choice on Blackwell."
    aliases = (
        Alias(VLLM_OMNI, "CUDNN_ATTN"),
        Alias(SGLANG, "torch_cudnn_sdpa"),
        Alias(SGLANG, "cudnn_sdpa"),
        Alias(
            SGLANG,
            "dynamic_cudnn_sdpa",
            "SGLang gives causal, grouped and some very long calls to FlashAttention; here cuDNN takes every call that "
            "it can run, and the platform's route the rest",
        ),
        Alias(DIFFUSERS, "_native_cudnn"),
        Alias(YUNCHANG, "TORCH_CUDNN"),
        Alias(XFUSER, "CUDNN"),
    )
    kinds = ("cuda",)
    min_capability = (8, 0)
    pin = "CUDNN_ATTENTION"
    limits = Limits(HeadDim(max=128), HeadDimMultiple(8), KeyLength(min=2), Batch(GRID), Heads(GRID))
    wide_limits = limits.but(HeadDim(max=256))

    def unavailable_reasons(self, platform: Platform) -> list[Reason]:
        reasons = super().unavailable_reasons(platform)
        if platform.kind != "cuda":
            return reasons
        if platform.cudnn is None:
            reasons.append(Reason(NO_CUDNN))
        elif platform.cudnn < MIN_CUDNN:
            reasons.append(Reason(OLD_CUDNN, found=platform.cudnn, min=MIN_CUDNN, needs=NEEDS))
        if not platform.cudnn_sdp_enabled:
            reasons.append(Reason(SWITCHED_OFF))
        return reasons

    def library(self, platform: Platform) -> str:
        return f"cuDNN {platform.cudnn}" if platform.cudnn else ""

    def limits_on(self, platform: Platform) -> Limits:
        wide_card = platform.capability is not None and (platform.capability == (9, 0) or platform.capability[0] == 10)
        return self.wide_limits if wide_card and (platform.cudnn or 0) > WIDE_CUDNN else self.limits

    def avoid_reasons(self, request: AttentionRequest, platform: Platform) -> list[Reason]:
        elements = request.batch * request.num_heads * request.q_len * request.head_dim
        if elements >= SMALL_QUERY:
            return []
        return [Reason(SMALL, elements=elements, min=SMALL_QUERY)]


BACKENDS = (CudnnAttn(),)
