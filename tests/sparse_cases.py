"""Random calls and block maps for tests of executors."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from attention_backends.backends.sparse import blocks as orders
from attention_backends.backends.sparse.block_map import BlockMap, with_other_tokens
from attention_backends.backends.sparse.blocks import Blocks
from attention_backends.backends.values.grid import TokenGrid
from attention_backends.backends.values.request import AttentionCall

ORDERS: dict[str, Callable[[TokenGrid, int], Blocks]] = {
    "raster": orders.raster,
    "tiles": lambda grid, block: orders.tiles(grid, (2, 3, max(block // 6, 1))),
    "pixels": orders.pixel_major,
    "curve": orders.along_curve,
    "curve in each frame": lambda grid, block: orders.along_curve(grid, block, each_frame=True),
    "labels": lambda grid, block: orders.by_label(torch.arange(grid.cells) * 7 % 5, 5),
}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative L2 of a call: rounding of the output's dtype."""


def random_grid(rng: random.Random) -> TokenGrid:
    sides = rng.randint(1, 5), rng.randint(1, 8), rng.randint(1, 8)
    return TokenGrid(*sides, rng.choice((0, 0, 5)), rng.choice((0, 0, 9)))


def random_call(rng: random.Random, grid: TokenGrid, dtype: Any) -> AttentionCall:
    """Query with strides of (batch, tokens, heads, size), as models make it."""
    batch, heads, shares, size = rng.randint(1, 2), rng.choice((2, 4)), rng.choice((1, 2)), rng.choice((8, 16))
    tensors = [
        torch.randn(batch, grid.tokens, count, width).to(dtype).transpose(1, 2)
        for count, width in ((heads, size), (heads // shares, size), (heads // shares, rng.choice((size, 4))))
    ]
    return AttentionCall(*tensors, enable_gqa=shares > 1, scale=rng.choice((None, None, 0.3)))


def random_map(rng: random.Random, grid: TokenGrid, order: str, call: AttentionCall) -> BlockMap:
    blocks = ORDERS[order](grid, rng.choice((6, 12)))
    seen = torch.rand(rng.choice((1, call.query.shape[0])), rng.choice((1, call.query.shape[1])), *[blocks.count] * 2)
    seen = seen < rng.random()
    seen[..., 0] |= ~seen.any(-1)
    return with_other_tokens(BlockMap(blocks, blocks, seen), grid, grid.after, 8)
