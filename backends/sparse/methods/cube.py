"""`cube_attn`: SGLang's cube attention, the most similar cubes at a ratio for each step.

SGLang diffusion, `cube_sparse_attn`, made for MiniMax H3. The grid is divided into cubes of `local_cube_size` tokens.
Each query cube sees the int(ratio * N) of N cubes, at least one, whose mean keys have the highest products with its
mean query. `topk_ratio_list` has a ratio for each step; there it must be as long as the schedule, here it is spread
over it. Without one, the ratios are those of SGLang's documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...values.aliases import SGLANG, Alias
from ...values.grid import TokenGrid
from ...values.options import Option
from ..block_map import BlockMap, Dense
from ..blocks import Blocks, tiles
from ..by_step import DENSE_LAYERS, DENSE_STEPS, value_at
from ..composed import Scored, composed
from ..executor import EXECUTOR
from ..method import SparseMethod, Where, mean_scores
from ..windows import window_problem

if TYPE_CHECKING:
    from ...values.request import AttentionCall

CUBE = (4, 4, 4)
RATIOS = [1.0, 1.0, 0.8, 0.7, 0.6, 0.5, 0.5]


class Cube(SparseMethod):
    """Top-k cubes, as many as the step's ratio says."""

    id = "cube_attn"
    trained = True
    summary = "Cube attention: each cube of tokens sees the most similar cubes, at a ratio for each step."
    aliases = (Alias(SGLANG, "cube_sparse_attn", "there for MiniMax H3 alone"),)
    options = (
        Option("local_cube_size", list, None, "Frames, height and width of a cube; default 4, 4, 4."),
        Option("topk_ratio_list", float, None, "Share kept in each step.", minimum=1e-6, maximum=1, by_step=True),
        Option("topk", float, None, "Share of cubes kept, instead.", minimum=1e-6, maximum=1, by_step=True),
        DENSE_STEPS,
        DENSE_LAYERS,
        EXECUTOR,
    )
    same_thing = ("topk_ratio_list", "topk")

    def option_conflicts(self, options: Mapping[str, object]) -> list[str]:
        return window_problem("local_cube_size", options.get("local_cube_size")) + super().option_conflicts(options)

    def blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        size = options["local_cube_size"]
        return tiles(grid, (size[0], size[1], size[2]) if isinstance(size, list) else CUBE)

    def select_blocks(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> BlockMap | Dense:
        ratio, blocks = options["topk"], self.blocks(grid, options)
        if ratio is None:
            ratio = RATIOS if options["topk_ratio_list"] is None else options["topk_ratio_list"]
        count = max(int(value_at(ratio, where) * blocks.count + 1e-9), 1)
        return composed(blocks, None, Scored(lambda: mean_scores(call, blocks), count), name="cubes")


BACKENDS = (Cube(),)
