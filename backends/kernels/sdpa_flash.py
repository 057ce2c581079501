"""`sdpa_flash`: the FlashAttention kernel inside PyTorch, pinned alone."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING

from ..values.aliases import DIFFUSERS, XFUSER, YUNCHANG, Alias
from ..values.limits import NO_MASK, Dtypes, GroupedHeads, HeadDim, Scale
from ..values.platform import Platform
from ..values.reasons import Reason, template
from .backend import FLOATING, Limits, package_reason
from .support.layout import on_device_of
from .support.lse import PinnedWithLse

if TYPE_CHECKING:
    import torch

    from .support.varlen import VarlenCall, VarlenKernel

NOT_IN_WHEELS = template("flash.wheels", "PyTorch's Windows wheels are built without the FlashAttention kernel")
NOT_IN_BUILD = template("flash.build", "this PyTorch is built without the FlashAttention kernel")


class SDPAFlash(PinnedWithLse):
    """Limits as in ATen/native/transformers/cuda/sdp_utils.cpp; the CPU kernel has other limits."""

    id = "sdpa_flash"
    summary = "PyTorch's built-in FlashAttention, pinned. No package needed; on CUDA it takes no masks."
    aliases = (Alias(DIFFUSERS, "_native_flash"), Alias(YUNCHANG, "TORCH_FLASH"), Alias(XFUSER, "SDPA_FLASH"))
    kinds = ("cuda", "rocm", "cpu")
    min_capability = (8, 0)
    pin = "FLASH_ATTENTION"
    limits = Limits(HeadDim(max=256), NO_MASK)
    cpu_limits = Limits(Dtypes(FLOATING))
    varlen = True

    def limits_on(self, platform: Platform) -> Limits:
        return self.cpu_limits if platform.kind == "cpu" else self.limits

    def varlen_limits(self, platform: Platform) -> Limits | None:
        """torch.nn.attention.varlen came with 2.10, which takes neither a scale nor, as documented, grouped heads.

        https://docs.pytorch.org/docs/2.10/nn.attention.varlen.html; the scale came with 2.11, enable_gqa with 2.12.
        """
        if platform.kind != "cuda" or package_reason("torch>=2.10", platform):
            return None
        scale = package_reason("torch>=2.11", platform) is None
        grouped = package_reason("torch>=2.12", platform) is None
        return self.limits.but(Scale(scale), GroupedHeads(grouped))

    def load_varlen(self, platform: Platform) -> VarlenKernel:
        varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
        known, limits = signature(varlen_attn).parameters, self.varlen_limits(platform)
        promised = {
            "scale": limits is not None and limits[Scale].taken,
            "enable_gqa": limits is not None and limits[GroupedHeads].taken,
        }
        lacking = [name for name, wanted in promised.items() if wanted and name not in known]
        if lacking:  # an early pre-release of the version that brought them
            raise NotImplementedError(f"varlen_attn of torch {platform.torch} has no {', '.join(lacking)}")

        def run(call: VarlenCall) -> torch.Tensor:
            given: dict[str, object] = {"scale": call.scale, "enable_gqa": call.query.shape[1] != call.key.shape[1]}
            with on_device_of(call.query):
                output: torch.Tensor = varlen_attn(
                    call.query,
                    call.key,
                    call.value,
                    call.q_offsets,
                    call.kv_offsets,
                    max(call.q_lengths),
                    max(call.kv_lengths),
                    **{name: value for name, value in given.items() if name in known},
                )
            return output

        return run

    def unavailable_reasons(self, platform: Platform) -> list[Reason]:
        reasons = super().unavailable_reasons(platform)
        if not reasons and platform.kind == "cuda" and platform.os == "win32" and platform.torch:
            reasons += _missing_on_windows(platform)
        return reasons


def _missing_on_windows(platform: Platform) -> list[Reason]:
    """Windows wheels are built without the FlashAttention kernel; a running torch reports it."""
    if platform.described:
        return [Reason(NOT_IN_WHEELS)]
    import torch

    built = getattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)()
    return [] if built else [Reason(NOT_IN_BUILD)]


BACKENDS = (SDPAFlash(),)
