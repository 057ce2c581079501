"""Orders of tokens: how the tokens of a sample are divided into blocks.

An order is an index, never a permuted copy of a tensor: executors read tokens through it, and write the output back
through it. Blocks at a border hold fewer tokens than others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from typing import TYPE_CHECKING

from ..values.grid import TokenGrid

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Blocks:
    """Tokens divided into blocks, the same for every sample and head.

    Those that follow from a grid are made once and kept, so that others can keep what they make of one, by identity.

    `index`: (tokens,), int64: the numbers of the tokens, block after block; None: in their own order.
    `sizes`: how many tokens each block has; none is empty.
    """

    index: torch.Tensor | None
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.sizes)

    @property
    def tokens(self) -> int:
        return sum(self.sizes)

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each block begins in `index`."""
        found = [0]
        for size in self.sizes[:-1]:
            found.append(found[-1] + size)
        return tuple(found)


def cut(tokens: int, block: int) -> tuple[int, ...]:
    """Sizes of blocks of consecutive tokens; the last one has what is left."""
    return tuple(min(block, tokens - start) for start in range(0, tokens, block))


def raster(grid: TokenGrid, block: int) -> Blocks:
    """Consecutive tokens of the grid, frame by frame."""
    return in_order(grid.cells, block)


@lru_cache(maxsize=64)
def in_order(tokens: int, block: int) -> Blocks:
    """Consecutive tokens."""
    return Blocks(None, cut(tokens, block))


def tiles(grid: TokenGrid, tile: tuple[int, int, int]) -> Blocks:
    """Boxes of frames x height x width, in raster order, and in raster order within each."""
    return _tiles(grid.shape, tile)


@lru_cache(maxsize=64)
def _tiles(shape: tuple[int, int, int], tile: tuple[int, int, int]) -> Blocks:
    import torch

    numbers = torch.arange(shape[0] * shape[1] * shape[2], device="cpu").view(shape)
    edges = [list(pairwise([*range(0, length, step), length])) for length, step in zip(shape, tile, strict=True)]
    boxes = [
        numbers[t_from:t_to, h_from:h_to, w_from:w_to].reshape(-1)
        for (t_from, t_to), (h_from, h_to), (w_from, w_to) in product(*edges)
    ]
    return Blocks(torch.cat(boxes), tuple(map(len, boxes)))


def tile_counts(grid: TokenGrid, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """How many tiles lie along frames, height and width."""
    frames, height, width = (-(-length // step) for length, step in zip(grid.shape, tile, strict=True))
    return frames, height, width


@lru_cache(maxsize=64)
def pixel_major(grid: TokenGrid, block: int) -> Blocks:
    """All frames of one place, then the next place."""
    import torch

    index = torch.arange(grid.cells, device="cpu").view(grid.shape).permute(1, 2, 0).reshape(-1)
    return Blocks(index, cut(grid.cells, block))


@lru_cache(maxsize=64)
def along_curve(grid: TokenGrid, block: int, *, each_frame: bool = False) -> Blocks:
    """Along a space-filling curve: consecutive tokens are neighbours.

    The Hilbert curve of the smallest cube of a power of two around the grid, without the points outside the grid (J.
    Skilling, "Programming the Hilbert curve", 2004). `each_frame`: a curve in each frame, one frame after the other.
    """
    import torch

    shape = grid.shape[1:] if each_frame else grid.shape
    bits = max(max(shape) - 1, 1).bit_length()
    places = list(product(*map(range, shape)))
    order = sorted(range(len(places)), key=lambda at: _hilbert(places[at], bits))
    index = torch.tensor(order, dtype=torch.int64, device="cpu")
    if each_frame:
        index = (index + torch.arange(grid.frames, device="cpu")[:, None] * len(order)).reshape(-1)
    return Blocks(index, cut(grid.cells, block))


def _hilbert(place: tuple[int, ...], bits: int) -> int:
    """The number of a point along the Hilbert curve."""
    axes, top = list(place), 1 << (bits - 1)
    bit = top
    while bit > 1:  # undo the rotations of each level
        for axis in range(len(axes)):
            if axes[axis] & bit:
                axes[0] ^= bit - 1
            else:
                swap = (axes[0] ^ axes[axis]) & (bit - 1)
                axes[0] ^= swap
                axes[axis] ^= swap
        bit >>= 1
    for axis in range(1, len(axes)):  # Gray code
        axes[axis] ^= axes[axis - 1]
    flip, bit = 0, top
    while bit > 1:
        if axes[-1] & bit:
            flip ^= bit - 1
        bit >>= 1
    number = 0
    for level in range(bits - 1, -1, -1):
        for value in axes:
            number = number << 1 | ((value ^ flip) >> level & 1)
    return number


def by_label(labels: torch.Tensor, count: int) -> Blocks:
    """Tokens with the same label, by label; labels without a token have no block.

    Args:
        labels: (tokens,), of 0 to count - 1.
        count: how many labels there are.
    """
    import torch

    index = torch.argsort(labels, stable=True).cpu()
    sizes = torch.bincount(labels.cpu(), minlength=count).tolist()
    return Blocks(index, tuple(size for size in sizes if size))


@lru_cache(maxsize=64)
def with_others(blocks: Blocks, before: int, after: int, block: int) -> Blocks:
    """`extended`, of blocks that are kept."""
    return extended(blocks, before, after, block)


def extended(blocks: Blocks, before: int, after: int, block: int) -> Blocks:
    """The blocks of a grid with those of the tokens before and after it, which have blocks of their own."""
    import torch

    if not before and not after:
        return blocks
    sizes = (*cut(before, block), *blocks.sizes, *cut(after, block))
    if blocks.index is None:
        return Blocks(None, sizes)
    cells, device = blocks.tokens, blocks.index.device
    rest = torch.arange(before + cells, before + cells + after, device=device)
    return Blocks(torch.cat((torch.arange(before, device=device), blocks.index + before, rest)), sizes)
