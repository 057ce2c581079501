"""`flash_attn_4`: FlashAttention 4, from the package flash-attn-4 (CuTe DSL)."""

from __future__ import annotations

from ..values.aliases import DIFFUSERS, HUB, XFUSER, Alias
from ..values.limits import NO_MASK, Batch, HeadDim, HeadDimMultiple
from ..values.package import Package, Symbols
from ..values.platform import Platform
from ..values.versions import meets
from .backend import Limits
from .support.flash import PAGE, FlashAttention
from .support.hub import HubKernel
from .support.layout import GRID, Elements


def _pip_arguments(platform: Platform, machine: str) -> tuple[str, ...]:
    if machine != "linux_x86_64" or not meets(platform.torch, ">=2.6"):
        return ()
    extra = "[cu13]" if (platform.cuda or "").startswith("13.") else ""
    return (f"flash-attn-4{extra}==4.0.0b36", f"torch=={platform.torch}")


class FlashAttn4(FlashAttention):
    """Limits as in flash_attn/cute/interface.py, 4.0.0b36; b5 is the first version with sm80 and sm120.

    On sm90 head sizes reach 256; on sm100 128, and exactly 256 through a separate kernel, which is not used here. On
    sm80 and sm120 the package checks no range; 128 certainly fits their shared memory. The arithmetic on
    coordinates is 32 bits wide (https://github.com/Dao-AILab/flash-attention/issues/2611 saw it wrap in the backward
    pass), so tensors end at 2**31 elements here. Of the Hub's version 0 a failure on sm120 is reported, so it is taken
    on Hopper and sm10x only.
    """

    id = "flash_attn_4"
    summary = "FlashAttention 4, from the package flash-attn-4. The FlashAttention for Blackwell; takes no masks."
    aliases = (Alias(DIFFUSERS, "flash_4_hub", HUB), Alias(XFUSER, "FLASH_4"))
    kinds = ("cuda",)
    min_capability = (8, 0)
    requires = ("flash-attn-4>=4.0.0b5",)
    packages = (
        Package(
            "flash-attn-4",
            "flash_attn.cute",
            "4.0.0b36",
            f"{PAGE}/tree/main/flash_attn/cute",
            how="see {page}; it has to fit {tags}",
            note="a pre-release; pip keeps torch {torch} or stops",
            systems=("linux",),
            arguments=_pip_arguments,
        ),
    )
    symbols = (Symbols("flash_attn.cute", ("flash_attn_func",)),)
    tested_on = (
        "cuda:8.9,packages=flash-attn-4==4.0.0b36",
        "cuda:9.0,packages=flash-attn-4==4.0.0b36",
        "cuda:10.0,packages=flash-attn-4==4.0.0b36",
        "cuda:12.0,packages=flash-attn-4==4.0.0b36",
    )
    module = "flash_attn.cute"
    hub = HubKernel("kernels-community/flash-attn4", 0, ((9, 0), (10, 0), (10, 3)))
    limits = Limits(HeadDim(max=128), HeadDimMultiple(8), NO_MASK, Elements(), Batch(GRID))
    hopper_limits = limits.but(HeadDim(max=256))

    def limits_on(self, platform: Platform) -> Limits:
        return self.hopper_limits if platform.architecture == "Hopper" else self.limits


BACKENDS = (FlashAttn4(),)
