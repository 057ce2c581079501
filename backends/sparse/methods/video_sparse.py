"""`video_sparse_attn`: Video Sparse Attention (VSA) without its trained branch.

Zhang et al., "VSA: Faster Video Diffusion with Trainable Sparse Attention", arXiv:2505.13389. FastVideo and SGLang
divide the grid into cubes of 4 x 4 x 4 tokens, vLLM-Omni into 4 x 8 x 8. Each query cube sees the cubes whose mean
keys have the highest products with its mean query.

The paper adds a coarse branch, the attention of cube means times a trained gate. For a model without that gate it is
left out: a gate of one would double the output. No host gives the gate; a program that has one adds `coarse_branch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...values.aliases import FASTVIDEO, SGLANG, VLLM_OMNI, Alias
from ...values.grid import TokenGrid
from ...values.options import Option
from ...values.platform import Platform
from ...values.reasons import Reason, template
from ..block_map import BlockMap, Dense, block_of_token, on_device
from ..blocks import Blocks, tiles
from ..by_step import DENSE_LAYERS, DENSE_STEPS, value_at
from ..choose_blocks import count_of_share
from ..composed import Scored, composed
from ..executor import EXECUTOR
from ..method import SparseMethod, Where, block_means, for_each_head, mean_scores

if TYPE_CHECKING:
    import torch

    from ...values.request import AttentionCall

CUBE = (4, 4, 4)
CUBE_OF_VLLM = (4, 8, 8)
PROVIDERS = ("auto", "fastvideo", "flashinfer")
NO_SAGE = template("video_sparse.sage", "fastvideo_vsa_precision sage needs a kernel that is not used here")


class VideoSparse(SparseMethod):
    """VSA with top-k cubes for each head and query cube."""

    id = "video_sparse_attn"
    trained = True
    once_planned = True
    summary = "Video Sparse Attention: each cube of tokens sees the most similar cubes."
    aliases = (
        Alias(VLLM_OMNI, "FASTVIDEO_VSA", "there with the gate of models trained for it, here without"),
        Alias(SGLANG, "video_sparse_attn", "there sparsity is 0 unless it is set, which leaves nothing out"),
        Alias(FASTVIDEO, "VIDEO_SPARSE_ATTN"),
    )
    options = (
        Option("sparsity", float, None, "Share of cubes of 4x4x4 left out.", minimum=0, maximum=1, by_step=True),
        Option("VSA_sparsity", float, None, "The same, by its older name.", minimum=0, maximum=1, by_step=True),
        Option("fastvideo_vsa_topk", int, 64, "Without a sparsity: cubes of 4x8x8 kept.", minimum=1),
        Option("fastvideo_vsa_provider", str, "auto", "vLLM-Omni's package; not used.", choices=PROVIDERS),
        Option("fastvideo_vsa_precision", str, "bf16", "vLLM-Omni's arithmetic.", choices=("bf16", "sage")),
        DENSE_STEPS,
        DENSE_LAYERS,
        EXECUTOR,
    )
    same_thing = ("sparsity", "VSA_sparsity", "fastvideo_vsa_topk")

    def option_reasons(self, platform: Platform, options: Mapping[str, object]) -> list[Reason]:
        if options.get("fastvideo_vsa_precision", "bf16") != "bf16":
            return [Reason(NO_SAGE)]
        return super().option_reasons(platform, options)

    def blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        return tiles(grid, CUBE_OF_VLLM if _sparsity(options) is None else CUBE)

    def select_blocks(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> BlockMap | Dense:
        sparsity, blocks = _sparsity(options), self.blocks(grid, options)
        if sparsity is not None:
            count = count_of_share(1 - value_at(sparsity, where), blocks.count)
        else:
            count = min(int(str(options["fastvideo_vsa_topk"])), blocks.count)
        return composed(blocks, None, Scored(lambda: mean_scores(call, blocks), count), name="cubes")


def coarse_branch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate_compress: torch.Tensor,
    grid: tuple[int, int, int], *, cube: tuple[int, int, int] = CUBE, scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """What a model trained with VSA adds to its sparse attention: `attention(...) + coarse_branch(...)`.

    softmax(scale * q k^T) v over the means of cubes, in float32; each token has the row of its cube, times its gate.
    Source: arXiv:2505.13389, section 2, as in FastVideo.

    Args:
        query: (batch, num_heads, tokens, head_dim), the tokens of the grid in raster order.
        key, value: the same with num_kv_heads; value may have another head_dim.
        gate_compress: (batch, num_heads, tokens, v_head_dim), or any of them 1: the output of the model's
            `to_gate_compress`.
        grid: (frames, height, width).
        cube: (4, 4, 4) as in FastVideo and SGLang; (4, 8, 8) in vLLM-Omni.
        scale: factor of the scores; None: head_dim ** -0.5.

    Returns:
        (batch, num_heads, tokens, v_head_dim), in the dtype of `query`.

    Raises:
        ValueError: the tokens are not those of the grid.
    """
    import torch

    from ...values.request import AttentionCall

    frames, height, width = grid
    blocks = tiles(TokenGrid(frames, height, width), cube)
    if not query.shape[2] == key.shape[2] == value.shape[2] == blocks.tokens:
        lengths = f"{query.shape[2]} queries, {key.shape[2]} keys and {value.shape[2]} values"
        raise ValueError(f"grid {grid} has {blocks.tokens} tokens, and there are {lengths}")
    call = AttentionCall(query, key, value, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    with torch.autocast(query.device.type, enabled=False):
        means = for_each_head(call, block_means(value, blocks.sizes, blocks.index))
        rows = mean_scores(call, blocks).softmax(-1) @ means
    of_tokens = rows.index_select(2, on_device(block_of_token(blocks), query.device))
    return (of_tokens * gate_compress).to(query.dtype)


def _sparsity(options: Mapping[str, object]) -> object:
    return options["VSA_sparsity"] if options["sparsity"] is None else options["sparsity"]


BACKENDS = (VideoSparse(),)
