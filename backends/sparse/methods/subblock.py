"""`subblock_attn`: SGLang's SubBlock, key blocks by the log-sum-exp of scores between means of parts of blocks.

SGLang diffusion, `subblock_sparse_attn`, training-free. Blocks of 64 tokens are divided into four parts of 16. The
score of a query block and a key block is the log-sum-exp, over all pairs of their parts, of the scaled products of the
parts' means. Each query block sees the ceil((1 - sparsity) * N) best of N key blocks, rounded up to a multiple of 8.
The first 10 of 50 steps, and calls of fewer than 4096 tokens, are computed whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...values.aliases import SGLANG, Alias
from ...values.grid import TokenGrid
from ...values.options import Option
from ..block_map import BlockMap, Dense
from ..blocks import Blocks, cut, raster
from ..by_step import DENSE_LAYERS, DENSE_STEPS, value_at
from ..choose_blocks import count_of_share, highest
from ..executor import EXECUTOR
from ..method import SparseMethod, Where, mean_scores

if TYPE_CHECKING:
    import torch

    from ...values.request import AttentionCall

BLOCK = 64
MULTIPLE = 8
PARTS = (1, 2, 4, 8)


def part_scores(call: AttentionCall, tokens: int, n_q: int, n_k: int) -> torch.Tensor:
    """The scores of blocks, (batch, num_heads, query blocks, key blocks), float32.

    Args:
        n_q, n_k: parts of a query block and of a key block.
    """
    import torch
    from torch.nn.functional import pad

    of_queries, of_keys = (Blocks(None, cut(tokens, BLOCK // parts)) for parts in (n_q, n_k))
    scores = mean_scores(call, of_queries, of_keys)
    count = -(-tokens // BLOCK)
    missing = count * n_k - of_keys.count, count * n_q - of_queries.count
    if any(missing):
        scores = pad(scores, (0, missing[0], 0, missing[1]), value=-torch.inf)
    by_part = scores.view(*scores.shape[:2], count, n_q, count, n_k)
    return by_part.transpose(3, 4).flatten(-2).logsumexp(-1)


class SubBlock(SparseMethod):
    """Top-k key blocks by the log-sum-exp of the scores of their parts."""

    id = "subblock_attn"
    summary = "SubBlock: each block of 64 tokens sees the blocks whose parts of 16 tokens score highest."
    aliases = (Alias(SGLANG, "subblock_sparse_attn", "there for heads of 128 channels, by kernels for three cards"),)
    options = (
        Option("sparsity", float, 0.75, "Share of blocks left out.", minimum=0, maximum=1, by_step=True),
        Option("topk", float, None, "Share of blocks kept, instead.", minimum=0, maximum=1, by_step=True),
        Option("skip_first_steps", int, 10, "Dense steps at the beginning; by default 10 of 50, scaled.", minimum=0),
        Option("skip_first_layers", int, 0, "Dense layers at the beginning.", minimum=0),
        Option("n_q", int, 4, "Parts of a query block.", choices=PARTS),
        Option("n_k", int, 4, "Parts of a key block.", choices=PARTS),
        Option("min_seq_len", int, 4096, "Calls of fewer tokens are computed whole.", minimum=0),
        DENSE_STEPS,
        DENSE_LAYERS,
        EXECUTOR,
    )
    steps_option = "skip_first_steps"
    layers_option = "skip_first_layers"
    published_steps = (10, 50)
    pair_bytes = 24 + 2 * 4 * 16  # and the scores of 4 x 4 parts
    same_thing = ("sparsity", "topk")

    def blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        return raster(grid, BLOCK)

    def select_blocks(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> BlockMap | Dense:
        if grid.cells < int(str(options["min_seq_len"])):
            return Dense(f"fewer than {options['min_seq_len']} tokens")
        blocks, topk = self.blocks(grid, options), options["topk"]
        share = 1 - value_at(options["sparsity"], where) if topk is None else value_at(topk, where)
        count = min(-(-count_of_share(share, blocks.count) // MULTIPLE) * MULTIPLE, blocks.count)
        if count == blocks.count:
            return Dense(f"all {count} blocks are kept")
        scores = part_scores(call, grid.cells, int(str(options["n_q"])), int(str(options["n_k"])))
        return BlockMap(blocks, blocks, highest(scores, count), (count,) * blocks.count)


BACKENDS = (SubBlock(),)
