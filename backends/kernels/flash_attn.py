"""`flash_attn`: the family, which takes the best installed FlashAttention for the card.

Hopper: 3, then 4, then 2. Blackwell: 4 only, as in vLLM-Omni. AMD: AITER, as there, then 2. All others: 2.
"""

from __future__ import annotations

from .group import BackendGroup

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
    ),
)
