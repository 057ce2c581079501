"""Numbers of layers, as the published rules count them: from 0, single-stream blocks after the double-stream ones."""

from __future__ import annotations

import re
from functools import lru_cache


@lru_cache(maxsize=4096)
def layer_of(block: str, blocks: tuple[str, ...] = ()) -> int | None:
    """The number of a block in its model; None without a number in its name.

    Args:
        blocks: of the model, in its order; without them a block is counted in its own series.
    """
    found = re.search(r"(\d+)\D*$", block)
    if found is None:
        return None
    before = 0
    if "single_" in block:
        before = sum("single_" not in other for other in counted_together(block, blocks))
    return before + int(found[1])


@lru_cache(maxsize=4096)
def counted_together(block: str, blocks: tuple[str, ...]) -> tuple[str, ...]:
    """The blocks of a model that are counted with this one: its series, and the double- and single-stream ones.

    Not a refiner's: `double_blocks.0` of HunyuanVideo is layer 0, though blocks of its text come before it.
    """
    return tuple(other for other in blocks if _stack(other) == _stack(block))


def _stack(block: str) -> str:
    """`double_blocks.3` and `single_blocks.0`: `blocks.`; of Diffusers' FLUX both are `transformer_blocks.`."""
    return re.sub(r"\d+\D*$", "", re.sub(r"(double|single)_", "", block))
