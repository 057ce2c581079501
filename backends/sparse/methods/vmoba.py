"""`vmoba_attn`: VMoBA, chunks of the video that each query token chooses for itself.

Wu et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", arXiv:2506.23858; FastVideo and SGLang. The
layers take turns: `temporal_layer` layers with chunks of frames, `spatial_layer` with chunks of height and width,
`st_layer` with chunks of both, counted from `first_full_layer`. The gate of a query and a chunk is the product of the
query and the mean key of the chunk. A query sees its own chunk, and

- `topk`: those with the highest gates, so many with its own one, or
- `threshold`: others in the order of their gates until theirs and its own sum to `moba_threshold` of the sum of all, at
  least one. Gates are scaled to 0 to 1 first. `moba_threshold_type` says over what they are scaled and summed:
  `query_head` for each query and head, `block` for each chunk, `head_global` for each head, `overall` for each sample.

Chunks at a border are smaller. Sizes that are not given are those of the published preset for 77 frames of 480x832.
`first_full_step` and `first_full_layer` are declared by the systems and read by none; here they are computed whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...values.aliases import FASTVIDEO, SGLANG, Alias
from ...values.grid import TokenGrid
from ...values.options import Option
from ..block_map import BlockMap, Dense, block_of_token
from ..blocks import Blocks, in_order, raster, tiles
from ..by_step import DENSE_LAYERS, DENSE_STEPS
from ..choose_blocks import descending, exactly
from ..executor import only
from ..method import SparseMethod, Where, block_means

if TYPE_CHECKING:
    import torch

    from ...values.request import AttentionCall, AttentionRequest

KINDS = ("temporal", "spatial", "st")
SIZES: Mapping[str, tuple[int, ...]] = {"temporal": (2,), "spatial": (3, 4), "st": (4, 6, 4)}
TOPK = {"temporal": 3, "spatial": 20, "st": 15}
MODES, OVER = ("threshold", "topk"), ("query_head", "block", "overall", "head_global")
EPSILON = 1e-6

_OPTIONS = (
    Option("temporal_chunk_size", int, None, "Frames in a chunk; default 2.", minimum=1),
    Option("temporal_topk", int, None, "Chunks kept, with the query's own; default 3.", minimum=1),
    Option("spatial_chunk_size", list, None, "Height and width of a chunk; default 3, 4."),
    Option("spatial_topk", int, None, "Chunks kept, with the query's own; default 20.", minimum=1),
    Option("st_chunk_size", list, None, "Frames, height and width of a chunk; default 4, 6, 4."),
    Option("st_topk", int, None, "Chunks kept, with the query's own; default 15.", minimum=1),
    Option("moba_select_mode", str, "threshold", "How chunks are chosen.", choices=MODES),
    Option("moba_threshold", float, 0.25, "Threshold of that choice.", minimum=0, maximum=1),
    Option("moba_threshold_type", str, "query_head", "What the threshold is taken over.", choices=OVER),
    Option("first_full_step", int, 12, "Dense steps at the beginning; by default 12 of 50, scaled.", minimum=0),
    Option("first_full_layer", int, 0, "Dense layers at the beginning.", minimum=0),
    Option("temporal_layer", int, 1, "Temporal layers in a cycle.", minimum=0),
    Option("spatial_layer", int, 1, "Spatial layers in a cycle.", minimum=0),
    Option("st_layer", int, 1, "Spatiotemporal layers in a cycle.", minimum=0),
)


class Vmoba(SparseMethod):
    """Chunks by the gate of each query token."""

    id = "vmoba_attn"
    once_planned = True
    summary = "VMoBA: each token sees its own chunk of the video and the chunks that it is most like."
    aliases = (Alias(SGLANG, "vmoba_attn"), Alias(FASTVIDEO, "VMOBA_ATTN"))
    options = (
        *_OPTIONS,
        Option("moba_config", dict, None, "The same options together, where SGLang reads them.", fields=_OPTIONS),
        DENSE_STEPS,
        DENSE_LAYERS,
        only("merge"),
    )
    steps_option = "first_full_step"
    layers_option = "first_full_layer"
    published_steps = (12, 50)
    only_executor = "merge"
    reads_back = True

    def values(self, options: Mapping[str, object]) -> dict[str, object]:
        together = options.get("moba_config")
        return super().values({**(together if isinstance(together, Mapping) else {}), **options})

    def option_conflicts(self, options: Mapping[str, object]) -> list[str]:
        together = options.get("moba_config")
        twice = sorted(options.keys() & together.keys()) if isinstance(together, Mapping) else []
        found = [f"moba_config and the options beside it both have {', '.join(twice)}; give one"] if twice else []
        values = self.values(options)
        for kind in KINDS[1:]:
            size = values[f"{kind}_chunk_size"]
            if size is not None and not _is_size(size, len(SIZES[kind])):
                found.append(f"{kind}_chunk_size {str(size)[:40]} is not {len(SIZES[kind])} whole numbers from 1")
        if not sum(_cycle(values)):
            found.append("temporal_layer, spatial_layer and st_layer are all 0")
        return found + super().option_conflicts(options)

    def keeping(self, share: float, grid: TokenGrid) -> dict[str, object]:
        """The best chunks of 1 frame, of 4 x 4 places and of 4 x 4 x 4 tokens, of which small grids have enough."""
        given: dict[str, object] = {
            "moba_select_mode": "topk", "temporal_chunk_size": 1, "spatial_chunk_size": [4, 4],
            "st_chunk_size": [4, 4, 4],
        }  # fmt: skip
        values = self.values(given)
        counts = {f"{kind}_topk": max(1, round(share * chunks(grid, kind, values).count)) for kind in KINDS}
        return given | counts

    def blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        return in_order(grid.cells, 1)

    def key_blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        """The smallest chunks of those that the layers have."""
        return max((chunks(grid, kind, options) for kind in KINDS), key=lambda found: found.count)

    def choosing_bytes(self, request: AttentionRequest, grid: TokenGrid) -> int:
        """Of the map of all heads, and of the gates of one, sorted, or of its list of pairs."""
        pairs = grid.cells * self.key_blocks(grid, self.values({})).count
        return request.batch * request.num_heads * pairs + 24 * pairs + 4 * grid.cells * request.head_dim

    def select_blocks(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> BlockMap | Dense:
        import torch

        kind = kind_of(where.layer, options)
        keys, topk = chunks(grid, kind, options), options[f"{kind}_topk"]
        count = min(TOPK[kind] if topk is None else int(str(topk)), keys.count)
        by_count, threshold = options["moba_select_mode"] == "topk", float(str(options["moba_threshold"]))
        if keys.count == 1 or (count == keys.count if by_count else threshold >= 1):
            return Dense(f"all {keys.count} chunks are kept")
        means = block_means(call.key, keys.sizes, keys.index)
        own = block_of_token(keys).to(call.query.device)[:, None]
        over = str(options["moba_threshold_type"])
        shares = call.query.shape[1] // call.key.shape[1]

        def gates(sample: int, head: int) -> torch.Tensor:
            return call.query[sample, head].float() @ means[sample, head // shares].mT

        seen = torch.empty(*call.query.shape[:3], keys.count, dtype=torch.bool, device=call.query.device)
        for sample in range(call.query.shape[0]):
            heads = range(call.query.shape[1])
            if by_count or over == "query_head":
                for head in heads:
                    gate = gates(sample, head)
                    seen[sample, head] = (
                        highest_with_own(gate, own, count) if by_count else enough(gate, own, threshold)
                    )
            else:
                all_heads = torch.stack([gates(sample, head) for head in heads])
                seen[sample] = enough_over(over, all_heads, own, threshold)
        return BlockMap(self.blocks(grid, options), keys, seen)


def _is_size(value: object, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(type(one) is int and one > 0 for one in value)


def _cycle(options: Mapping[str, object]) -> list[int]:
    return [int(str(options[f"{kind}_layer"])) for kind in KINDS]


def kind_of(layer: int | None, options: Mapping[str, object]) -> str:
    """Which chunks a layer has; one that is unknown is the first."""
    cycle = [kind for kind, count in zip(KINDS, _cycle(options), strict=True) for _ in range(min(count, 1000))]
    first = int(str(options["first_full_layer"]))
    return cycle[0 if layer is None else (layer - first) % len(cycle)]


def chunks(grid: TokenGrid, kind: str, options: Mapping[str, object]) -> Blocks:
    """The chunks of a kind."""
    given = options[f"{kind}_chunk_size"]
    if kind == "temporal":
        frames = SIZES[kind][0] if given is None else int(str(given))
        return raster(grid, min(frames, grid.frames) * grid.height * grid.width)
    size = [*SIZES[kind]] if not isinstance(given, list) else given
    frames, height, width = [grid.frames, *size] if kind == "spatial" else size
    return tiles(grid, (min(frames, grid.frames), min(height, grid.height), min(width, grid.width)))


def highest_with_own(gate: torch.Tensor, own: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` chunks with the highest gates of each query, its own one among them, (tokens, chunks)."""
    import torch

    gate.scatter_(-1, own, torch.inf)
    best = descending(gate, min(count + 1, gate.shape[-1]))
    # The own one also where scores are NaN, which no comparison finds: a row without any would come out as zeros.
    return exactly(gate, best, torch.full_like(own, count)).scatter_(-1, own, True)


def enough(gate: torch.Tensor, own: torch.Tensor, threshold: float) -> torch.Tensor:
    """The own entries of each row, and its others until both sum to `threshold` of the sum of all.

    Gates are scaled to 0 to 1 in each row; an own entry counts as one of 0 among the others.

    Args:
        gate: (rows, entries), float32; may be written to.
        own: (rows, 1), the number of the one own entry, or (rows, entries), bool.
    """
    import torch

    low, high = gate.amin(-1, keepdim=True), gate.amax(-1, keepdim=True)
    spread = (high - low).masked_fill(high - low <= EPSILON, 1)
    total = (gate.sum(-1, keepdim=True) - gate.shape[-1] * low) / spread + EPSILON
    one = own.dtype is not torch.bool
    of_own = gate.gather(-1, own) - low if one else (gate - low).masked_fill(~own, 0).sum(-1, keepdim=True)
    missing = (threshold - of_own / spread / total).clamp(min=0)
    others = gate.scatter_(-1, own, low) if one else torch.where(own, low, gate)
    entries = gate.shape[-1]
    # The highest entries have at least the mean of all, so this share of them is enough, but for rounding.
    most = min(int(threshold * entries) + 2, entries)
    while True:
        best = descending(others, min(most + 1, entries))
        reached = ((best[:, :most] - low) / spread).cumsum(-1) / total >= missing
        if most == entries or bool(reached[:, -1].all()):
            break
        most = entries
    count = torch.where(reached[:, -1:], reached.byte().argmax(-1, keepdim=True) + 1, most)
    seen = exactly(others, best, count)
    return seen.scatter_(-1, own, True) if one else seen | own


def enough_over(over: str, gate: torch.Tensor, own: torch.Tensor, threshold: float) -> torch.Tensor:
    """`enough` of the gates of all heads, (num_heads, tokens, chunks), over more than one query."""
    import torch

    rows = {"block": (2, 0, 1), "overall": (2, 0, 1), "head_global": (0, 2, 1)}[over]
    back = [rows.index(axis) for axis in range(3)]
    ordered = gate.permute(rows)
    shape = ordered.shape
    of_rows = 1 if over == "overall" else shape[0]
    mine = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, own.expand(*gate.shape[:2], 1), True)
    mine = mine.permute(rows).reshape(of_rows, -1)
    return enough(ordered.reshape(of_rows, -1), mine, threshold).view(shape).permute(back)


BACKENDS = (Vmoba(),)
