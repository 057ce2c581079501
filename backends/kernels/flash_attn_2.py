"""`flash_attn_2`: FlashAttention 2, from the package flash-attn."""

from __future__ import annotations

from dataclasses import replace

from ..values.aliases import COMFYUI, DIFFUSERS, HUB, LENGTHS, SGLANG, VLLM_OMNI, WAN_WRAPPER, XFUSER, YUNCHANG, Alias
from ..values.limits import NO_MASK, Batch, HeadDim, Heads
from ..values.package import Package, Setting, Symbols
from ..values.platform import FLASH_TRITON_VARIABLE, Platform
from ..values.reasons import Reason, reason_id, template
from ..values.request import AttentionRequest
from .backend import Limits, package_reason
from .support.flash import PAGE, FlashAttention
from .support.hub import HubKernel
from .support.layout import GRID, Elements

SET_TRITON = f"set {FLASH_TRITON_VARIABLE}=TRUE before the program starts"
TRITON_REPORTED = "flash-attn's Triton backend is reported to run on RDNA 3 and 4; nobody here has tried it"

AMD_CARDS = ("gfx90a", "gfx942", "gfx950")
"""MI200, MI300 and MI350: what the released Composable Kernel backend lists (flash-attention, README)."""

RDNA = ("gfx11", "gfx12")
"""RDNA 3, 3.5 and 4, by how the names of their architectures begin."""

TRITON_OFF = template(
    "flash_triton",
    "on {gfx} flash-attn needs its Triton backend: {variable}=TRUE is not set (reported to run on RDNA 3 and 4)",
)
FIRST_WITH_TRITON = template("package.first", "{reason}, the first with that backend")


class FlashAttn2(FlashAttention):
    """Limits as in mha_fwd of csrc/flash_attn/flash_api.cpp, 2.8.3.

    Tensors of 2**31 elements or more: an index is multiplied in `int`, and reads elsewhere (fixed in the sources by
    https://github.com/Dao-AILab/flash-attention/pull/2260).
    Batch and heads are grid dimensions, which end at 65,535. 2.6.3 is the oldest version that Diffusers accepts; its
    limits are the same, but up to 2.7.2 there are no kernels for Blackwell (setup.py of the tags, pull request 1436).
    RDNA 3 and 4 have no Composable Kernel backend in the releases; the Triton backend, in the package from 2.7.1 on, is
    reported to run and to gain on gfx1100, gfx1151 and gfx1201. Its limits are assumed to be the same; it was not
    run for this project.
    On the Hub: the version that Diffusers 0.42 pins, on the cards that vLLM-Omni 0.30 uses it on.
    """

    id = "flash_attn_2"
    summary = "FlashAttention 2, from the package flash-attn. Fast and exact in half precision; takes no masks."
    aliases = (
        Alias(VLLM_OMNI, "FLASH_ATTN_HUB", HUB),
        Alias(SGLANG, "fa2", "plain flash-attn on every card, Blackwell too; fa takes version 4 there"),
        Alias(DIFFUSERS, "flash", "version 2 on Blackwell too; only flash_attn takes version 4 there"),
        Alias(DIFFUSERS, "flash_hub", HUB),
        Alias(DIFFUSERS, "flash_varlen", LENGTHS),
        Alias(DIFFUSERS, "flash_varlen_hub", f"{HUB}; {LENGTHS}"),
        Alias(COMFYUI, "flash"),
        Alias(WAN_WRAPPER, "flash_attn_2"),
        Alias(YUNCHANG, "FA", "plain flash-attn, not the family"),
        Alias(YUNCHANG, "FLASH_ATTN", "plain flash-attn, not the family"),
        Alias(XFUSER, "FLASH"),
    )
    kinds = ("cuda", "rocm")
    min_capability = (8, 0)
    architectures = AMD_CARDS
    requires = ("flash-attn>=2.6.3",)
    packages = (
        Package(
            "flash-attn",
            "flash_attn",
            "2.8.3",
            f"{PAGE}/releases",
            note="PyPI has only its sources: building them takes nvcc (hipcc on AMD) and up to hours, and fails on "
            "Windows",
            note_on=lambda machine: f"{SET_TRITON}, for the build too; {TRITON_REPORTED}" if _rdna(machine) else "",
            setting=Setting(SET_TRITON, TRITON_REPORTED, lambda machine: replace(machine, flash_triton=True)),
            environment=lambda machine: "flash-attn on Triton" if machine.flash_triton else "",
        ),
    )
    symbols = (Symbols("flash_attn", ("flash_attn_func",)),)
    tested_on = (
        "cuda:8.0,packages=flash-attn==2.8.3",
        "cuda:12.0,packages=flash-attn==2.8.3",
        "rocm:gfx942,packages=flash-attn==2.8.3",
    )
    module = "flash_attn"
    hub = HubKernel("kernels-community/flash-attn2", 3, ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0)))
    limits = Limits(HeadDim(max=256), NO_MASK, Elements(), Batch(GRID), Heads(GRID))

    def unavailable_reasons(self, platform: Platform) -> list[Reason]:
        reasons = super().unavailable_reasons(platform)
        if _rdna(platform):
            return _on_rdna(platform, [reason for reason in reasons if reason_id(reason) != "architecture"])
        if platform.architecture == "Blackwell" and platform.version("flash-attn"):
            reason = package_reason("flash-attn>=2.7.3", platform)
            reasons += [Reason("package.needed", reason=reason, by=platform.sm)] if reason else []
        return reasons

    def kernel_name(self, request: AttentionRequest, platform: Platform) -> str | None:
        return f"{self.id} (Triton, reported)" if _rdna(platform) else super().kernel_name(request, platform)


def _rdna(platform: Platform) -> bool:
    return platform.kind == "rocm" and (platform.gfx or "").startswith(RDNA)


def _on_rdna(platform: Platform, reasons: list[Reason]) -> list[Reason]:
    if not platform.flash_triton:
        reasons.append(Reason(TRITON_OFF, gfx=platform.gfx, variable=FLASH_TRITON_VARIABLE))
    if platform.version("flash-attn"):
        reason = package_reason("flash-attn>=2.7.1", platform)
        reasons += [Reason(FIRST_WITH_TRITON, reason=reason)] if reason else []
    return reasons


BACKENDS = (FlashAttn2(),)
