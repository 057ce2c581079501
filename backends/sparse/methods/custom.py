"""`custom_sparse_attn`: a static mask or blocks by scores, as its options say.

NABLA, SSTA and cube attention are of this form; each stays a backend with its published names and defaults. With
`tile` 1, 8, 8, `window` 11, 3, 3, `pushed_in` false and `cdf` 0.9 this is NABLA; with `tile` 6, 8, 8, `window` 3, 3, 3,
`topk_blocks` 64 and `score` importance it is SSTA; with `topk` alone it is cube attention.

The scores are the scaled products of mean queries and mean keys, or SSTA's importance. The static part is a window of
tiles, the neighbours in the order of the blocks, and the first frames. Other tokens, such as text, see everything and
are seen by everything, as in each sparse backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from ...values.grid import TokenGrid
from ...values.options import Option
from ..block_map import BlockMap, Dense, block_of_token
from ..blocks import Blocks, along_curve, pixel_major, raster, tile_counts, tiles
from ..by_step import DENSE_LAYERS, DENSE_STEPS, value_at
from ..choose_blocks import count_of_share
from ..composed import Scored, Static, composed
from ..executor import EXECUTOR
from ..method import SparseMethod, Where, mean_scores
from ..windows import Window, window_map, window_problem
from .ssta import importance

if TYPE_CHECKING:
    import torch

    from ...values.request import AttentionCall

TILE = (4, 4, 4)
TILES = "tiles"
ORDERS: Mapping[str, Callable[[TokenGrid, int], Blocks]] = {
    "raster": raster,
    "pixels": pixel_major,
    "curve": along_curve,
}


class Custom(SparseMethod):
    """A window, neighbours or first frames, or top-k or cumulated probability."""

    id = "custom_sparse_attn"
    summary = "Sparse attention by your own rule: a fixed window, the best blocks by score, or both."
    candidate = False  # what it keeps is for a person to say
    options = (
        Option(
            "order", str, TILES, "What a block is: a tile of the grid, or consecutive tokens frame by frame, place by "
            "place through all frames, or along a space-filling curve.", choices=(TILES, *ORDERS),
        ),
        Option("tile", list, None, "Frames, height and width of a tile; default 4, 4, 4."),
        Option("block_size", int, 128, "Tokens in a block of the other orders.", choices=(16, 32, 64, 128, 256)),
        Option("window", list, None, "Tiles along frames, height and width around each tile; default: no window."),
        Option("pushed_in", bool, True, "At borders the window keeps its size; else it is cut there."),
        Option("neighbours", int, 0, "Blocks before and after that each block sees, and itself; 0: none.", minimum=0),
        Option("sink_frames", int, 0, "First frames that everything sees.", minimum=0),
        Option(
            "topk", float, 0.25, "Share of blocks kept by score; at least one, but with a fixed part 0 keeps none.",
            minimum=0, maximum=1, by_step=True,
        ),
        Option("topk_blocks", int, None, "Blocks kept by score, instead.", minimum=1),
        Option(
            "cdf", float, None, "Share of the attention of block means that is kept, instead.", minimum=0, maximum=1,
            by_step=True,
        ),
        Option("score", str, "mean", "Products of means, or SSTA's importance.", choices=("mean", "importance")),
        Option("score_lambda", float, 0.7, "Importance: similarity against redundancy.", minimum=0, maximum=1),
        Option("share_heads", bool, False, "All heads see the same blocks."),
        DENSE_STEPS,
        DENSE_LAYERS,
        EXECUTOR,
    )  # fmt: skip
    same_thing = ("topk", "topk_blocks", "cdf")

    def option_conflicts(self, options: Mapping[str, object]) -> list[str]:
        found = [text for name in ("tile", "window") for text in window_problem(name, options.get(name))]
        in_tiles = options.get("order", TILES) == TILES
        wrong = [name for name in (("block_size",) if in_tiles else ("tile", "window", "pushed_in")) if name in options]
        if wrong:
            found.append(f"{', '.join(wrong)}: only with {'another order than' if in_tiles else 'order'} {TILES}")
        if options.get("cdf") is not None and options.get("score") == "importance":
            found.append("cdf sums the attention of block means; it needs score mean")
        return found + super().option_conflicts(options)

    def blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        order = options["order"]
        if order == TILES:
            return tiles(grid, _three(options["tile"]) or TILE)
        return ORDERS[str(order)](grid, int(str(options["block_size"])))

    def select_blocks(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> BlockMap | Dense:
        blocks = self.blocks(grid, options)
        static = static_part(
            blocks, grid.shape, tile_counts(grid, _three(options["tile"]) or TILE), _three(options["window"]),
            options["pushed_in"] is True, int(str(options["neighbours"])), int(str(options["sink_frames"])),
        )  # fmt: skip
        shared = options["share_heads"] is True

        def scores() -> torch.Tensor:
            if options["score"] == "importance":
                return importance(call, blocks, float(str(options["score_lambda"])), shared=shared)
            found = mean_scores(call, blocks)
            return found.mean(1, keepdim=True) if shared else found

        if options["cdf"] is not None:
            return composed(blocks, static, Scored(scores, share=value_at(options["cdf"], where)))
        if options["topk_blocks"] is not None:
            return composed(blocks, static, Scored(scores, min(int(str(options["topk_blocks"])), blocks.count)))
        share = value_at(options["topk"], where)
        count = 0 if static is not None and not share else count_of_share(share, blocks.count)
        return composed(blocks, static, Scored(scores, count))


def _three(value: object) -> Window | None:
    return (value[0], value[1], value[2]) if isinstance(value, list) else None


@lru_cache(maxsize=64)
def static_part(
    blocks: Blocks, shape: Window, counts: Window, window: Window | None, pushed_in: bool, neighbours: int,
    sink_frames: int,
) -> Static | None:  # fmt: skip
    """The key blocks that are seen whatever the scores are; None without such a part.

    Args:
        shape: frames, height and width of the grid.
        counts: tiles along each; asked only with a `window`.
        sink_frames: a block is seen by all if a token of it lies in one of so many first frames.
    """
    import torch

    if window is None and not neighbours and not sink_frames:
        return None
    total = blocks.count
    seen = torch.zeros(1, 1, total, total, dtype=torch.bool, device="cpu")
    if window is not None:
        seen |= window_map(counts, (window,), pushed_in=pushed_in)[0]
    if neighbours:
        place = torch.arange(total, device="cpu")
        seen |= (place[:, None] - place).abs() <= min(neighbours, total)
    if sink_frames:
        seen[..., block_of_token(blocks)[: min(sink_frames, shape[0]) * shape[1] * shape[2]]] = True
    of_rows = seen[0, 0].sum(-1)
    same = bool((of_rows == of_rows[0]).all())
    return Static(seen, int(of_rows[0]) if same else None)


BACKENDS = (Custom(),)
