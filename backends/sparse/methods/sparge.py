"""`sparge_attn`: SpargeAttention's choice of blocks, computed in the arithmetic of the call.

Zhang et al., "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model Inference",
arXiv:2502.18137; thu-ml/SpargeAttn, `spas_sage2_attn_meansim_topk_cuda` and `..._meansim_cuda`. Query blocks have 128
tokens, key blocks 64. A block is self-similar where the mean cosine over all pairs of its tokens is above
`simthreshd1`; with `smooth_k` the keys are first reduced by their mean. P is the softmax, over self-similar key blocks,
of the scaled products of mean queries and mean keys. A query block sees

- `topk`: the int(topk * N) key blocks with the highest P, or
- `cdfthreshd`: those with the highest P whose sum is at most the threshold,

at least one; and all key blocks that are not self-similar. A query block that is not self-similar sees everything.

The package computes the blocks in INT8 and FP8, and leaves out more where a block's scores are low (`pvthreshd`); here
the same blocks are computed exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...kernels.support.workspace import item_bytes, key_size, query_size
from ...values.aliases import PEOPLE, SGLANG, SMART_DIFFUSION, VLLM_OMNI, YUNCHANG, Alias
from ...values.grid import TokenGrid
from ...values.options import Option
from ..block_map import BlockMap, Dense
from ..blocks import Blocks, raster
from ..by_step import DENSE_LAYERS, DENSE_STEPS, value_at
from ..choose_blocks import highest
from ..executor import EXECUTOR
from ..method import SparseMethod, Where, block_means, for_each_head, scale_of

if TYPE_CHECKING:
    import torch

    from ...values.request import AttentionCall, AttentionRequest

QUERIES, KEYS = 128, 64
SIMILAR_TOPK, SIMILAR_CDF = -0.1, 0.6
"""The published `simthreshd1` of the two rules."""

BLOCKS = "here the blocks of SpargeAttention in the arithmetic of the call"
HERE = "there in INT8 and FP8; here the same blocks in the arithmetic of the call"


def self_similar(tokens: torch.Tensor, blocks: tuple[int, ...], threshold: float) -> torch.Tensor:
    """Whether the mean cosine over all pairs of a block's tokens is above the threshold, (batch, heads, blocks)."""
    from torch.nn.functional import normalize

    # The mean of the products of all pairs is the square of the mean.
    return block_means(normalize(tokens.float(), dim=-1), blocks, None).square().sum(-1) > threshold


class Sparge(SparseMethod):
    """Top-k or cumulated probability over self-similar blocks."""

    id = "sparge_attn"
    once_planned = True
    summary = "SpargeAttention: each block of queries sees the most similar blocks of keys, and all blocks that vary."
    aliases = (
        Alias(VLLM_OMNI, "SPARGE", HERE),
        Alias(SGLANG, "sparge_attn", HERE),
        Alias(SMART_DIFFUSION, "sparge", f"under this name Smart-Diffusion runs FlashAttention 2; {BLOCKS}"),
        Alias(SMART_DIFFUSION, "spas_sage", f"Smart-Diffusion's inner name for sparge; {BLOCKS}"),
        Alias(YUNCHANG, "SPARSE_SAGE", HERE),
        Alias(PEOPLE, "sparge_attn_backend"),
    )
    options = (
        Option("topk", float, 0.5, "Share of blocks kept, above 0.", minimum=1e-6, maximum=1, by_step=True),
        Option("sparsity_ratio", float, None, "Share left out, instead.", minimum=0, maximum=1, by_step=True),
        Option("cdfthreshd", float, None, "Sum of P that is kept, instead; published: 0.98.", minimum=0, maximum=1),
        Option(
            "simthreshd1", float, None, "A block is self-similar above it; default -0.1, with cdfthreshd 0.6.",
            minimum=-1, maximum=1,
        ),
        Option("smooth_k", bool, True, "Subtract the mean of the keys first."),
        Option("attention_sink", bool, False, "Keep the first key block."),
        Option("block_size", int, 64, "Keys in a block.", choices=(KEYS,)),
        DENSE_STEPS,
        DENSE_LAYERS,
        EXECUTOR,
    )  # fmt: skip
    same_thing = ("topk", "sparsity_ratio", "cdfthreshd")

    def blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        return raster(grid, QUERIES)

    def key_blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        return raster(grid, KEYS)

    def choosing_bytes(self, request: AttentionRequest, grid: TokenGrid) -> int:
        smooth = key_size(request) * item_bytes(request)
        unit = 4 * max(query_size(request), key_size(request)) * (1 if item_bytes(request) == 4 else 2)
        return super().choosing_bytes(request, grid) + smooth + unit

    def select_blocks(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> BlockMap | Dense:
        import torch

        queries, keys = self.blocks(grid, options), self.key_blocks(grid, options)
        cdf, ratio = options["cdfthreshd"], options["sparsity_ratio"]
        share = value_at(options["topk"], where) if ratio is None else 1 - value_at(ratio, where)
        count = max(int(share * keys.count + 1e-9), 1)
        if cdf is None and count == keys.count:
            return Dense(f"all {count} blocks are kept")
        threshold = options["simthreshd1"]
        if threshold is None:
            threshold = SIMILAR_TOPK if cdf is None else SIMILAR_CDF
        key = call.key
        if options["smooth_k"]:
            key = key - key.mean(2, keepdim=True, dtype=torch.float32).to(key.dtype)
        similar_q = self_similar(call.query, queries.sizes, float(str(threshold)))
        similar_k = self_similar(key, keys.sizes, float(str(threshold)))
        of_keys, similar_k = (for_each_head(call, one) for one in (block_means(key, keys.sizes, None), similar_k))
        scores = (block_means(call.query, queries.sizes, None) * scale_of(call)) @ of_keys.mT
        scores = scores.masked_fill(~similar_k[:, :, None], -torch.inf)
        seen = highest(scores, count) if cdf is None else until_above(scores, float(str(cdf)))
        seen |= ~similar_k[:, :, None]
        seen |= ~similar_q[..., None]
        if options["attention_sink"]:
            seen[..., 0] = True
        return BlockMap(queries, keys, seen)


def until_above(scores: torch.Tensor, share: float) -> torch.Tensor:
    """The highest blocks of each row whose softmax weights sum to at most `share`; at least one."""
    import torch

    weights, order = torch.sort(torch.softmax(scores, -1), dim=-1, descending=True, stable=True)
    keep = weights.cumsum(-1) <= share  # a row without a self-similar block is not a number: it keeps one
    keep[..., 0] = True
    return torch.zeros_like(keep).scatter_(-1, order, keep)


BACKENDS = (Sparge(),)
