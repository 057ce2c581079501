"""A static mask or blocks by scores: the form of NABLA, SSTA and cube attention, and of `custom_sparse_attn`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from .block_map import BlockMap, Dense, on_device
from .blocks import Blocks
from .choose_blocks import highest, until_share

if TYPE_CHECKING:
    import torch


class Static(NamedTuple):
    """Key blocks that each query block sees whatever the scores are; made once for each grid."""

    seen: torch.Tensor
    """bool, (1, 1, blocks, blocks), on the CPU."""
    each: int | None
    """How many each query block sees, where all see equally many."""


class Scored(NamedTuple):
    """Key blocks by scores."""

    scores: Callable[[], torch.Tensor]
    """(batch, num_heads or 1, blocks, blocks), float32; computed only where something is left out."""
    best: int = 0
    """The highest ones of each query block; 0: none, where there is a static part."""
    share: float | None = None
    """Instead: the highest ones until their softmax weights sum to this; the one that reaches it is kept."""


def composed(blocks: Blocks, static: Static | None, scored: Scored, *, name: str = "blocks") -> BlockMap | Dense:
    """The map of the key blocks that are in `static`, in `scored`, or in both.

    Args:
        name: what the blocks are, for the reason of a call that is computed whole.
    """
    total = blocks.count
    whole = scored.best >= total if scored.share is None else scored.share >= 1
    if whole or (static is not None and static.each == total):
        return Dense(f"all {total} {name} are kept")
    if static is not None and not scored.best and scored.share is None:
        return BlockMap(blocks, blocks, static.seen, None if static.each is None else (static.each,) * total)
    scores = scored.scores()
    seen = highest(scores, scored.best) if scored.share is None else until_share(scores, scored.share)
    if static is None:
        return BlockMap(blocks, blocks, seen, (scored.best,) * total if scored.share is None else None)
    seen |= on_device(static.seen, seen.device)
    return BlockMap(blocks, blocks, seen)
