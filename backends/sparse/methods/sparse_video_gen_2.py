"""`sparse_video_gen_2_attn`: Sparse VideoGen 2 (SVG2), clusters of similar tokens as blocks.

Yang et al., "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware Permutation",
arXiv:2505.18875; svg-project/Sparse-VideoGen and SGLang. The queries and the keys of each head are clustered by k-means
(`kmeans.py`). P of a query cluster is the softmax over key clusters of the scaled products of centroids, each weighted
by its number of keys. A query cluster sees the key clusters with the highest P, as long as the P before them sum to at
most `svg2_top_p_kmeans`, and at least the int(`svg2_min_kc_ratio` * clusters) best ones.

The first clustering of a layer takes `svg2_kmeans_iter_init` iterations from random tokens. Its centroids are kept for
each sample, which is a conditioning in a context window, and the next step goes on from them with
`svg2_kmeans_iter_step` iterations; `svg2_zero_step_kmeans_init` does that in dense steps already. A sample that a whole
step did not have is forgotten: context windows may move in every step. Where the host does not say which samples a call
has, each call is a first one.

The published numbers of clusters are for `TOKENS` tokens, and scaled to those of a call; a number that a person gives
is not scaled. Layers are counted through the whole model. Tokens are read in the order of their clusters, and never
copied into it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, MutableMapping
from math import ceil
from typing import TYPE_CHECKING

from ...kernels.support.workspace import item_bytes
from ...values.aliases import SGLANG, Alias
from ...values.grid import TokenGrid
from ...values.options import Option
from ..block_map import BlockMap, Dense, HeadMaps, Map
from ..blocks import Blocks, raster
from ..by_step import DENSE_LAYERS, DENSE_STEPS, whole_at_first
from ..choose_blocks import passed_share
from ..executor import only
from ..kmeans import MOST_SCORES, Clusters, cluster, first_tokens
from ..method import SparseMethod, Where, for_each_head, scale_of

if TYPE_CHECKING:
    from ...values.request import AttentionCall, AttentionRequest

TOKENS = 75_600
"""81 frames of 1280x720 in Wan."""
Q_CLUSTERS, K_CLUSTERS = "svg2_num_q_centroids", "svg2_num_k_centroids"
LAYERS = 60
"""As many as the largest model has that the method is published for; a call does not know how many its model has."""
PUBLISHED = {Q_CLUSTERS: 300, K_CLUSTERS: 1000}


class SparseVideoGen2(SparseMethod):
    """Top-p clusters of keys for each cluster of queries."""

    id = "sparse_video_gen_2_attn"
    once_planned = True
    summary = (
        "Sparse VideoGen 2: clusters of similar queries see the clusters of keys that hold most of their attention."
    )
    aliases = (Alias(SGLANG, "sparse_video_gen_2_attn"),)
    options = (
        Option(Q_CLUSTERS, int, 300, "Clusters of queries; by default 300 for 75,600 tokens, scaled.", minimum=1),
        Option(K_CLUSTERS, int, 1000, "Clusters of keys; by default 1000 for 75,600 tokens, scaled.", minimum=1),
        Option("svg2_top_p_kmeans", float, 0.9, "Share of the attention kept.", minimum=0, maximum=1),
        Option("svg2_min_kc_ratio", float, 0.1, "Least share of key clusters kept.", minimum=0, maximum=1),
        Option("svg2_kmeans_iter_init", int, 50, "Iterations of the first clustering.", minimum=0),
        Option("svg2_kmeans_iter_step", int, 2, "Iterations of each later one.", minimum=0),
        Option("svg2_zero_step_kmeans_init", bool, False, "Cluster in dense steps too."),
        Option("svg2_first_layers_fp", float, 0.03, "Dense layers: a number, or a share up to 1.", minimum=0),
        Option("svg2_first_times_fp", float, 0.2, "Dense steps: a number, or a share up to 1.", minimum=0),
        DENSE_STEPS,
        DENSE_LAYERS,
        only("gather"),
    )
    only_executor = "gather"
    reads_back = True

    def values(self, options: Mapping[str, object]) -> dict[str, object]:
        scaled: dict[str, object] = {Q_CLUSTERS: None, K_CLUSTERS: None}
        published = ((DENSE_STEPS.name, "svg2_first_times_fp"), (DENSE_LAYERS.name, "svg2_first_layers_fp"))
        said: dict[str, object] = {name: 0 for number, name in published if number in options}
        return super().values({}) | scaled | said | dict(options)

    def blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        """As many blocks as clusters; which tokens these have depends on the call."""
        return raster(grid, ceil(grid.cells / cluster_count(options, Q_CLUSTERS, grid.cells)))

    def key_blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        return raster(grid, ceil(grid.cells / cluster_count(options, K_CLUSTERS, grid.cells)))

    def choosing_bytes(self, request: AttentionRequest, grid: TokenGrid) -> int:
        """Of clustering one sample, of the maps, and of the centroids that are kept for `LAYERS` layers."""
        values = self.values({})
        count = cluster_count(values, K_CLUSTERS, grid.cells)
        row = request.batch * request.head_dim * item_bytes(request)
        both = cluster_count(values, Q_CLUSTERS, grid.cells) * request.num_heads + count * (
            request.num_kv_heads or request.num_heads
        )
        kept = LAYERS * row * both
        scores = min(MOST_SCORES, request.num_heads * grid.cells * count)
        wide = min(ceil(MOST_SCORES / count) * request.head_dim, request.num_heads * grid.cells * request.head_dim)
        labels = 8 * 2 * 2 * request.batch * request.num_heads * grid.cells
        return super().choosing_bytes(request, grid) + 4 * 3 * scores + 4 * wide + labels + kept

    def dense_at(self, where: Where, options: Mapping[str, object]) -> Dense | None:
        whole = whole_at_first(where, steps=options["svg2_first_times_fp"], layers=options["svg2_first_layers_fp"])
        return super().dense_at(where, options) if whole is None else whole

    def select_at(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> Map | Dense:
        dense = self.dense_at(where, options)
        if dense is None:
            return self.select_blocks(call, grid, where, options)
        if options["svg2_zero_step_kmeans_init"] and self.dense_at(where._replace(step=None), options) is None:
            for sample in range(call.query.shape[0]):
                self._clusters(call, sample, grid, where, options)
        return dense

    def select_blocks(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> Map | Dense:
        share, count = float(str(options["svg2_top_p_kmeans"])), cluster_count(options, K_CLUSTERS, grid.cells)
        least = int(float(str(options["svg2_min_kc_ratio"])) * count + 1e-9)
        if share >= 1 or least >= count:
            return Dense(f"all {count} clusters are kept")
        return HeadMaps(
            tuple(
                _head_maps(call, *self._clusters(call, sample, grid, where, options), share, least)
                for sample in range(call.query.shape[0])
            )
        )

    def _clusters(
        self, call: AttentionCall, sample: int, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> tuple[Clusters, Clusters]:
        """The clusters of the queries and of the keys of one sample; their centroids are kept for the next step."""
        known = len(where.samples) == call.query.shape[0]  # else the call is a part of the batch, or of no sampler
        if known:
            forget_older(where.kept, self.id, where.step)
        found = []
        for name, tensor in ((Q_CLUSTERS, call.query), (K_CLUSTERS, call.key)):
            tokens, count = tensor[sample : sample + 1].detach(), cluster_count(options, name, grid.cells)
            place = self.id, where.block, where.role, where.samples[sample] if known else None, grid.shape, name, count
            kept = where.kept.get(place) if known else None
            if isinstance(kept, tuple):
                clusters = cluster(tokens, kept[1].float(), int(str(options["svg2_kmeans_iter_step"])))
            else:
                first = first_tokens(grid.cells, count).to(tokens.device)
                clusters = cluster(tokens, tokens[:, :, first].float(), int(str(options["svg2_kmeans_iter_init"])))
            if known:
                where.kept[place] = where.step, clusters.centroids.to(tokens.dtype)
            found.append(clusters)
        return found[0], found[1]


def forget_older(kept: MutableMapping[Hashable, object], name: str, step: int | None) -> None:
    """Drop the centroids that neither this step nor the one before has used, of the method `name`."""
    if step is None:
        return
    for place, entry in list(kept.items()):
        if not isinstance(place, tuple) or not isinstance(entry, tuple) or place[0] != name:
            continue
        if entry[0] not in (step, step - 1):
            del kept[place]


def cluster_count(options: Mapping[str, object], name: str, tokens: int) -> int:
    """How many clusters a call of so many tokens has."""
    given = options[name]
    if given is None:
        given = ceil(PUBLISHED[name] * tokens / TOKENS)
    return min(int(str(given)), tokens)


def _head_maps(
    call: AttentionCall, queries: Clusters, keys: Clusters, share: float, least: int
) -> tuple[BlockMap, ...]:
    """The map of each head of one sample. Reads the sizes of clusters and the map from the device."""
    of_keys, sizes = for_each_head(call, keys.centroids), for_each_head(call, keys.sizes)
    scores = queries.centroids * scale_of(call) @ of_keys.mT + sizes.log()[..., None, :]
    seen = passed_share(scores, share, least=least).cpu()
    of_queries, of_keys_ = _blocks(queries), _blocks(keys)
    shares = len(of_queries) // len(of_keys_)
    found = []
    for head, (q_blocks, rows) in enumerate(of_queries):
        k_blocks, columns = of_keys_[head // shares]
        found.append(BlockMap(q_blocks, k_blocks, seen[:, head : head + 1, rows][..., columns]))
    return tuple(found)


def _blocks(clusters: Clusters) -> list[tuple[Blocks, list[int]]]:
    """For each head the clusters with tokens as blocks, and their numbers."""
    orders = clusters.labels[0].argsort(dim=-1, stable=True)
    found = []
    for order, sizes in zip(orders, clusters.sizes[0].int().tolist(), strict=True):
        live = [number for number, size in enumerate(sizes) if size]
        found.append((Blocks(order, tuple(sizes[number] for number in live)), live))
    return found


BACKENDS = (SparseVideoGen2(),)
