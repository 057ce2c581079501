"""Slow, literal forms of published sparse methods in float64, token by token. Imports nothing of the package.

Each function returns which keys each query sees, bool, (batch, num_heads, tokens, tokens), for tokens in raster order
on a grid (frames, height, width). Tests compare them with the maps of `backends/sparse`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import ceil, e, exp, inf, log, log2

import torch

Shape = tuple[int, int, int]


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sees: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """softmax(scale * query key^T over visible keys) value, float64."""
    query, key, value = query.double(), key.double(), value.double()
    shares = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shares, 1), value.repeat_interleave(shares, 1)
    scores = query @ key.mT * (query.shape[3] ** -0.5 if scale is None else scale)
    return torch.softmax(scores.masked_fill(~sees, -torch.inf), -1) @ value


def with_text(sees: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Tokens beside the grid see everything, and everything sees them."""
    tokens = before + sees.shape[-1] + after
    whole = torch.ones(*sees.shape[:2], tokens, tokens, dtype=torch.bool)
    whole[:, :, before : tokens - after, before : tokens - after] = sees
    return whole


def boxes(shape: Shape, box: Shape) -> list[list[int]]:
    """Token numbers of each box of the grid; boxes at the border may be smaller."""
    found: dict[Shape, list[int]] = {}
    for number, place in enumerate(product(*map(range, shape))):
        at = tuple(coordinate // size for coordinate, size in zip(place, box, strict=True))
        found.setdefault(at, []).append(number)  # type: ignore[arg-type]  # three coordinates
    return [found[at] for at in sorted(found)]


def best(scores: list[float], count: int) -> list[int]:
    """The `count` best places; of equal scores the first."""
    return sorted(range(len(scores)), key=lambda at: (-scores[at], at))[:count]


def sees_blocks(blocks: list[list[int]], chosen: dict[int, list[int]], tokens: int) -> torch.Tensor:
    """(tokens, tokens) from the key blocks that each query block sees."""
    sees = torch.zeros(tokens, tokens, dtype=torch.bool)
    for of_queries, of_keys in chosen.items():
        for of_key in of_keys:
            sees[torch.tensor(blocks[of_queries])[:, None], torch.tensor(blocks[of_key])] = True
    return sees


def video_sparse(query: torch.Tensor, key: torch.Tensor, shape: Shape, box: Shape, count: int) -> torch.Tensor:
    """VSA (arXiv:2505.13389): the `count` boxes with the highest product of mean query and mean key."""
    blocks = boxes(shape, box)
    shares = query.shape[1] // key.shape[1]
    found = []
    for sample in range(query.shape[0]):
        for head in range(query.shape[1]):
            of_queries = [query[sample, head, block].double().mean(0) for block in blocks]
            of_keys = [key[sample, head // shares, block].double().mean(0) for block in blocks]
            chosen = {at: best([float(mean @ other) for other in of_keys], count) for at, mean in enumerate(of_queries)}
            found.append(sees_blocks(blocks, chosen, query.shape[2]))
    return torch.stack(found).view(*query.shape[:3], -1)


def coarse_branch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, shape: Shape, box: Shape
) -> torch.Tensor:
    """VSA's branch over means of boxes, times the gate, token by token."""
    blocks = boxes(shape, box)
    shares = query.shape[1] // key.shape[1]
    output = torch.empty(*query.shape[:3], value.shape[3], dtype=torch.float64)
    for sample in range(query.shape[0]):
        for head in range(query.shape[1]):
            of_keys = [key[sample, head // shares, block].double().mean(0) for block in blocks]
            of_values = [value[sample, head // shares, block].double().mean(0) for block in blocks]
            for block in blocks:
                mean = query[sample, head, block].double().mean(0)
                weights = [exp(float(mean @ other) * len(mean) ** -0.5) for other in of_keys]
                row = sum(weight * one for weight, one in zip(weights, of_values, strict=True)) / sum(weights)
                for token in block:
                    output[sample, head, token] = row * gate[sample, head, token].double()
    return output


def video_sparse_count(sparsity: float, blocks: int) -> int:
    """SGLang: ceil((1 - sparsity) * blocks), between 1 and all."""
    return min(max(ceil((1 - sparsity) * blocks), 1), blocks)


def rows_of(tokens: int, block: int) -> list[list[int]]:
    """Consecutive tokens, the last block with what is left."""
    return [list(range(start, min(start + block, tokens))) for start in range(0, tokens, block)]


def per_head(
    query: torch.Tensor, key: torch.Tensor, of_head: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """What a rule for one head, of (tokens, size) queries and keys in float64, gives for all heads and samples."""
    shares = query.shape[1] // key.shape[1]
    found = [
        of_head(query[sample, head].double(), key[sample, head // shares].double())
        for sample in range(query.shape[0])
        for head in range(query.shape[1])
    ]
    return torch.stack(found).view(*query.shape[:3], -1)


def sliding_tile(shape: Shape, box: Shape, windows: list[Shape], *, pushed_in: bool = True) -> torch.Tensor:
    """STA (arXiv:2502.04507): tiles at most w // 2 from the query's tile along each axis, (1, heads, tokens, tokens).

    `pushed_in`: the centre is clamped to [w // 2, tiles - 1 - w // 2].
    """
    blocks = boxes(shape, box)
    counts = [-(-length // size) for length, size in zip(shape, box, strict=True)]
    places = list(product(*map(range, counts)))
    found = []
    for window in windows:
        chosen: dict[int, list[int]] = {}
        for at, place in enumerate(places):
            near = []
            for other, there in enumerate(places):
                inside = True
                for axis in range(3):
                    half, centre = window[axis] // 2, place[axis]
                    if pushed_in:
                        centre = min(max(centre, half), counts[axis] - 1 - half)
                    inside = inside and abs(centre - there[axis]) <= half
                if inside:
                    near.append(other)
            chosen[at] = near
        found.append(sees_blocks(blocks, chosen, shape[0] * shape[1] * shape[2]))
    return torch.stack(found)[None]


def subblock(query: torch.Tensor, key: torch.Tensor, block: int, n_q: int, n_k: int, count: int) -> torch.Tensor:
    """SGLang's SubBlock: log of the sum over pairs of parts of exp(mean query . mean key * scale)."""

    def of_head(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        blocks = rows_of(len(queries), block)
        chosen = {}
        for at, rows in enumerate(blocks):
            parts = [queries[rows][part].mean(0) for part in rows_of(len(rows), block // n_q)]
            scores = []
            for columns in blocks:
                others = [keys[columns][part].mean(0) for part in rows_of(len(columns), block // n_k)]
                total = sum(exp(float(one @ two) * len(one) ** -0.5) for one in parts for two in others)
                scores.append(log(total))
            chosen[at] = best(scores, count)
        return sees_blocks(blocks, chosen, len(queries))

    return per_head(query, key, of_head)


def radial(shape: Shape, block: int, decay_factor: float, model: str) -> torch.Tensor:
    """Radial Attention (arXiv:2506.19852), one pair of frames after the other, (1, 1, tokens, tokens)."""
    frames, tokens = shape[0], shape[1] * shape[2]
    total = frames * tokens
    blocks = rows_of(total, block)
    count = len(blocks)
    place = torch.arange(tokens)
    apart = (place[:, None] - place).abs()
    seen = torch.zeros(count, count, dtype=torch.bool)
    for one, other in product(range(frames), repeat=2):
        distance = abs(one - other)
        length = 2 ** tokens.bit_length() / 2 ** distance.bit_length()
        width: float = max(block, length * decay_factor)
        if distance == 0:
            width = tokens
        if distance == 1:
            width = tokens // 2 if model == "wan" else tokens
        local = apart <= width
        if length < 128 and distance % int(128 / length) != 0:
            local = torch.zeros_like(local)
        if model == "wan" and other == 0:
            local = torch.ones_like(local)
        whole = torch.zeros(count * block, count * block, dtype=torch.bool)
        whole[one * tokens : (one + 1) * tokens, other * tokens : (other + 1) * tokens] = local
        density = whole.view(count, block, count, block).double().sum(1) / block
        high, some = (density > 1 / 3).double().sum(-1), (density > 0).double().sum(-1)
        seen |= high / (some + 1e-9) > 0.6
    for at in range(count):
        if not seen[at].any() and total % block == 0:
            seen[at, at] = True
    if total % block:
        seen[-1, :] = True
        seen[:, -1] = True
    chosen = {at: seen[at].nonzero().view(-1).tolist() for at in range(count)}
    return sees_blocks(blocks, chosen, total)[None, None]


def sparge(
    query: torch.Tensor, key: torch.Tensor, sizes: tuple[int, int], *, topk: float | None, cdf: float | None,
    similar: float, smooth: bool = True, sink: bool = False,
) -> torch.Tensor:  # fmt: skip
    """SpargeAttention (arXiv:2502.18137): self-similar blocks by P, others always."""

    def alike(block: torch.Tensor) -> bool:
        unit = block / block.norm(dim=-1, keepdim=True)
        return float((unit @ unit.T).mean()) > similar

    def of_head(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        if smooth:
            keys = keys - keys.mean(0)
        of_queries, of_keys = rows_of(len(queries), sizes[0]), rows_of(len(keys), sizes[1])
        usable = [alike(keys[columns]) for columns in of_keys]
        sees = torch.zeros(len(queries), len(keys), dtype=torch.bool)
        for rows in of_queries:
            mean = queries[rows].mean(0)
            scores = [
                float(mean @ keys[columns].mean(0)) * len(mean) ** -0.5 if use else -inf
                for columns, use in zip(of_keys, usable, strict=True)
            ]
            weights = [exp(score) for score in scores]
            order = best(scores, len(scores))
            if topk is not None:
                kept = order[: max(int(topk * len(order)), 1)]
            else:
                assert cdf is not None
                kept, reached = order[:1], weights[order[0]]
                for at in order[1:]:
                    reached += weights[at]
                    if reached > cdf * sum(weights):
                        break
                    kept.append(at)
            if not alike(queries[rows]):
                kept = order
            kept = [*kept, *(at for at, use in enumerate(usable) if not use), *([0] if sink else [])]
            for at in kept:
                sees[torch.tensor(rows)[:, None], torch.tensor(of_keys[at])] = True
        return sees

    return per_head(query, key, of_head)


def nabla(query: torch.Tensor, key: torch.Tensor, shape: Shape, box: Shape, share: float) -> torch.Tensor:
    """NABLA (arXiv:2507.13546) without its window: the highest blocks until their softmax sums to `share`."""
    blocks = boxes(shape, box)

    def of_head(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        chosen = {}
        for at, rows in enumerate(blocks):
            mean = queries[rows].mean(0)
            weights = [exp(float(mean @ keys[columns].mean(0)) * len(mean) ** -0.5) for columns in blocks]
            kept, reached = [], 0.0
            for other in best(weights, len(weights)):
                if reached >= share * sum(weights):
                    break
                kept.append(other)
                reached += weights[other]
            chosen[at] = kept
        return sees_blocks(blocks, chosen, len(queries))

    return per_head(query, key, of_head)


def custom(
    query: torch.Tensor, key: torch.Tensor, blocks: list[list[int]], near: Callable[[int, int], bool], *,
    count: int | None = None, share: float | None = None, weight: float | None = None, shared: bool = False,
) -> torch.Tensor:  # fmt: skip
    """A fixed part OR blocks by score, pair by pair.

    Args:
        near: whether a query block and a key block are in the fixed part, by their numbers.
        count: the best blocks; else `share`: the best until their softmax sums to it.
        weight: of SSTA's importance; None: scaled products of means.
        shared: all heads by means over heads: of the scores, with `weight` of queries and keys.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    heads = range(query.shape[1])
    if shared and weight is not None:
        query, key, heads = query.mean(1, keepdim=True), key.mean(1, keepdim=True), range(1)

    def unit(vector: torch.Tensor) -> torch.Tensor:
        return vector / vector.norm()

    tables = []
    for head in heads:
        of_queries = [query[0, head, block].double().mean(0) for block in blocks]
        of_keys = [key[0, head, block].double().mean(0) for block in blocks]
        table = [[float(one @ other) * len(one) ** -0.5 for other in of_keys] for one in of_queries]
        if weight is not None:
            alike = [[(float(unit(one) @ unit(other)) + 1) / 2 for other in of_keys] for one in of_keys]
            others = max(len(blocks) - 1, 1)
            redundant = [(sum(row) - row[at]) / others for at, row in enumerate(alike)]
            table = [
                [
                    weight * (float(unit(one) @ unit(other)) + 1) / 2 - (1 - weight) * redundant[at]
                    for at, other in enumerate(of_keys)
                ]
                for one in of_queries
            ]
        tables.append(table)
    if shared:
        tables = [[[sum(cells) / len(tables) for cells in zip(*rows)] for rows in zip(*tables)]]  # noqa: B905
    found = []
    for table in tables:
        chosen = {}
        for at, scores in enumerate(table):
            kept, reached, total = [], 0.0, sum(map(exp, scores))
            for other in best(scores, len(scores) if count is None else count):
                if share is not None and kept and reached >= share * total:
                    break
                kept.append(other)
                reached += exp(scores[other])
            chosen[at] = [*kept, *(other for other in range(len(blocks)) if near(at, other))]
        found.append(sees_blocks(blocks, chosen, query.shape[2]))
    return torch.stack(found)[None]


def ssta(
    query: torch.Tensor, key: torch.Tensor, shape: Shape, box: Shape, count: int, weight: float, *, shared: bool
) -> torch.Tensor:
    """HunyuanVideo 1.5's tiles by importance, without its window; `shared`: means over heads too."""
    blocks = boxes(shape, box)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    if shared:
        query, key = query.double().mean(1, keepdim=True), key.double().mean(1, keepdim=True)

    def cosine(one: torch.Tensor, two: torch.Tensor) -> float:
        return float(one @ two / (one.norm() * two.norm()))

    def of_head(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        of_queries = [queries[rows].mean(0) for rows in blocks]
        of_keys = [keys[rows].mean(0) for rows in blocks]
        chosen = {}
        redundant = []
        for at, mean in enumerate(of_keys):
            others = [(cosine(mean, other) + 1) / 2 for index, other in enumerate(of_keys) if index != at]
            redundant.append(sum(others) / max(len(others), 1))
        for at, mean in enumerate(of_queries):
            scores = [
                weight * (cosine(mean, other) + 1) / 2 - (1 - weight) * redundant[index]
                for index, other in enumerate(of_keys)
            ]
            chosen[at] = best(scores, count)
        return sees_blocks(blocks, chosen, len(queries))

    return per_head(query, key, of_head)


Clusters = tuple[list[int], torch.Tensor]
"""The cluster of each token, and the centroids."""


def clusters(tokens: torch.Tensor, centroids: torch.Tensor, iterations: int) -> Clusters:
    """Lloyd's k-means of (tokens, size): nearest centroid, the first of equal ones; then the mean of its tokens.

    It ends early where no centroid moves by 1e-4.
    """
    for _ in range(iterations):
        distances = (tokens[:, None] - centroids).square().sum(-1).tolist()
        labels = [best([-distance for distance in row], 1)[0] for row in distances]
        moved = centroids.clone()
        for at in range(len(centroids)):
            of_cluster = [token for token, label in enumerate(labels) if label == at]
            if of_cluster:
                moved[at] = tokens[of_cluster].mean(0)
        if max((moved - centroids).norm(dim=-1).tolist()) < 1e-4:
            break
        centroids = moved
    return labels, centroids


def sparse_video_gen_2(of_queries: Clusters, of_keys: Clusters, share: float, least: float) -> torch.Tensor:
    """SVG2 (arXiv:2505.18875) of one head: which keys each query sees, (tokens, tokens).

    P is the softmax over key clusters, each weighted by its size; clusters are kept until P passes `share`, the one
    that passes it too, and at least int(`least` * clusters).
    """
    (q_labels, q_centroids), (k_labels, k_centroids) = of_queries, of_keys
    sizes = [k_labels.count(at) for at in range(len(k_centroids))]
    sees = torch.zeros(len(q_labels), len(k_labels), dtype=torch.bool)
    for at in set(q_labels):
        query = q_centroids[at]
        weights = [
            size * exp(float(query @ key) * len(key) ** -0.5) for size, key in zip(sizes, k_centroids, strict=True)
        ]
        kept, passed = [], 0.0
        for number, other in enumerate(best(weights, len(weights))):
            if passed > share * sum(weights) and number >= int(least * len(weights)):
                break
            kept.append(other)
            passed += weights[other]
        rows = torch.tensor([label == at for label in q_labels])
        columns = torch.tensor([label in kept for label in k_labels])
        sees |= rows[:, None] & columns
    return sees


def sparse_video_gen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: Shape, tokens: int, block: int, *,
    kept: float, rows: list[int], model: str,
) -> torch.Tensor:  # fmt: skip
    """SVG1 (arXiv:2502.01776): for each head the spatial or the temporal mask, whichever changes `rows` less.

    `tokens`: with those of the text. Both masks are a band of blocks, in Wan with the first frame's number of tokens,
    over tokens frame by frame or place by place; `rows` are compared under masks of a fixed width.
    """
    cells, frame = shape[0] * shape[1] * shape[2], shape[1] * shape[2]
    share = max(kept - 2 * (tokens - cells) / tokens, 0)
    width = tokens * (1 - (1 - share) ** 0.5)
    reach = max(int(frame * (2 if model == "wan" else 1.5)) // block, 1)
    places = list(range(cells)), [at % frame * shape[0] + at // frame for at in range(cells)]
    first = frame if model == "wan" else -1

    def seen(place: list[int], at: int, other: int) -> bool:
        of_query, of_key = place[at] // block, place[other] // block
        near = of_query == of_key or abs(of_query - of_key) * block < width
        return near or of_key * block + block // 2 <= first

    def compared(place: list[int], at: int, other: int) -> bool:
        return abs(place[at] // block - place[other] // block) < reach or place[other] < first

    masks = [
        torch.tensor([[seen(place, at, other) for other in range(cells)] for at in range(cells)]) for place in places
    ]
    samples = [
        torch.tensor([[compared(place, at, other) for other in range(cells)] for at in rows]) for place in places
    ]
    shares, found = query.shape[1] // key.shape[1], []
    for sample in range(query.shape[0]):
        for head in range(query.shape[1]):
            of_key, of_value = key[sample, head // shares].double(), value[sample, head // shares].double()
            scores = query[sample, head, rows].double() @ of_key.T * query.shape[3] ** -0.5
            whole = torch.softmax(scores, -1) @ of_value
            errors = [
                float(((torch.softmax(scores.masked_fill(~mask, -inf), -1) @ of_value - whole) ** 2).mean())
                for mask in samples
            ]
            found.append(masks[int(errors[1] < errors[0])])
    return torch.stack(found).view(*query.shape[:3], -1)


def vmoba(
    query: torch.Tensor, key: torch.Tensor, shape: Shape, box: Shape, *, topk: int | None, threshold: float, over: str
) -> torch.Tensor:
    """VMoBA (arXiv:2506.23858) of one sample: which keys each query sees, (1, heads, tokens, tokens).

    `topk` chunks with the query's own; or its own and others in the order of their gates, at least one, until both sum
    to `threshold` of all, where gates are scaled to 0 to 1 over `over`.
    """
    blocks, (heads, tokens) = boxes(shape, box), query.shape[1:3]
    shares = heads // key.shape[1]
    own = {token: at for at, block in enumerate(blocks) for token in block}
    means = [torch.stack([key[0, head, block].double().mean(0) for block in blocks]) for head in range(key.shape[1])]
    of_head = [(query[0, head].double() @ means[head // shares].mT).tolist() for head in range(heads)]
    places = list(product(range(len(blocks)), range(heads), range(tokens)))
    gates = {(at, head, token): of_head[head][token][at] for at, head, token in places}
    chosen: set[tuple[int, int, int]] = {(own[token], head, token) for head in range(heads) for token in range(tokens)}
    if topk is not None:
        for head, token in product(range(heads), range(tokens)):
            row = [inf if at == own[token] else gates[at, head, token] for at in range(len(blocks))]
            chosen |= {(at, head, token) for at in best(row, topk)}
    else:
        groups: dict[object, list[tuple[int, int, int]]] = {}
        for at, head, token in gates:
            group = {"query_head": (head, token), "block": at, "head_global": head, "overall": 0}[over]
            groups.setdefault(group, []).append((at, head, token))
        for places in groups.values():
            row = [gates[place] for place in places]
            spread = max(row) - min(row)
            scaled = [(gate - min(row)) / (spread if spread > 1e-6 else 1) for gate in row]
            mine = [place in chosen and place[0] == own[place[2]] for place in places]
            total = sum(scaled) + 1e-6
            passed = sum(gate for gate, is_own in zip(scaled, mine, strict=True) if is_own) / total
            others = [0.0 if is_own else gate for gate, is_own in zip(scaled, mine, strict=True)]
            for at in best(others, len(others)):
                chosen.add(places[at])
                passed += others[at] / total
                if passed >= threshold:
                    break
    sees = torch.zeros(1, heads, tokens, tokens, dtype=torch.bool)
    for at, head, token in chosen:
        sees[0, head, token, blocks[at]] = True
    return sees


def sol(
    query: torch.Tensor, key: torch.Tensor, block: int, *, tau: float | None, share: float, sink: range
) -> torch.Tensor:
    """Sol-Attn (arXiv:2607.24027): blocks above the threshold, or above the (count + 1)-th highest score; and always
    neighbours and the sink.
    """

    def of_head(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        blocks, two = rows_of(len(queries), block), len(queries[0]) ** -0.5 * log2(e)
        of_queries = [queries[rows].mean(0) for rows in blocks]
        of_keys = torch.stack([keys[rows].mean(0) for rows in blocks])
        of_keys = of_keys - of_keys.mean(0)
        chosen = {}
        for at, mean in enumerate(of_queries):
            scores = [float((queries[blocks[at]] @ other).mean()) * two for other in of_keys]
            if tau is not None:
                least = tau * (float((mean**2 * (of_keys**2).mean(0)).sum()) * two**2 + 1e-6) ** 0.5
            else:
                count = max(1, min(len(blocks) - 1, round(share * len(blocks))))
                least = sorted(scores, reverse=True)[count]
            chosen[at] = [
                other for other, score in enumerate(scores)
                if score > least or abs(other - at) <= 1 or any(token in sink for token in blocks[other])
            ]  # fmt: skip
        return sees_blocks(blocks, chosen, len(queries))

    return per_head(query, key, of_head)


def with_pooled_terms(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sees: torch.Tensor, block: int, before: int,
    kv_before: int, cells: int, scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of visible keys and, for each block of the grid that a query of the grid does not see, of one more key.

    Its score is that of the mean query of the query's block and the block's mean key, both to the mean of these means;
    it weighs as much as its tokens, and its value is their mean.
    """
    query, key, value = query.double(), key.double(), value.double()
    shares, factor = query.shape[1] // key.shape[1], query.shape[3] ** -0.5 if scale is None else scale
    sees = sees.expand(*query.shape[:3], key.shape[2])
    output = masked_attention(query, key, value, sees, scale)
    blocks = rows_of(cells, block)
    for sample, head in product(range(query.shape[0]), range(query.shape[1])):
        keys, values = key[sample, head // shares], value[sample, head // shares]
        on_grid = [[kv_before + cell for cell in cells_of] for cells_of in blocks]
        means = torch.stack([keys[columns].mean(0) for columns in on_grid])
        centre = means.mean(0)
        for rows in blocks:
            tokens = [before + cell for cell in rows]
            queries, shown = query[sample, head, tokens], sees[sample, head, tokens]
            weights = torch.exp(queries @ (keys - centre).mT * factor) * shown
            top, total = weights @ values, weights.sum(-1)
            for columns, of_block in zip(on_grid, means, strict=True):
                weight = torch.exp(queries.mean(0) @ (of_block - centre) * factor) * len(columns)
                weight = weight * ~shown[:, columns[0]]
                top, total = top + weight[:, None] * values[columns].mean(0), total + weight
            output[sample, head, tokens] = top / total[:, None]
    return output
