"""`sol_attn`: Sol-Attn, key blocks by a threshold, and one pooled term for each block that is left out.

"Sol-Attn", arXiv:2607.24027; SGLang, comfy-kitchen and ComfyUI's node Model Sparse Attention, there for heads of 128
channels on CUDA and AMD. Blocks have 64 tokens. With k_j the mean key of block j less the mean of all of them, and q_i
the mean query of block i, the score of a query block and a key block is m_ij = q_i k_j, scaled. A key block is computed
exactly where

- m_ij > `tau` * sqrt(sum over channels of q_i^2 var(k) + 1e-6), in powers of two, or, with `keep_percent`, m_ij is
  higher than the (count + 1)-th highest of its row, for round(share * blocks) of them, at least one and not all, or
- it is the query's own block or the one before or after, or holds a token of the sink.

Every other block is one more key in the same softmax: its score is m_ij, its weight the number of its tokens, its value
their mean. With `keep_percent` this is the training-free "sla" of ComfyUI's node. thu-ml's Sparse-Linear Attention has
that name too, and adds a trained branch: it is another method, and not built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ...kernels.backend import Kernel
from ...values.aliases import COMFYUI, SGLANG, VLLM_OMNI, Alias
from ...values.grid import TokenGrid
from ...values.options import Option
from ...values.platform import Platform
from ...values.reasons import Reason, template
from ..block_map import BlockMap, Dense, Tail
from ..blocks import Blocks, raster
from ..by_step import value_at
from ..executor import only
from ..method import SparseMethod, Where, block_means, for_each_head, scale_of

if TYPE_CHECKING:
    import torch

    from ...values.request import AttentionCall, AttentionRequest

BLOCK = 64
LOG2E = math.log2(math.e)
NO_THRESHOLD = template("sol.threshold", "thresh_type {kind} is not built here; diag is")


class Sol(SparseMethod):
    """Blocks above a threshold, or the best ones, with a pooled term for the rest."""

    id = "sol_attn"
    once_planned = True
    summary = "Sol-Attn: each block of 64 tokens sees the blocks that stand out, and the means of all others."
    aliases = (
        Alias(VLLM_OMNI, "SOL_ATTN"),
        Alias(SGLANG, "sol_attn"),
        Alias(
            COMFYUI, "sol-attn", "a method of newer ComfyUI's node Model Sparse Attention; there tau is 1.3, calls "
            "of less than 12,288 tokens are dense, and no layer is",
        ),
        Alias(
            COMFYUI, "sla", "a method of that node, the same with the best blocks instead of a threshold; no training",
            (("keep_percent", 10.0), ("dense_layers", ""), ("min_tokens", 12288)),
        ),
    )  # fmt: skip
    options = (
        Option("tau", float, 1.0, "Threshold; higher leaves out more.", minimum=0, by_step=True),
        Option("thresh_type", str, "diag", "What the threshold is compared with; diag is built."),
        Option(
            "kv_splits", int, "auto", "Parts of the keys in SGLang's kernel; not used.", minimum=1, also=("auto", None)
        ),
        Option("sink_tokens", int, 0, "Tokens that are always kept.", minimum=0),
        Option("sink_start", int, 0, "Where they begin.", minimum=0, also=(None,)),
        Option("dense_steps", int, 10, "Dense steps at the beginning; by default 10 of 50, scaled.", minimum=0),
        Option("dense_layers", str, "0,1", "Dense layers, such as 0-3,38.", also=(int, None)),
        Option("dense_backend", str, "fa", "What runs them; fa: the best exact one.", choices=("fa", "sage_attn")),
        Option(
            "keep_percent", float, None, "Blocks kept by score, instead of tau.", minimum=0, maximum=100, by_step=True
        ),
        Option("min_tokens", int, 0, "Calls of fewer tokens are computed whole.", minimum=0),
        only("gather"),
    )
    published_steps = (10, 50)
    same_thing = ("tau", "keep_percent")
    only_executor = "gather"

    def keeping(self, share: float, grid: TokenGrid) -> dict[str, object]:
        return {"keep_percent": 100 * share, "dense_layers": ""}

    def option_conflicts(self, options: Mapping[str, object]) -> list[str]:
        try:
            parse_layers(options.get("dense_layers"))
        except ValueError as error:
            return [str(error)]
        return super().option_conflicts(options)

    def option_reasons(self, platform: Platform, options: Mapping[str, object]) -> list[Reason]:
        from ...kernels import BACKENDS

        if (kind := options.get("thresh_type", "diag")) != "diag":
            return [Reason(NO_THRESHOLD, kind=str(kind))]
        reasons = super().option_reasons(platform, options)
        if (named := str(options.get("dense_backend", "fa"))) != "fa":
            against = BACKENDS[named].unavailable_reasons(platform)
            reasons += [Reason("named", name=f"dense_backend {named}", reason=reason) for reason in against]
        return reasons

    def dense_at(self, where: Where, options: Mapping[str, object]) -> Dense | None:
        if where.layer is not None and any(where.layer in part for part in parse_layers(options["dense_layers"])):
            return Dense(f"layer {where.layer} is one of dense_layers")
        return super().dense_at(where, {**options, "dense_layers": 0})

    def dense_kernel(self, dense: Callable[..., Kernel], options: Mapping[str, object]) -> Kernel:
        named = options["dense_backend"]
        return dense() if named == "fa" else dense(named)

    def blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        return raster(grid, BLOCK)

    def choosing_bytes(self, request: AttentionRequest, grid: TokenGrid) -> int:
        """The pooled terms too, and a head's queries in float32."""
        v_head_dim, heads = request.v_head_dim or request.head_dim, request.batch * request.num_heads
        pooled = 4 * heads * (grid.cells + 2 * v_head_dim * -(-grid.cells // BLOCK))
        return super().choosing_bytes(request, grid) + pooled + 4 * grid.cells * request.head_dim

    def select_blocks(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> BlockMap | Dense:
        import torch

        blocks, percent = self.blocks(grid, options), options["keep_percent"]
        count = blocks.count
        if grid.cells < int(str(options["min_tokens"])):
            return Dense(f"fewer than {options['min_tokens']} tokens")
        share = 0.0 if percent is None else value_at(percent, where) / 100
        first, last = _sink(grid, options)
        if count <= 2 or share >= 1 or (first <= 0 and last >= count):
            return Dense(f"all {count} blocks are kept")
        queries = block_means(call.query, blocks.sizes, None)
        keys = block_means(call.key, blocks.sizes, None)
        centre = keys.mean(2, keepdim=True)
        keys -= centre
        spread, of_keys = for_each_head(call, keys.square().mean(2)), for_each_head(call, keys)
        scores = queries @ of_keys.mT * (scale_of(call) * LOG2E)
        if percent is None:
            variance = (queries.square() * spread[:, :, None]).sum(-1, keepdim=True) * (scale_of(call) * LOG2E) ** 2
            seen = scores > value_at(options["tau"], where) * (variance + 1e-6).sqrt()
        else:
            kept = max(1, min(count - 1, round(share * count)))
            seen = scores > torch.topk(scores, kept + 1, -1).values[..., -1:]
        number = torch.arange(count, device=seen.device)
        seen |= (number[:, None] - number).abs() <= 1
        seen[..., max(first, 0) : max(last, 0)] = True
        return BlockMap(blocks, blocks, seen, tail=pooled(call, blocks, scores / LOG2E, seen, centre))


def pooled(call: AttentionCall, blocks: Blocks, scores: torch.Tensor, seen: torch.Tensor, centre: torch.Tensor) -> Tail:
    """The blocks that are not seen, as one more key for each.

    Args:
        scores: (batch, num_heads, blocks, blocks), natural logarithm, of keys less `centre`.
        centre: (batch, num_kv_heads, 1, head_dim).
    """
    import torch

    sizes = torch.tensor(blocks.sizes, device=scores.device, dtype=scores.dtype)
    weights = scores.masked_fill(seen, -torch.inf) + sizes.log()
    values = for_each_head(call, block_means(call.value, blocks.sizes, None))
    output = torch.softmax(weights, -1).nan_to_num() @ values  # not a number where a row sees every block
    of_heads = for_each_head(call, centre) * scale_of(call)
    shift = torch.empty(call.query.shape[:3], dtype=torch.float32, device=scores.device)
    for sample, head in torch.cartesian_prod(*(torch.arange(size, device="cpu") for size in shift.shape[:2])).tolist():
        shift[sample, head] = call.query[sample, head].float() @ of_heads[sample, head, 0]
    return Tail(output, weights.logsumexp(-1), shift)


def parse_layers(layers: object) -> list[range]:
    """Layers as SGLang writes them: `0-3,38`, one number, or none.

    Raises:
        ValueError: it is something else.
    """
    if layers is None:
        return []
    found = []
    for part in str(layers).split(","):
        if not part.strip():
            continue
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if match is None:
            raise ValueError(f"dense_layers {str(layers)[:40]!r} is not layers such as 0-3,38")
        found.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def _sink(grid: TokenGrid, options: Mapping[str, object]) -> tuple[int, int]:
    """The blocks of the grid that hold tokens of the sink, which is counted from the first token of the call."""
    tokens, start = int(str(options["sink_tokens"])), options["sink_start"]
    first = (0 if start is None else int(str(start))) - grid.before
    if not tokens or first + tokens <= 0 or first >= grid.cells:
        return 0, 0
    return max(first, 0) // BLOCK, -(-(first + tokens) // BLOCK)


BACKENDS = (Sol(),)
