"""`ssta_attn`: selective and sliding tile attention (SSTA) of HunyuanVideo 1.5.

Tiles of 6 x 8 x 8 tokens. Each query tile sees the tiles in the window of Sliding Tile Attention, and the `ssta_topk`
tiles with the highest lambda * (1 + cos(q, k)) / 2 - (1 - lambda) * mean (1 + cos(k, k')) / 2, of the mean query q and
the mean keys k of tiles, the second mean over all other tiles k': similar to the query, and unlike the rest. Source:
HunyuanVideo 1.5's `attn_param` and its defaults. With `attn_mask_share_within_head` means are taken over heads too, and
all heads see the same tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...values.grid import TokenGrid
from ...values.options import Option
from ..block_map import BlockMap, Dense
from ..blocks import Blocks, tile_counts, tiles
from ..by_step import DENSE_LAYERS, DENSE_STEPS, value_at
from ..choose_blocks import count_of_share
from ..composed import Scored, Static, composed
from ..executor import EXECUTOR
from ..method import SparseMethod, Where, block_means, for_each_head
from ..windows import window_map, window_problem
from .sliding_tile import TILE, WINDOW

if TYPE_CHECKING:
    import torch

    from ...values.request import AttentionCall


def importance(call: AttentionCall, blocks: Blocks, weight: float, *, shared: bool) -> torch.Tensor:
    """The scores of tiles, (batch, num_heads or 1, tiles, tiles), float32."""
    from torch.nn.functional import normalize

    queries = block_means(call.query, blocks.sizes, blocks.index)
    keys = for_each_head(call, block_means(call.key, blocks.sizes, blocks.index))
    if shared:
        queries, keys = queries.mean(1, keepdim=True), keys.mean(1, keepdim=True)
    queries, keys = normalize(queries, dim=-1), normalize(keys, dim=-1)
    alike = (keys @ keys.mT + 1) / 2
    others = alike.sum(-2) - alike.diagonal(dim1=-2, dim2=-1)
    redundancy = others / max(blocks.count - 1, 1)
    return weight * (queries @ keys.mT + 1) / 2 - (1 - weight) * redundancy[..., None, :]


class Ssta(SparseMethod):
    """Top-k tiles by importance or a static window."""

    id = "ssta_attn"
    trained = True
    summary = "SSTA of HunyuanVideo 1.5: each tile sees a window around it and the tiles that matter most."
    options = (
        Option("ssta_topk", int, 64, "Tiles kept by score.", minimum=1),
        Option("topk", float, None, "Share of tiles kept by score, instead.", minimum=0, maximum=1, by_step=True),
        Option("ssta_lambda", float, 0.7, "Weight of similarity against redundancy.", minimum=0, maximum=1),
        Option("win_size", list, None, "The window in tiles; default 3, 3, 3."),
        Option("attn_mask_share_within_head", int, 0, "1: all heads see the same tiles.", choices=(0, 1)),
        DENSE_STEPS,
        DENSE_LAYERS,
        EXECUTOR,
    )
    same_thing = ("ssta_topk", "topk")

    def option_conflicts(self, options: Mapping[str, object]) -> list[str]:
        return window_problem("win_size", _inner(options.get("win_size"))) + super().option_conflicts(options)

    def keeping(self, share: float, grid: TokenGrid) -> dict[str, object]:
        """Without its window, which is all of a small grid."""
        return {"topk": share, "win_size": [1, 1, 1]}

    def blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        return tiles(grid, TILE)

    def select_blocks(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> BlockMap | Dense:
        blocks, topk = self.blocks(grid, options), options["topk"]
        count = int(str(options["ssta_topk"])) if topk is None else count_of_share(value_at(topk, where), blocks.count)
        given = _inner(options["win_size"])
        window = (given[0], given[1], given[2]) if isinstance(given, list) else WINDOW
        near = Static(*window_map(tile_counts(grid, TILE), (window,), pushed_in=True))
        shared, weight = options["attn_mask_share_within_head"] == 1, float(str(options["ssta_lambda"]))
        return composed(
            blocks, near, Scored(lambda: importance(call, blocks, weight, shared=shared), count), name="tiles"
        )


def _inner(window: object) -> object:
    """`win_size` is published as a list of one window."""
    return window[0] if isinstance(window, list) and len(window) == 1 else window


BACKENDS = (Ssta(),)
