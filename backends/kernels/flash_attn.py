"""`flash_attn`: the family, which takes the best installed FlashAttention for the card."""

from __future__ import annotations

from ..backend import Backend
from ..family import Family


def flash_attn(version_2: Backend, version_3: Backend, version_4: Backend) -> Family:
    """Hopper: 3, then 4, then 2. Blackwell: 4 only, as in vLLM-Omni. All other cards: 2."""
    return Family(
        "flash_attn",
        "FlashAttention, the best installed version for the card. Exact; takes no masks.",
        order=(version_2,),
        on={"Hopper": (version_3, version_4, version_2), "Blackwell": (version_4,)},
    )
