"""`flash_attn`: the backend group that takes the best installed FlashAttention for the card.

Hopper: 3, then 4, then 2. Blackwell: 4 only. AMD: AITER, then 2. Both as in vLLM-Omni. All others: 2.
"""

from __future__ import annotations

from ..values.aliases import FASTVIDEO, SGLANG, SMART_DIFFUSION, VLLM_OMNI, Alias
from .group import BackendGroup

FAMILY = "the FlashAttention family, as there: the best installed member for the card, whatever the number says"

BACKENDS = (
    BackendGroup(
        "flash_attn",
        "FlashAttention, the best installed version for the card; AITER on AMD. Exact; takes no masks.",
        order=("flash_attn_2",),
        on={
            "Hopper": ("flash_attn_3", "flash_attn_4", "flash_attn_2"),
            "Blackwell": ("flash_attn_4",),
            "rocm": ("aiter", "flash_attn_2"),
        },
        aliases=(
            Alias(
                VLLM_OMNI,
                "FLASH_ATTN",
                "only installed packages count, not the kernels that vLLM bundles. On Blackwell version 4 only, as "
                "there: "
                "plain flash-attn (version 2) is not taken, flash_attn_2 asks for it. On AMD AITER before flash-attn, "
                "as "
                "there. On NPUs vLLM runs mindiesd's kernels; here it falls back",
            ),
            Alias(SGLANG, "fa", "on compute capability 12.x SGLang runs SDPA; here version 4, where it has kernels"),
            Alias(SGLANG, "fa3", FAMILY),
            Alias(SGLANG, "fa4", FAMILY),
            Alias(SMART_DIFFUSION, "flash_attn"),
            Alias(
                FASTVIDEO,
                "FLASH_ATTN",
                "version 3 or 2 there, version 4 with FASTVIDEO_FA4=1; here the best installed member for the card",
            ),
        ),
        tested_on=(
            "cuda:8.6,packages=flash-attn==2.8.3",
            "cuda:9.0,packages=flash-attn==2.8.3;flash-attn-3==3.0.0;flash-attn-4==4.0.0b36",
            "cuda:10.3,packages=flash-attn==2.8.3;flash-attn-4==4.0.0b36",
            "rocm:gfx942,packages=flash-attn==2.8.3",
            "rocm:gfx942,packages=amd-aiter==0.1.7;flash-attn==2.8.3",
        ),
    ),
)
