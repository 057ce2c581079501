"""Random calls and block maps for tests of executors."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import literal_sparse as literal
import pytest
import torch
from attention_backends.backends.sparse import blocks as orders
from attention_backends.backends.sparse.block_map import BlockMap, with_other_tokens
from attention_backends.backends.sparse.blocks import Blocks
from attention_backends.backends.sparse.executors import flex as flexing
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


def visible(blocks: Any) -> Any:
    """The tokens that a BlockMask's lists let through, (batch, heads, rows, keys), and how many blocks are in both."""
    rows, keys = blocks.seq_lengths
    size_q, size_k = blocks.BLOCK_SIZE
    q, k = torch.arange(rows)[:, None], torch.arange(keys)
    found = torch.zeros(*blocks.kv_indices.shape[:2], rows, keys, dtype=torch.bool)
    twice = 0
    inside = blocks.mask_mod(torch.tensor(0), torch.tensor(0), q, k).expand(rows, keys)
    for sample, head, row in torch.cartesian_prod(*map(torch.arange, blocks.kv_indices.shape[:3])).tolist():
        of_row = slice(row * size_q, (row + 1) * size_q)
        lists = (blocks.kv_num_blocks, blocks.kv_indices), (blocks.full_kv_num_blocks, blocks.full_kv_indices)
        part, full = (indices[sample, head, row, : counts[sample, head, row]].tolist() for counts, indices in lists)
        twice += len({*part} & {*full}) + len(part) - len({*part}) + len(full) - len({*full})
        for at in part + full:
            of_keys = slice(at * size_k, (at + 1) * size_k)
            found[sample, head, of_row, of_keys] = True if at in full else inside[of_row, of_keys]
    return found, twice


def literally(query: Any, key: Any, value: Any, bias: Any, blocks: Any, scale: float | None) -> Any:
    """In place of the compiled kernel."""
    sees, twice = visible(blocks)
    assert (bias, twice) == (None, 0)
    assert blocks.kv_indices is not blocks.full_kv_indices, "torch cannot compile that for a CPU"
    return literal.masked_attention(query, key, value, sees, scale).to(query.dtype)


@pytest.fixture
def literal_flex(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The executor `flex` with a literal kernel, and blocks of 16 and 8 tokens."""
    monkeypatch.setattr(flexing, "SIZES", (16, 8))
    monkeypatch.setattr(flexing.Variants, "of", lambda self, given: literally)
    kept = flexing.fill, flexing.filled_length
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()
