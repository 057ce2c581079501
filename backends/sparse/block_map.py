"""`BlockMap`: which key blocks each query block of each head sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ..values.grid import TokenGrid
from .blocks import Blocks, cut, with_others

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dense:
    """A method's answer for a call that is to be computed whole."""

    reason: str


@dataclass(frozen=True, eq=False)
class BlockMap:
    """Which key blocks each query block sees.

    `seen`: bool, (batch or 1, num_heads or 1, query blocks, key blocks). Each row has at least one block.
    `counts`: how many key blocks each query block sees where that is known without reading `seen`, one number for each
    query block, the same in all samples and heads; else None.
    """

    queries: Blocks
    keys: Blocks
    seen: torch.Tensor
    counts: tuple[int, ...] | None = None

    @cached_property
    def pairs(self) -> float:
        """Share of query-key pairs that are computed, over samples and heads. Reads `seen`."""
        import torch

        of_queries = torch.tensor(self.queries.sizes, dtype=torch.float64)
        of_keys = torch.tensor(self.keys.sizes, dtype=torch.float64)
        found = (self.seen.cpu().to(torch.float64) @ of_keys) @ of_queries  # on Apple GPUs there is no float64
        return float(found.mean()) / (self.queries.tokens * self.keys.tokens)

    def mask(self) -> torch.Tensor:
        """The map as a mask of tokens, bool, (batch or 1, num_heads or 1, q_len, kv_len); for tests and pictures."""
        return self.seen[:, :, block_of_token(self.queries)][..., block_of_token(self.keys)]


def block_of_token(blocks: Blocks) -> torch.Tensor:
    """The number of each token's block, (tokens,)."""
    import torch

    numbers = torch.repeat_interleave(torch.arange(blocks.count), torch.tensor(blocks.sizes))
    if blocks.index is None:
        return numbers
    found = torch.empty_like(numbers)
    found[blocks.index] = numbers
    return found


def with_other_tokens(on_grid: BlockMap, grid: TokenGrid, kv_after: int, block: int) -> BlockMap:
    """The map of a whole call: tokens beside the grid see everything, and everything sees them.

    Args:
        on_grid: of the tokens on the grid alone.
        kv_after: keys after the grid; queries after it are `grid.after`.
        block: the size of the blocks of the other tokens.
    """
    from torch.nn.functional import pad

    queries = with_others(on_grid.queries, grid.before, grid.after, block)
    keys = with_others(on_grid.keys, grid.before, kv_after, block)
    before, q_after, k_after = len(cut(grid.before, block)), len(cut(grid.after, block)), len(cut(kv_after, block))
    if not (before or q_after or k_after):
        return on_grid
    seen = pad(on_grid.seen, (before, k_after, before, q_after), value=True)
    counts = on_grid.counts
    if counts is not None:
        counts = (*[keys.count] * before, *(count + before + k_after for count in counts), *[keys.count] * q_after)
    return BlockMap(queries, keys, seen, counts)
