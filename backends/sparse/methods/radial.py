"""`radial_attn`: Radial Attention, whose windows shrink with the distance between frames.

Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
arXiv:2506.19852; the rule as in its code. Of frames of n tokens at a distance d, token x of one sees token y of the
other where |x - y| <= w:

- w is n for d = 0; for d = 1 it is n // 2 (`wan`) or n (`hunyuan`); else max(block, L * decay_factor) with
  L = 2 ** bits(n) / 2 ** bits(d), bits counting binary digits.
- Where L < 128, a pair of frames is left out unless d is a multiple of int(128 / L).
- `wan`: every query sees frame 0.

A block of tokens sees a key block where, for one pair of frames, more than 60 % of the key block's columns with any
token to see have more than a third of the query block's tokens. A last block with fewer tokens sees all and is seen by
all. `model_type` auto is `hunyuan` where other tokens stand beside the grid. The published code needs whole blocks;
here any grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from ...values.aliases import WAN_WRAPPER, Alias
from ...values.grid import TokenGrid
from ...values.options import Option
from ...values.platform import Platform
from ...values.reasons import Reason, template
from ..block_map import BlockMap, Dense
from ..blocks import Blocks, raster
from ..by_step import DENSE_STEPS
from ..executor import EXECUTOR
from ..method import SparseMethod, Where

if TYPE_CHECKING:
    import torch

    from ...values.request import AttentionCall

NO_INT8 = template("radial.int8", "use_sage_attention needs block-sparse attention in INT8, which is not built here")
SPLIT = 128
"""Tokens below which pairs of frames are left out."""


def window_of(distance: int, tokens: int, block: int, decay_factor: float, model_type: str) -> int:
    """How far apart, in tokens of a frame, tokens of frames at this distance see each other; -1: not at all."""
    if distance == 0:
        return tokens
    length = 2.0 ** (tokens.bit_length() - distance.bit_length())
    if length < SPLIT and distance % int(SPLIT / length):
        return -1
    if distance == 1:
        return tokens // 2 if model_type == "wan" else tokens
    return int(min(max(block, length * decay_factor), tokens))


@lru_cache(maxsize=32)
def radial_map(
    frames: int, tokens: int, block: int, decay_factor: float, model_type: str
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Which key blocks each query block sees, bool, (1, 1, blocks, blocks), on the CPU, and how many."""
    import torch

    total = frames * tokens
    count = -(-total // block)
    column = torch.arange(total, device="cpu")
    frame, place = column // tokens, column % tokens
    # A segment is what a frame and a block have in common; columns of a block are judged for each frame alone.
    edges = sorted({*range(0, total, block), *range(0, total, tokens)})
    starts = torch.tensor(edges, device="cpu")
    segment = torch.bucketize(column, starts, right=True) - 1
    block_of_segment = starts // block
    seen = torch.zeros(count, count, dtype=torch.bool, device="cpu")
    for start, end in zip(edges, [*edges[1:], total], strict=True):
        row = start // tokens
        width = torch.tensor(
            [window_of(abs(row - other), tokens, block, decay_factor, model_type) for other in range(frames)],
            device="cpu",
        )
        if model_type == "wan":
            width[0] = tokens
        reach, first, last = width[frame], start - row * tokens, end - 1 - row * tokens
        rows = ((place + reach).clamp(max=last) - (place - reach).clamp(min=first) + 1).clamp(min=0)
        rows[reach < 0] = 0
        some = torch.zeros(len(edges), dtype=torch.int64, device="cpu").index_add_(0, segment, (rows > 0).long())
        dense = torch.zeros(len(edges), dtype=torch.int64, device="cpu").index_add_(
            0, segment, (rows * 3 > block).long()
        )
        seen[start // block, block_of_segment[dense * 5 > some * 3]] = True
    if total % block:
        seen[-1] = True
        seen[:, -1] = True
    seen.diagonal().logical_or_(~seen.any(-1))  # frames much shorter than a block
    return seen[None, None], tuple(seen.sum(-1).tolist())


class Radial(SparseMethod):
    """A static mask of windows that halve with each doubling of the distance between frames."""

    id = "radial_attn"
    once_planned = True
    summary = "Radial Attention: the farther apart two frames are, the fewer of their tokens see each other."
    aliases = (
        Alias(
            WAN_WRAPPER, "radial_sage_attention", "in INT8 there, which is not built here: calls fall back, or stop "
            "with strict", (("use_sage_attention", True),),
        ),
    )  # fmt: skip
    options = (
        Option("dense_layers", int, 0, "Dense layers at the beginning.", minimum=0),
        Option("dense_timesteps", int, 0, "Dense steps at the beginning.", minimum=0),
        Option("decay_factor", float, 1.0, "Width of the window.", minimum=0),
        Option("use_sage_attention", bool, False, "INT8 arithmetic in the blocks that are kept."),
        Option("block_size", int, 128, "Tokens in a block.", choices=(64, 128)),
        DENSE_STEPS,
        Option("model_type", str, "auto", "The published rule of a model.", choices=("auto", "wan", "hunyuan")),
        EXECUTOR,
    )
    steps_option = "dense_timesteps"
    pair_bytes = 0

    def option_reasons(self, platform: Platform, options: Mapping[str, object]) -> list[Reason]:
        if options.get("use_sage_attention", False):
            return [Reason(NO_INT8)]
        return super().option_reasons(platform, options)

    def blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        return raster(grid, int(str(options["block_size"])))

    def select_blocks(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> BlockMap | Dense:
        model_type = str(options["model_type"])
        if model_type == "auto":
            model_type = "hunyuan" if grid.tokens > grid.cells else "wan"
        block, blocks = int(str(options["block_size"])), self.blocks(grid, options)
        seen, counts = radial_map(
            grid.frames, grid.height * grid.width, block, float(str(options["decay_factor"])), model_type
        )
        if min(counts) == blocks.count:
            return Dense(f"the windows hold all {blocks.count} blocks")
        return BlockMap(blocks, blocks, seen, counts)


BACKENDS = (Radial(),)
