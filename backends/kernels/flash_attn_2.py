"""`flash_attn_2`: FlashAttention 2, from the package flash-attn."""

from __future__ import annotations

from ..backend import HALF, Limits
from ..flash import FlashAttention
from ..layout import INT32_ELEMENTS
from ..platform import Platform

AMD_CARDS = ("gfx90a", "gfx942", "gfx950")
"""MI200, MI300 and MI350: what the released Composable Kernel backend lists (flash-attention, README)."""


class FlashAttn2(FlashAttention):
    """Limits as in mha_fwd of csrc/flash_attn/flash_api.cpp, 2.8.3.

    Tensors of 2**31 elements or more: an index is multiplied in `int`, and reads elsewhere
    (https://github.com/Dao-AILab/flash-attention/issues/767, fixed in the sources by pull request 2260).
    Batch and heads are grid dimensions, which end at 65,535. 2.6.3 is the oldest version that Diffusers accepts.
    """

    id = "flash_attn_2"
    summary = "FlashAttention 2, from the package flash-attn. Fast and exact in half precision; takes no masks."
    kinds = ("cuda", "rocm")
    min_capability = (8, 0)
    requires = ("flash-attn>=2.6.3",)
    module = "flash_attn"
    limits = Limits(
        dtypes=HALF,
        max_head_dim=256,
        masks=("none",),
        max_elements=INT32_ELEMENTS,
        max_batch=65535,
        max_heads=65535,
    )

    def unavailable_reasons(self, platform: Platform) -> list[str]:
        reasons = super().unavailable_reasons(platform)
        if platform.kind == "rocm" and platform.gfx not in AMD_CARDS:
            reasons.append(f"architecture {platform.gfx or 'unknown'} not in ({', '.join(AMD_CARDS)})")
        return reasons
