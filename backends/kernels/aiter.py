"""`aiter`: AMD's AITER kernels for Instinct cards, from the package amd-aiter."""

from __future__ import annotations

from importlib import import_module

from ..values.aliases import DIFFUSERS, HALF_V4, HUB, SGLANG, XFUSER, YUNCHANG, Alias
from ..values.limits import NO_MASK, Batch, Dtypes, HeadDim, HeadDimIn, Heads
from ..values.package import Package, Symbols
from ..values.platform import Platform
from ..values.reasons import Reason, template
from .backend import Kernel, Limits
from .support.flash import FlashAttention
from .support.hub import HubKernel
from .support.layout import GRID, Elements

AMD_CARDS = ("gfx942", "gfx950")
"""MI300 and MI350: where vLLM-Omni 0.30 uses it."""

NAMESAKE_PACKAGE = template("package.aiter", "package aiter {found} is a library for asyncio with the same name")
NAMESAKE = "the package amd-aiter, for AMD cards; aiter on PyPI is another package, for asyncio"


def _pip_arguments(platform: Platform, machine: str) -> tuple[str, ...]:
    return ("amd-aiter==0.1.7.post2.dev18",) if platform.os == "linux" else ()


class Aiter(FlashAttention):
    """flash_attn_func of aiter/ops/mha.py (https://github.com/ROCm/aiter); 0.1.5 is the oldest that Diffusers took.

    It takes a bias of (q_len, kv_len) only, the same for every head and sample, so masks are refused. The first call
    of a kind compiles its kernel with hipcc. Some versions return a tuple of one tensor. PyPI's package `aiter` is an
    asyncio library, so `load` checks what was imported. The Hub's build, which Diffusers 0.42 pins, was compiled ahead
    of time for bfloat16 and two head sizes (aiter-flash-attn-ck/README.md of
    https://github.com/huggingface/kernels-community).
    """

    id = "aiter"
    summary = "AMD's AITER kernels, for MI300 and MI350. Fast and exact in half precision; takes no masks."
    aliases = (
        Alias(
            SGLANG,
            "aiter",
            f"{NAMESAKE}. SGLang uses it automatically on AMD, and vLLM runs it there as FLASH_ATTN; "
            "SGLANG_DIFFUSION_AITER_FP8_ATTN is not read: half precision only",
        ),
        Alias(DIFFUSERS, "aiter", NAMESAKE),
        Alias(DIFFUSERS, "aiter_fa2_hub", f"{HUB}; {NAMESAKE}"),
        Alias(YUNCHANG, "AITER", NAMESAKE),
        Alias(YUNCHANG, "AITER_ROCM", NAMESAKE),
        Alias(XFUSER, "AITER", NAMESAKE),
        Alias(XFUSER, "AITER_BF16", HALF_V4),
    )
    lse = False  # whether it is natural or base 2 was not checked
    kinds = ("rocm",)
    architectures = AMD_CARDS
    requires = ("amd-aiter>=0.1.5",)
    packages = (
        Package(
            "amd-aiter",
            "aiter",
            "0.1.7.post2.dev18",
            "https://github.com/ROCm/aiter",
            how="see {page}; it has to fit {tags}",
            note="kernels are compiled with hipcc at their first call; PyPI's 'aiter' is an unrelated package",
            systems=("linux",),
            arguments=_pip_arguments,
            declares_torch=False,
        ),
    )
    asks_for = (*FlashAttention.asks_for, "aiter")
    symbols = (Symbols("aiter", ("flash_attn_func",)),)
    tested_on = ("rocm:gfx942,packages=amd-aiter==0.1.7",)
    module = "aiter"
    varlen = False  # its flash_attn_varlen_func differs between versions, and no fake of it could be checked
    hub = HubKernel("kernels-community/aiter-flash-attn-ck", 1, architectures=AMD_CARDS)
    limits = Limits(HeadDim(max=256), NO_MASK, Elements(), Batch(GRID), Heads(GRID))
    hub_limits = limits.but(Dtypes(("bfloat16",)), HeadDimIn((64, 128)))

    def limits_on(self, platform: Platform) -> Limits:
        return self.hub_limits if self.from_hub(platform) else self.limits

    def unavailable_reasons(self, platform: Platform) -> list[Reason]:
        reasons = super().unavailable_reasons(platform)
        other = platform.version("aiter")
        missing = platform.version("amd-aiter") is None and self.from_hub(platform) is None
        if platform.kind in self.kinds and other and missing:
            reasons.append(Reason(NAMESAKE_PACKAGE, found=other))
        return reasons

    def load(self, platform: Platform) -> Kernel:
        if self.from_hub(platform):
            return super().load(platform)
        module = import_module("aiter")
        if not hasattr(module, "flash_attn_func"):
            raise ImportError(
                f"{getattr(module, '__file__', 'aiter')} has no flash_attn_func: PyPI's package aiter, for asyncio, "
                "stands in the way of amd-aiter"
            )
        return super().load(platform)


BACKENDS = (Aiter(),)
