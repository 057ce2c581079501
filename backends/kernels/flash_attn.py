"""`flash_attn`: the family, which takes the best installed FlashAttention for the card."""

from __future__ import annotations

from .backend import Backend
from .group import BackendGroup


def flash_attn(version_2: Backend, version_3: Backend, version_4: Backend, amd: Backend) -> BackendGroup:
    """Hopper: 3, then 4, then 2. Blackwell: 4 only, as in vLLM-Omni. AMD: AITER, as there, then 2. All others: 2."""
    return BackendGroup(
        "flash_attn",
        "FlashAttention, the best installed version for the card; AITER on AMD. Exact; takes no masks.",
        order=(version_2,),
        on={
            "Hopper": (version_3, version_4, version_2),
            "Blackwell": (version_4,),
            "rocm": (amd, version_2),
        },
    )
