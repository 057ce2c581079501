"""Slow, literal forms of published sparse methods in float64, token by token. Imports nothing of the package.

Each function returns which keys each query sees, bool, (batch, num_heads, tokens, tokens), for tokens in raster order
on a grid (frames, height, width). Tests compare them with the maps of `backends/sparse`.
"""

from __future__ import annotations

from itertools import product
from math import ceil

import torch

Shape = tuple[int, int, int]


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sees: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """softmax(scale * query key^T over visible keys) value, float64."""
    query, key, value = query.double(), key.double(), value.double()
    shares = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shares, 1), value.repeat_interleave(shares, 1)
    scores = query @ key.mT * (query.shape[3] ** -0.5 if scale is None else scale)
    return torch.softmax(scores.masked_fill(~sees, -torch.inf), -1) @ value


def with_text(sees: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Tokens beside the grid see everything, and everything sees them."""
    tokens = before + sees.shape[-1] + after
    whole = torch.ones(*sees.shape[:2], tokens, tokens, dtype=torch.bool)
    whole[:, :, before : tokens - after, before : tokens - after] = sees
    return whole


def boxes(shape: Shape, box: Shape) -> list[list[int]]:
    """Token numbers of each box of the grid; boxes at the border may be smaller."""
    found: dict[Shape, list[int]] = {}
    for number, place in enumerate(product(*map(range, shape))):
        at = tuple(coordinate // size for coordinate, size in zip(place, box, strict=True))
        found.setdefault(at, []).append(number)  # type: ignore[arg-type]  # three coordinates
    return [found[at] for at in sorted(found)]


def best(scores: list[float], count: int) -> list[int]:
    """The `count` best places; of equal scores the first."""
    return sorted(range(len(scores)), key=lambda at: (-scores[at], at))[:count]


def sees_blocks(blocks: list[list[int]], chosen: dict[int, list[int]], tokens: int) -> torch.Tensor:
    """(tokens, tokens) from the key blocks that each query block sees."""
    sees = torch.zeros(tokens, tokens, dtype=torch.bool)
    for of_queries, of_keys in chosen.items():
        for query in blocks[of_queries]:
            for of_key in of_keys:
                sees[query, blocks[of_key]] = True
    return sees


def video_sparse(query: torch.Tensor, key: torch.Tensor, shape: Shape, box: Shape, count: int) -> torch.Tensor:
    """VSA (arXiv:2505.13389): the `count` boxes with the highest product of mean query and mean key."""
    blocks = boxes(shape, box)
    shares = query.shape[1] // key.shape[1]
    found = []
    for sample in range(query.shape[0]):
        for head in range(query.shape[1]):
            of_queries = [query[sample, head, block].double().mean(0) for block in blocks]
            of_keys = [key[sample, head // shares, block].double().mean(0) for block in blocks]
            chosen = {at: best([float(mean @ other) for other in of_keys], count) for at, mean in enumerate(of_queries)}
            found.append(sees_blocks(blocks, chosen, query.shape[2]))
    return torch.stack(found).view(*query.shape[:3], -1)


def video_sparse_count(sparsity: float, blocks: int) -> int:
    """SGLang: ceil((1 - sparsity) * blocks), between 1 and all."""
    return min(max(ceil((1 - sparsity) * blocks), 1), blocks)
