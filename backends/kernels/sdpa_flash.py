"""`sdpa_flash`: the FlashAttention kernel inside PyTorch, pinned alone."""

from __future__ import annotations

from ..backend import FLOATING, HALF, Limits
from ..platform import Platform
from ..sdpa import PinnedSDPA


class SDPAFlash(PinnedSDPA):
    """Limits as in ATen/native/transformers/cuda/sdp_utils.cpp; the CPU has a kernel of its own with other limits."""

    id = "sdpa_flash"
    summary = "PyTorch's built-in FlashAttention, pinned. No package needed; on CUDA it takes no masks."
    kinds = ("cuda", "rocm", "cpu")
    min_capability = (8, 0)
    pin = "FLASH_ATTENTION"
    limits = Limits(dtypes=HALF, max_head_dim=256, masks=("none",))
    cpu_limits = Limits(dtypes=FLOATING)

    def limits_on(self, platform: Platform) -> Limits:
        return self.cpu_limits if platform.kind == "cpu" else self.limits

    def unavailable_reasons(self, platform: Platform) -> list[str]:
        reasons = super().unavailable_reasons(platform)
        if not reasons and platform.kind == "cuda" and platform.os == "win32" and platform.torch:
            reasons += _missing_on_windows(platform)
        return reasons


def _missing_on_windows(platform: Platform) -> list[str]:
    """Windows wheels are built without the FlashAttention kernel; a live torch says so itself."""
    if platform.described:
        return ["PyTorch's Windows wheels are built without the FlashAttention kernel"]
    import torch

    built = getattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)()
    return [] if built else ["this PyTorch is built without the FlashAttention kernel"]
