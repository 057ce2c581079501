"""`nabla_attn`: NABLA, blocks until a share of the attention of block means, or in a window around the query block.

Mikhailov et al., "NABLA: Neighborhood Adaptive Block-Level Attention", arXiv:2507.13546; Kandinsky 5. Blocks are 8 x 8
tokens of one frame. Over the softmax of the scaled products of mean queries and mean keys, each query block sees the
highest key blocks until they sum to `P`, the one that reaches it too; and, with `add_sta`, those in a window of wT x
wH x wW blocks around it, which is cut at borders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...values.aliases import FASTVIDEO, Alias
from ...values.grid import TokenGrid
from ...values.options import Option
from ..block_map import BlockMap, Dense
from ..blocks import Blocks, tile_counts, tiles
from ..by_step import DENSE_LAYERS, DENSE_STEPS, value_at
from ..composed import Scored, Static, composed
from ..executor import EXECUTOR
from ..method import SparseMethod, Where, mean_scores
from ..windows import MOST, window_map

if TYPE_CHECKING:
    from ...values.request import AttentionCall

TILE = (1, 8, 8)


class Nabla(SparseMethod):
    """Cumulated probability or a static window."""

    id = "nabla_attn"
    trained = True
    summary = "NABLA: each block of 8x8 tokens sees its neighbours and the blocks that hold most of its attention."
    aliases = (Alias(FASTVIDEO, "NABLA_ATTN", "there for Kandinsky 5 alone"),)
    options = (
        Option(
            "P", float, 0.9, "Share of the attention of block means that is kept.", minimum=0, maximum=1, by_step=True
        ),
        Option("wT", int, 11, "Frames in the window.", minimum=1, maximum=MOST),
        Option("wH", int, 3, "Blocks along the height of the window.", minimum=1, maximum=MOST),
        Option("wW", int, 3, "Blocks along the width of the window.", minimum=1, maximum=MOST),
        Option("add_sta", bool, True, "Keep the window."),
        DENSE_STEPS,
        DENSE_LAYERS,
        EXECUTOR,
    )

    def blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        return tiles(grid, TILE)

    def select_blocks(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> BlockMap | Dense:
        blocks, share = self.blocks(grid, options), value_at(options["P"], where)
        near = None
        if options["add_sta"]:
            window = int(str(options["wT"])), int(str(options["wH"])), int(str(options["wW"]))
            near = Static(*window_map(tile_counts(grid, TILE), (window,), pushed_in=False))
        return composed(blocks, near, Scored(lambda: mean_scores(call, blocks), share=share))


BACKENDS = (Nabla(),)
