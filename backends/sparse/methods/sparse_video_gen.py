"""`sparse_video_gen_attn`: Sparse VideoGen (SVG1), a band over frames or over places, whichever suits a head.

Xi et al., "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity",
arXiv:2502.01776; svg-project/Sparse-VideoGen. Both masks are one band: a query block sees the key blocks less than a
width away, in Wan the first of them too, as many tokens as a frame has. The spatial mask lies over tokens frame by
frame, so it holds frames close in time; the temporal one over all frames of a place, then the next place. The width
follows from `kept`, which the published code calls sparsity: tokens * (1 - sqrt(1 - kept)).

In each call and for each head the attention of `num_sampled_rows` queries is computed over all keys and under both
masks, and the mask with the smaller mean squared error is taken; of equal ones the spatial one. As published, the masks
of this comparison have a fixed width, of 2 frames in Wan and of 1.5 in HunyuanVideo.

Blocks have 128 tokens on any grid, and their distance is that of their centres, as in the published block mask, whose
blocks are the largest divisor of a frame below 256; its other form masks single tokens. Queries are sampled from the
whole grid and the same each time; there at random from the first 10,000 tokens, to save memory. Text, which everything
sees, is no part of the comparison. Layers are counted through the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import sqrt
from typing import TYPE_CHECKING

from ...kernels.support.workspace import item_bytes, key_size, query_size
from ...values.grid import TokenGrid
from ...values.options import Option
from ...values.platform import Platform
from ..block_map import BlockMap, Dense, HeadMaps, Map, on_device
from ..blocks import Blocks, pixel_major, raster
from ..by_step import DENSE_LAYERS, DENSE_STEPS, whole_at_first
from ..executor import only
from ..kmeans import first_tokens
from ..method import SparseMethod, Where, scale_of

if TYPE_CHECKING:
    import torch

    from ...values.request import AttentionCall, AttentionRequest

BLOCK = 128
MOST_SCORES = 2**19
"""Scores of sampled queries at a time, if more than one head fits: they should stay in the caches of a CPU."""

FRAMES_COMPARED = {"wan": 2.0, "hunyuan": 1.5}
"""Width of the band of the masks that are compared, in frames."""


class SparseVideoGen(SparseMethod):
    """The spatial or the temporal mask for each head, by a sample of its queries."""

    id = "sparse_video_gen_attn"
    once_planned = True
    summary = "Sparse VideoGen: each head sees what is close in time, or close in place; a sample of queries decides."
    options = (
        Option("kept", float, 0.25, "Share of pairs kept by the band.", minimum=0, maximum=1),
        Option("num_sampled_rows", int, 64, "Queries that are compared.", minimum=1, maximum=1024),
        Option("first_layers_fp", float, 0.03, "Dense layers: a number, or a share up to 1.", minimum=0),
        Option("first_times_fp", float, 0.2, "Dense steps: a number, or a share up to 1.", minimum=0),
        Option("model_type", str, "auto", "The published rule of a model.", choices=("auto", "wan", "hunyuan")),
        DENSE_STEPS,
        DENSE_LAYERS,
        only("gather"),
    )
    only_executor = "gather"
    reads_back = True
    steps_option = "first_times_fp"

    def values(self, options: Mapping[str, object]) -> dict[str, object]:
        published = ((DENSE_STEPS.name, "first_times_fp"), (DENSE_LAYERS.name, "first_layers_fp"))
        said: dict[str, object] = {name: 0 for number, name in published if number in options}
        return super().values({}) | said | dict(options)

    def blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        """Those of the spatial mask; the temporal one has as many."""
        return raster(grid, BLOCK)

    def keeping(self, share: float, grid: TokenGrid) -> dict[str, object]:
        first = 1 / grid.frames if _model(grid, "auto") == "wan" else 0
        return {"kept": max(round((share - first) / (1 - first), 4), 0) if first < 1 else share, "first_layers_fp": 0}

    def choosing_bytes(self, request: AttentionRequest, grid: TokenGrid) -> int:
        """Of the scores of the sampled queries of some heads, what is hidden of them, and of float32 tokens."""
        rows = min(int(str(self.values({})["num_sampled_rows"])), grid.cells)
        heads = request.batch * _heads_at_a_time(request.batch, request.num_heads, rows, grid.cells)
        sizes = request.head_dim + (request.v_head_dim or request.head_dim)
        return heads * (grid.cells * ((4 * 3 + 1) * rows + 4 * sizes) + 4 * 3 * rows * sizes)

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Also of the heads of one sample that are computed together, which are copied."""
        copied = item_bytes(request) * (2 * query_size(request) + 2 * key_size(request)) // request.batch
        return super().workspace_bytes(request, platform) + copied

    def dense_at(self, where: Where, options: Mapping[str, object]) -> Dense | None:
        whole = whole_at_first(where, steps=options["first_times_fp"], layers=options["first_layers_fp"])
        return super().dense_at(where, options) if whole is None else whole

    def select_blocks(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> Map | Dense:
        model = _model(grid, str(options["model_type"]))
        width = band_width(float(str(options["kept"])), grid.cells, grid.tokens)
        spatial, temporal = both_maps(grid, BLOCK, width, model == "wan")
        if spatial.counts is not None and min(spatial.counts) == spatial.queries.count:
            return Dense(f"the windows hold all {spatial.queries.count} blocks")
        rows = min(int(str(options["num_sampled_rows"])), grid.cells)
        compared = compared_masks(grid.frames, grid.height * grid.width, BLOCK, rows, model)
        chosen = temporal_is_nearer(call, *compared).tolist()
        if all(map(all, chosen)):
            return temporal
        if not any(map(any, chosen)):
            return spatial
        return HeadMaps(tuple(tuple(temporal if one else spatial for one in heads) for heads in chosen))


def _model(grid: TokenGrid, model_type: str) -> str:
    """HunyuanVideo has text beside its grid, Wan has none."""
    if model_type != "auto":
        return model_type
    return "hunyuan" if grid.tokens > grid.cells else "wan"


def band_width(kept: float, cells: int, tokens: int) -> float:
    """Tokens on each side of a query for a share of all pairs, of which those of the text are kept first."""
    text = 2 * (tokens - cells) / tokens
    return tokens * (1 - sqrt(1 - min(max(kept - text, 0.0), 1.0)))


@lru_cache(maxsize=32)
def both_maps(grid: TokenGrid, block: int, width: float, first_frame: bool) -> tuple[BlockMap, BlockMap]:
    """The spatial and the temporal map, on the CPU: one band over two orders of the tokens.

    Args:
        width: centres of blocks that see each other are less apart, in tokens.
        first_frame: all see the first blocks, as many tokens as a frame has.
    """
    import torch

    spatial, temporal = raster(grid, block), pixel_major(grid, block)
    centre = torch.arange(spatial.count, device="cpu") * block + block // 2
    seen = (centre[:, None] - centre).abs() < max(width, 1)
    if first_frame:
        seen |= centre <= grid.height * grid.width
    counts = tuple(seen.sum(-1).tolist())
    seen = seen[None, None]
    return BlockMap(spatial, spatial, seen, counts), BlockMap(temporal, temporal, seen, counts)


@lru_cache(maxsize=2)  # of 75,600 tokens and 1,024 queries they have 155 MB
def compared_masks(frames: int, tokens: int, block: int, count: int, model: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The sampled queries, and which keys each spatial and temporal mask of the comparison hides from them.

    Args:
        tokens: of a frame.
        count: how many queries are sampled.

    Returns:
        (count,), int64, and (2, count, frames * tokens), bool, on the CPU.
    """
    import torch

    reach = max(int(FRAMES_COMPARED[model] * tokens // block), 1)
    rows = first_tokens(frames * tokens, count).sort().values
    by_frame = torch.arange(frames * tokens, device="cpu")
    by_place = by_frame % tokens * frames + by_frame // tokens
    hidden = []
    for place in (by_frame, by_place):
        number = place // block
        near = (number[rows, None] - number).abs() < reach
        if model == "wan":
            near |= place < tokens
        hidden.append(near.logical_not())
    return rows, torch.stack(hidden)


def _heads_at_a_time(batch: int, heads: int, rows: int, tokens: int) -> int:
    return min(max(MOST_SCORES // (batch * rows * tokens), 1), heads)


def temporal_is_nearer(call: AttentionCall, rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Whether the temporal mask changes the output of the sampled queries less than the spatial one.

    Args:
        call: the tokens on the grid alone.
        rows, hidden: of `compared_masks`.

    Returns:
        (batch, num_heads), bool.
    """
    import torch

    batch, heads, tokens, _ = call.query.shape
    device, shares = call.query.device, heads // call.key.shape[1]
    rows, hidden = on_device(rows, device), on_device(hidden, device)
    step = _heads_at_a_time(batch, heads, len(rows), tokens)
    found = []
    for start in range(0, heads, step):
        part = range(start, min(start + step, heads))
        of_key: slice | list[int] = slice(part.start, part.stop)
        if shares > 1:
            of_key = [head // shares for head in part]
        query = call.query.detach()[:, part.start : part.stop].index_select(2, rows).float() * scale_of(call)
        key, value = (tensor.detach()[:, of_key].float() for tensor in (call.key, call.value))
        weights = torch.softmax(query @ key.mT, -1)
        whole = weights @ value
        errors = []
        for mask in hidden:
            seen = weights.masked_fill(mask, 0)  # of the same softmax: another one costs as much as the products
            total = seen.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            errors.append((seen @ value / total - whole).square().mean((-2, -1)))
        spatial, temporal = errors
        found.append(temporal < spatial)
    return torch.cat(found, 1)


BACKENDS = (SparseVideoGen(),)
