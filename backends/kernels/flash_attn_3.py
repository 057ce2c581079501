"""`flash_attn_3`: FlashAttention 3, for Hopper cards, built from the folder hopper/ of flash-attention."""

from __future__ import annotations

from ..values.aliases import DIFFUSERS, HUB, LENGTHS, VLLM_OMNI, WAN_WRAPPER, XFUSER, YUNCHANG, Alias
from ..values.limits import NO_MASK, Batch, HeadDim, HeadDimMultiple
from ..values.package import Package, Symbols
from ..values.platform import Platform
from .backend import Limits
from .support.flash import PAGE, FlashAttention
from .support.hub import HubKernel
from .support.layout import GRID


class FlashAttn3(FlashAttention):
    """Limits as in mha_fwd of hopper/flash_api.cpp: head sizes fill 16-byte vectors.

    Builds for sm80 exist behind a build flag; without a way to see it, only Hopper counts as supported. It has no
    limit on elements: it addresses tensors through descriptors, not through 32-bit offsets.
    """

    id = "flash_attn_3"
    summary = "FlashAttention 3, for Hopper cards. Faster there than version 2; takes no masks."
    aliases = (
        Alias(VLLM_OMNI, "FLASH_ATTN_3_HUB", HUB),
        Alias(DIFFUSERS, "_flash_3"),
        Alias(DIFFUSERS, "_flash_varlen_3", LENGTHS),
        Alias(DIFFUSERS, "_flash_3_hub", HUB),
        Alias(DIFFUSERS, "_flash_3_varlen_hub", f"{HUB}; {LENGTHS}"),
        Alias(WAN_WRAPPER, "flash_attn_3"),
        Alias(YUNCHANG, "FA3", "version 3 alone, not the family"),
        Alias(YUNCHANG, "FLASH_ATTN_3"),
        Alias(XFUSER, "FLASH_3"),
    )
    kinds = ("cuda",)
    requires = ("flash-attn-3",)
    packages = (
        Package(
            "flash-attn-3",
            "flash_attn_interface",
            "3.0.0",
            f"{PAGE}/tree/main/hopper",
            how="build it from {page}, with nvcc of the CUDA that torch has, for {tags}",
            systems=("linux",),
        ),
    )
    symbols = (Symbols("flash_attn_interface", ("flash_attn_func",)),)
    tested_on = ("cuda:9.0,packages=flash-attn-3==3.0.0",)
    module = "flash_attn_interface"
    hub = HubKernel("kernels-community/flash-attn3", 1, ((9, 0),))
    limits = Limits(HeadDim(max=256), HeadDimMultiple(8), NO_MASK, Batch(GRID))

    def capabilities(self, platform: Platform) -> tuple[tuple[int, int], ...]:
        return ((9, 0),)


BACKENDS = (FlashAttn3(),)
