"""The maps of sparse methods are those of their literal forms, on ragged grids and beside text."""

from __future__ import annotations

import json
import os
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import literal_sparse as literal  # noqa: E402
from attention_backends.backends import account, attention  # noqa: E402
from attention_backends.backends.config import AttentionSpec  # noqa: E402
from attention_backends.backends.config.text import parse_config  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.sparse.block_map import BlockMap, Dense, with_other_tokens  # noqa: E402
from attention_backends.backends.sparse.blocks import Blocks, along_curve, cut  # noqa: E402
from attention_backends.backends.sparse.by_step import value_at  # noqa: E402
from attention_backends.backends.sparse.choose_blocks import passed_share, until_share  # noqa: E402
from attention_backends.backends.sparse.executors import gather as gathering  # noqa: E402
from attention_backends.backends.sparse.kernel import NoExecutorError, SparseKernel  # noqa: E402
from attention_backends.backends.sparse.kmeans import first_tokens  # noqa: E402
from attention_backends.backends.sparse.method import SparseMethod, Where  # noqa: E402
from attention_backends.backends.sparse.methods import (  # noqa: E402
    cube,
    custom,
    nabla,
    radial,
    sliding_tile,
    sol,
    sparge,
    sparse_video_gen,
    sparse_video_gen_2,
    ssta,
    subblock,
    video_sparse,
    vmoba,
)  # fmt: skip
from attention_backends.backends.sparse.methods.sliding_tile import parse_strategy, read_strategy  # noqa: E402
from attention_backends.backends.sparse.windows import window_map  # noqa: E402
from attention_backends.backends.values.errors import ConfigError  # noqa: E402
from attention_backends.backends.values.grid import Kept, Place, Progress, TokenGrid  # noqa: E402
from attention_backends.backends.values.platform import Platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall  # noqa: E402
from sparse_cases import TOLERANCE, literal_flex  # noqa: E402, F401
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

CPU = Platform("cpu", torch="2.13.0", os="linux")
POOLED = 2e-6
"""Relative L2 of a call with pooled terms, which are computed in float32."""
OUTSIDE = Where(None, None, None, None, "self", ())
Case = tuple[dict[str, Any], Any]
"""Options, and which tokens of the grid see which."""


def at(step: int | None = None, steps: int | None = None, layer: int | None = None) -> Where:
    return OUTSIDE._replace(step=step, steps=steps, layer=layer)


def selected(
    backend_id: str, call: AttentionCall, grid: TokenGrid, options: dict[str, Any], where: Where = OUTSIDE
) -> Any:
    """What a method answers for a call with the tokens of the grid alone."""
    method = BACKENDS[backend_id]
    assert isinstance(method, SparseMethod)
    AttentionSpec(backend_id, options)  # allowed
    kernel = method.load(CPU, **options)
    assert isinstance(kernel, SparseKernel)
    return method.select_at(call, grid, where, kernel.options)


def sliding_tile_case(rng: random.Random, call: AttentionCall, grid: TokenGrid) -> Case:
    window = [rng.randint(1, 4) for _ in range(3)]
    return {"window_size": window}, literal.sliding_tile(grid.shape, sliding_tile.TILE, [tuple(window)])


def subblock_case(rng: random.Random, call: AttentionCall, grid: TokenGrid) -> Case:
    parts, sparsity = rng.choice((1, 2, 4)), rng.choice((0.5, 0.75, 0.9))
    blocks = -(-grid.cells // subblock.BLOCK)
    count = -(-literal.video_sparse_count(sparsity, blocks) // subblock.MULTIPLE) * subblock.MULTIPLE
    options = {"sparsity": sparsity, "min_seq_len": 0, "n_q": 4, "n_k": parts}
    return options, literal.subblock(call.query, call.key, subblock.BLOCK, 4, parts, min(count, blocks))


def radial_case(rng: random.Random, call: AttentionCall, grid: TokenGrid) -> Case:
    model, decay = rng.choice(("wan", "hunyuan")), rng.choice((0.2, 0.5, 1.0))
    return {"model_type": model, "decay_factor": decay}, literal.radial(grid.shape, 128, decay, model)


def sparge_case(rng: random.Random, call: AttentionCall, grid: TokenGrid) -> Case:
    share, sink, smooth = rng.choice((0.2, 0.4, 0.7)), rng.choice((True, False)), rng.choice((True, False))
    similar = rng.choice((-0.1, 0.05, 0.3))
    rule = rng.choice(("topk", "sparsity_ratio", "cdfthreshd"))
    options = {rule: share, "simthreshd1": similar, "attention_sink": sink, "smooth_k": smooth}
    topk = None if rule == "cdfthreshd" else share if rule == "topk" else 1 - share
    expected = literal.sparge(
        call.query, call.key, (sparge.QUERIES, sparge.KEYS), topk=topk, cdf=share if topk is None else None,
        similar=similar, smooth=smooth, sink=sink,
    )  # fmt: skip
    return options, expected


def nabla_case(rng: random.Random, call: AttentionCall, grid: TokenGrid) -> Case:
    share, window = rng.choice((0.1, 0.3, 0.6)), [rng.choice((1, 2, 3)) for _ in range(3)]
    near = literal.sliding_tile(grid.shape, nabla.TILE, [tuple(window)], pushed_in=False)
    options = dict(zip(("P", "wT", "wH", "wW"), (share, *window), strict=True))
    return options, literal.nabla(call.query, call.key, grid.shape, nabla.TILE, share) | near


def ssta_case(rng: random.Random, call: AttentionCall, grid: TokenGrid) -> Case:
    count, weight, shared = rng.randint(1, 5), rng.choice((0.3, 0.7)), rng.choice((0, 1))
    window = [rng.choice((1, 2)) for _ in range(3)]
    options = {
        **{"ssta_topk": count, "ssta_lambda": weight, "win_size": [window]}, "attn_mask_share_within_head": shared
    }  # fmt: skip
    near = literal.sliding_tile(grid.shape, ssta.TILE, [tuple(window)])
    found = literal.ssta(call.query, call.key, grid.shape, ssta.TILE, count, weight, shared=bool(shared))
    return options, found | near


def cube_case(rng: random.Random, call: AttentionCall, grid: TokenGrid) -> Case:
    size, share = tuple(rng.randint(1, 3) for _ in range(3)), rng.choice((0.2, 0.5))
    count = max(int(len(literal.boxes(grid.shape, size)) * share), 1)
    return {"local_cube_size": list(size), "topk": share}, literal.video_sparse(
        call.query, call.key, grid.shape, size, count
    )


def custom_case(rng: random.Random, call: AttentionCall, grid: TokenGrid) -> Case:
    order, tile = (
        rng.choice(("tiles", "tiles", "raster", "pixels")),
        (rng.randint(1, 3), *(rng.choice((2, 3)) for _ in range(2))),
    )
    window = [rng.randint(1, 3) for _ in range(3)] if order == "tiles" and rng.random() < 0.7 else None
    pushed_in, neighbours, sink = rng.random() < 0.5, rng.choice((0, 0, 1)), rng.choice((0, 0, 1))
    options: dict[str, Any] = {"order": order, "neighbours": neighbours, "sink_frames": sink}
    frames, height, width = grid.shape
    if order == "tiles":
        options |= {"tile": list(tile), "pushed_in": pushed_in} | ({} if window is None else {"window": window})
        blocks = literal.boxes(grid.shape, tile)
    else:
        options["block_size"] = 16
        blocks = literal.rows_of(grid.cells, 16)
    if order == "pixels":
        place_major = [(t * height + h) * width + w for h in range(height) for w in range(width) for t in range(frames)]
        blocks = [[place_major[at] for at in block] for block in blocks]
    shared, weight = rng.random() < 0.3, rng.choice((None, 0.3, 0.7))
    options |= {"share_heads": shared} | ({} if weight is None else {"score": "importance", "score_lambda": weight})
    rule = rng.choice(("topk", "topk_blocks", "none", *(("cdf",) if weight is None else ())))
    count, share = (rng.randint(1, 3), None) if rule == "topk_blocks" else (0, rng.choice((0.2, 0.4)))
    if rule == "topk":
        count = literal.video_sparse_count(1 - share, len(blocks))
    if rule == "none" and not (window or neighbours or sink):
        count = 1
    options |= {"topk": 0} if rule == "none" else {rule: count if share is None else share}
    near = torch.zeros(1, 1, grid.cells, grid.cells, dtype=torch.bool)
    if window is not None:
        near |= literal.sliding_tile(grid.shape, tile, [tuple(window)], pushed_in=pushed_in)

    def fixed(at: int, other: int) -> bool:
        early = any(token < sink * height * width for token in blocks[other])
        return (
            early
            or (neighbours > 0 and abs(at - other) <= neighbours)
            or bool(near[0, 0, blocks[at][0], blocks[other][0]])
        )

    found = literal.custom(
        call.query, call.key, blocks, fixed, count=None if rule == "cdf" else count,
        share=share if rule == "cdf" else None, weight=weight, shared=shared,
    )  # fmt: skip
    return options, found


def video_sparse_case(rng: random.Random, call: AttentionCall, grid: TokenGrid) -> Case:
    sparsity = rng.choice((0.3, 0.5, 0.8))
    count = literal.video_sparse_count(sparsity, len(literal.boxes(grid.shape, video_sparse.CUBE)))
    options = {rng.choice(("sparsity", "VSA_sparsity")): sparsity}
    return options, literal.video_sparse(call.query, call.key, grid.shape, video_sparse.CUBE, count)


def literal_clusters(call: AttentionCall, counts: tuple[int, int], iterations: int) -> list[list[literal.Clusters]]:
    """Of the queries and of the keys of each head, from the tokens that the method begins with."""
    sides = (call.query, call.key)
    return [
        [
            literal.clusters(tokens.double(), tokens[first_tokens(len(tokens), count)].double(), iterations)
            for tokens in side[0]
        ]
        for side, count in zip(sides, counts, strict=True)
    ]


def sparse_video_gen_2_case(rng: random.Random, call: AttentionCall, grid: TokenGrid) -> Case:
    share, least, iterations = rng.choice((0.2, 0.5, 0.8)), rng.choice((0.0, 0.3)), rng.choice((1, 3))
    counts = rng.randint(1, 5), rng.randint(4, 9)
    options = {
        "svg2_num_q_centroids": counts[0], "svg2_num_k_centroids": counts[1], "svg2_top_p_kmeans": share,
        "svg2_min_kc_ratio": least, "svg2_kmeans_iter_init": iterations,
    }  # fmt: skip
    of_queries, of_keys = literal_clusters(call, counts, iterations)
    shares = len(of_queries) // len(of_keys)
    sees = [
        literal.sparse_video_gen_2(queries, of_keys[head // shares], share, least)
        for head, queries in enumerate(of_queries)
    ]
    return options, torch.stack(sees)[None]


def sparse_video_gen_case(rng: random.Random, call: AttentionCall, grid: TokenGrid) -> Case:
    kept, count, model = rng.choice((0.0, 0.2, 0.5, 0.7)), rng.choice((1, 8, 64)), rng.choice(("wan", "hunyuan"))
    rows = first_tokens(grid.cells, min(count, grid.cells)).tolist()
    sees = literal.sparse_video_gen(
        call.query, call.key, call.value, grid.shape, grid.tokens, sparse_video_gen.BLOCK, kept=kept, rows=rows,
        model=model,
    )  # fmt: skip
    return {"kept": kept, "num_sampled_rows": count, "model_type": model}, sees


def vmoba_case(rng: random.Random, call: AttentionCall, grid: TokenGrid) -> Case:
    kind = rng.choice(vmoba.KINDS)
    size = {"temporal": [rng.randint(1, 2)], "spatial": [2, 3], "st": [rng.randint(1, 2), 3, 2]}[kind]
    box = {"temporal": (*size, grid.height, grid.width), "spatial": (grid.frames, *size), "st": tuple(size)}[kind]
    topk, over, threshold = rng.randint(1, 4), rng.choice(vmoba.OVER), rng.choice((0.05, 0.3, 0.7))
    mode = rng.choice(vmoba.MODES)
    options = {
        f"{kind}_chunk_size": size[0] if kind == "temporal" else size, f"{kind}_topk": topk, "moba_select_mode": mode,
        "moba_threshold": threshold, "moba_threshold_type": over,
        **{f"{other}_layer": int(other == kind) for other in vmoba.KINDS},
    }  # fmt: skip
    chunks = len(literal.boxes(grid.shape, box))
    by_count = min(topk, chunks) if mode == "topk" else None
    return options, literal.vmoba(
        call.query, call.key, grid.shape, box, topk=by_count, threshold=threshold, over=over
    )  # fmt: skip


def sol_case(rng: random.Random, call: AttentionCall, grid: TokenGrid) -> Case:
    rule, start, count = rng.choice(("tau", "keep_percent")), rng.randint(0, grid.cells), rng.choice((0, 0, 1, 9))
    value = rng.choice((0.3, 1.0)) if rule == "tau" else rng.choice((10, 30))
    sees = literal.sol(
        call.query, call.key, sol.BLOCK, tau=value if rule == "tau" else None, share=value / 100,
        sink=range(start, start + count),
    )  # fmt: skip
    return {rule: value, "sink_start": grid.before + start, "sink_tokens": count}, sees


def expected_output(backend_id: str, call: AttentionCall, sees: Any, grid: TokenGrid) -> Any:
    """The literal result of a call in which each query sees these keys."""
    if backend_id == "sol_attn" and not sees.all():
        kv_before = grid.before - grid.hidden_before
        return literal.with_pooled_terms(
            call.query, call.key, call.value, sees, sol.BLOCK, grid.before, kv_before, grid.cells, call.scale
        )
    return literal.masked_attention(call.query, call.key, call.value, sees, call.scale)


CASES: dict[str, Callable[[random.Random, AttentionCall, TokenGrid], Case]] = {
    "sliding_tile_attn": sliding_tile_case,
    "subblock_attn": subblock_case,
    "radial_attn": radial_case,
    "sparge_attn": sparge_case,
    "nabla_attn": nabla_case,
    "ssta_attn": ssta_case,
    "cube_attn": cube_case,
    "custom_sparse_attn": custom_case,
    "video_sparse_attn": video_sparse_case,
    "sparse_video_gen_2_attn": sparse_video_gen_2_case,
    "sparse_video_gen_attn": sparse_video_gen_case,
    "vmoba_attn": vmoba_case,
    "sol_attn": sol_case,
}
"""Backend -> a random case of it."""

SIDES: dict[str, tuple[range, range, range]] = {
    "radial_attn": (range(4, 10), range(5, 12), range(6, 14)),
    "subblock_attn": (range(2, 5), range(4, 9), range(4, 9)),
    "vmoba_attn": (range(1, 4), range(3, 7), range(3, 6)),
    "sol_attn": (range(1, 4), range(3, 7), range(3, 7)),
}
"""Backend -> its grids, where others than small ones are asked for."""


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few tokens, so that literal forms have many blocks in little time."""
    monkeypatch.setattr(sliding_tile, "TILE", (2, 2, 3))
    monkeypatch.setattr(ssta, "TILE", (2, 3, 2))
    monkeypatch.setattr(nabla, "TILE", (1, 3, 2))
    monkeypatch.setattr(subblock, "BLOCK", 8)
    monkeypatch.setattr(subblock, "MULTIPLE", 3)
    monkeypatch.setattr(video_sparse, "CUBE", (2, 2, 3))
    monkeypatch.setattr(sparge, "QUERIES", 10)
    monkeypatch.setattr(sparge, "KEYS", 6)
    monkeypatch.setattr(sol, "BLOCK", 5)
    monkeypatch.setattr(sparse_video_gen, "BLOCK", 5)


def random_case(backend_id: str, seed: object) -> tuple[AttentionCall, TokenGrid, random.Random]:
    rng = random.Random(f"{backend_id}{seed}")
    torch.manual_seed(rng.randrange(2**31))
    sides = SIDES.get(backend_id, (range(1, 5), range(3, 9), range(3, 9)))
    grid = TokenGrid(*(rng.choice(side) for side in sides))
    heads, shares = rng.choice(((2, 1), (2, 2)))
    if backend_id == "radial_attn":
        heads, shares = 1, 1
    query, key = (torch.randn(1, count, grid.cells, 8, dtype=torch.float64) for count in (heads, heads // shares))
    key = key + torch.randn(1, 1, grid.cells // 6 + 1, 8).double().repeat_interleave(6, 2)[:, :, : grid.cells]
    value = torch.randn(1, key.shape[1], grid.cells, 6, dtype=torch.float64)
    return AttentionCall(query, key, value, enable_gqa=shares > 1), grid, rng


def agree(backend_id: str, seed: object) -> bool:
    """Compare one random case of one or two samples with its literal form; whether the method left anything out."""
    call, grid, rng = random_case(backend_id, seed)
    before = rng.getstate()
    options, expected = CASES[backend_id](rng, call, grid)
    if rng.random() < 0.5:
        other = call.changed(query=torch.randn_like(call.query), key=call.key.flip(2), value=call.value.flip(2))
        rng.setstate(before)
        again, of_other = CASES[backend_id](rng, other, grid)
        assert again == options
        call = call.changed(
            query=torch.cat((call.query, other.query)), key=torch.cat((call.key, other.key)),
            value=torch.cat((call.value, other.value)),
        )  # fmt: skip
        expected = torch.cat(torch.broadcast_tensors(expected, of_other))
    found = selected(backend_id, call, grid, options)
    if isinstance(found, Dense):
        assert expected.all(), (grid, options)
        return False
    mask = found.mask()
    assert torch.equal(mask.expand_as(expected | mask), expected.expand_as(expected | mask)), (grid, options)
    assert mask.any(-1).all()
    if isinstance(found, BlockMap) and found.counts is not None:
        assert torch.equal(found.seen.sum(-1), torch.tensor(found.counts).expand(found.seen.shape[:-1]))
    return not bool(expected.all())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backend_id", CASES)
def test_the_map_is_the_published_one(backend_id: str) -> None:
    assert sum(agree(backend_id, seed) for seed in range(15)) >= 6, "most cases leave something out"


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backend_id", CASES)
def test_the_map_is_the_published_one_in_many_cases(backend_id: str) -> None:
    assert sum(agree(backend_id, seed) for seed in range(100, 400)) >= 150


def computes_its_map(backend_id: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """One random case: dtype, executor, text beside the grid, some of it hidden; whether anything was left out."""
    on_grid, grid, rng = random_case(backend_id, seed)
    grid = grid._replace(before=rng.choice((0, 5)), after=rng.choice((0, 9)))
    grid = grid._replace(hidden_before=rng.choice((0, min(grid.before, 2))))
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    executor = rng.choice(("gather", "gather of cards", "flex"))
    if executor == "gather of cards":
        monkeypatch.setattr(gathering, "_by_head", lambda *args: gathering._all_heads(*args[:-1]))
    batch = rng.randint(1, 2)
    kv_before, kv_after = grid.before - grid.hidden_before, rng.choice((0, grid.after))

    def beside(tensor: Any, before: int, after: int) -> Any:
        heads, size = tensor.shape[1], tensor.shape[3]
        others = (torch.randn(batch, heads, count, size, dtype=tensor.dtype) for count in (before, after))
        first = next(others)
        return torch.cat((first, tensor.expand(batch, -1, -1, -1), next(others)), 2).to(dtype)

    call = AttentionCall(
        beside(on_grid.query, grid.before, grid.after), beside(on_grid.key, kv_before, kv_after),
        beside(on_grid.value, kv_before, kv_after), enable_gqa=on_grid.enable_gqa, scale=rng.choice((None, 0.4)),
    )  # fmt: skip
    q_cells, k_cells = (slice(before, before + grid.cells) for before in (grid.before, kv_before))
    cells = call.changed(query=call.query[:, :, q_cells], key=call.key[:, :, k_cells], value=call.value[:, :, k_cells])
    options, _ = CASES[backend_id](rng, on_grid, grid)
    found = selected(backend_id, cells, grid, options)
    sees = torch.ones(1, 1, grid.tokens, kv_before + grid.cells + kv_after, dtype=torch.bool)
    if not isinstance(found, Dense):
        mask = found.mask()
        sees = sees.expand(*mask.shape[:2], -1, -1).clone()
        sees[:, :, q_cells, k_cells] = mask
    method = BACKENDS[backend_id]
    assert isinstance(method, SparseMethod)
    named = method.only_executor or executor.partition(" ")[0]
    kernel, kept = method.load(CPU, **options, executor=named), Kept()
    assert isinstance(kernel, SparseKernel)
    whole = SimpleNamespace(called=False)

    def dense(call: AttentionCall) -> Any:
        whole.called = True
        return literal.masked_attention(call.query, call.key, call.value, torch.tensor(True), call.scale).to(dtype)

    try:
        output = kernel.bound(call.request(grid=grid), Place(), Progress(), kept, dense)(call)
    except NoExecutorError:
        assert (named, dtype) == ("flex", torch.float64)
        return False
    assert not whole.called or isinstance(found, Dense)
    expected = expected_output(backend_id, call, sees, grid)
    assert output.dtype == dtype
    least = POOLED if backend_id == "sol_attn" else 0
    allowed = max(TOLERANCE[dtype], least) * expected.norm()
    assert (output.double() - expected).norm() <= allowed, (grid, options, executor, dtype)
    return not bool(sees.all())


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks", "literal_flex")
@pytest.mark.parametrize("backend_id", CASES)
def test_what_is_computed_is_the_map_in_many_cases(backend_id: str) -> None:
    """10,000 cases in all."""
    left_out = 0
    for seed in range(1250):
        with pytest.MonkeyPatch.context() as patch:
            left_out += computes_its_map(backend_id, seed, patch)
    assert left_out >= 300


@pytest.mark.usefixtures("small_blocks", "literal_flex")
@pytest.mark.parametrize("backend_id", CASES)
def test_what_is_computed_is_the_map_in_some_cases(backend_id: str) -> None:
    for seed in range(4):
        with pytest.MonkeyPatch.context() as patch:
            computes_its_map(backend_id, seed, patch)


@pytest.mark.parametrize("model", ["wan", "hunyuan"])
@pytest.mark.parametrize("block", [6, 12, 16])
def test_radial_windows_of_many_blocks(block: int, model: str) -> None:
    rng = random.Random(f"{block}{model}")
    for _ in range(4):
        shape, decay = (rng.randint(3, 9), rng.randint(7, 13), rng.randint(7, 13)), rng.choice((0.1, 0.3, 1.0))
        tokens = shape[1] * shape[2]
        seen, counts = radial.radial_map(shape[0], tokens, block, decay, model)
        blocks = Blocks(None, cut(shape[0] * tokens, block))
        assert torch.equal(BlockMap(blocks, blocks, seen).mask(), literal.radial(shape, block, decay, model)), shape
        assert seen.sum(-1)[0, 0].tolist() == list(counts)


def test_sliding_tiles_of_the_published_size() -> None:
    grid = TokenGrid(13, 17, 20)
    call = AttentionCall(*(torch.zeros(1, 1, grid.cells, 8) for _ in range(3)))
    for window in ((1, 3, 1), (2, 1, 3)):
        found = selected("sliding_tile_attn", call, grid, {"window_size": list(window)})
        assert isinstance(found, BlockMap)
        assert torch.equal(found.mask(), literal.sliding_tile(grid.shape, (6, 8, 8), [window]))


LEAVES_OUT: dict[str, dict[str, Any]] = {
    "sliding_tile_attn": {"window_size": [1, 2, 1]},
    "subblock_attn": {"topk": 0.2, "min_seq_len": 0},
    "radial_attn": {"block_size": 64, "decay_factor": 0.2},
    "sparge_attn": {"topk": 0.3},
    "nabla_attn": {"P": 0.3, "wT": 1},
    "ssta_attn": {"ssta_topk": 2, "win_size": [1, 1, 1]},
    "cube_attn": {"topk": 0.3},
    "custom_sparse_attn": {"topk": 0.3, "window": [1, 3, 1]},
    "video_sparse_attn": {"sparsity": 0.7},
    "sparse_video_gen_2_attn": {"svg2_num_k_centroids": 20, "svg2_top_p_kmeans": 0.3, "svg2_kmeans_iter_init": 3},
    "sparse_video_gen_attn": {},
    "sol_attn": {"tau": 1.0},
    "vmoba_attn": {
        "moba_config": {"moba_select_mode": "topk", "temporal_chunk_size": 1, "temporal_topk": 2},
        "spatial_topk": 4, "st_topk": 5,
    },
}  # fmt: skip


@pytest.mark.parametrize("text", [(0, 0), (5, 0), (0, 9), (5, 9)], ids=str)
@pytest.mark.parametrize("backend_id", LEAVES_OUT)
def test_what_is_computed_is_the_map_with_text_in_full(backend_id: str, text: tuple[int, int]) -> None:
    torch.manual_seed(sum(text))
    grid = TokenGrid(7, 11, 17, *text)
    query, key, value = (torch.randn(1, 2, grid.tokens, 8, dtype=torch.float64) for _ in range(3))
    options = LEAVES_OUT[backend_id]
    cells = slice(grid.before, grid.before + grid.cells)
    on_grid = AttentionCall(query[:, :, cells], key[:, :, cells], value[:, :, cells])
    found = selected(backend_id, on_grid, grid, options)
    assert found.pairs < 0.9
    sees = literal.with_text(found.mask(), *text)
    assert torch.equal(sees, with_other_tokens(found, grid, grid.after, 64).mask())
    with account() as run_report:
        output = attention(
            query, key, value, backend={"default": {"backend": backend_id, "extra": options}}, grid=grid.shape,
            tokens_before=grid.before, tokens_after=grid.after,
        )  # fmt: skip
    (row,) = run_report.as_dict()["rows"]
    assert (row["backend"], row["reason"], row["dense"]) == (backend_id, None, {})
    assert row["kept"] == pytest.approx(sees.double().mean().item(), abs=1e-4)
    expected = expected_output(backend_id, AttentionCall(query, key, value), sees, grid)
    exact = POOLED if backend_id == "sol_attn" else 1e-12
    assert (output - expected).norm() <= exact * expected.norm()


KEEPS_ALL: dict[str, list[dict[str, Any]]] = {
    "sliding_tile_attn": [{"window_size": [99, 99, 99]}],
    "subblock_attn": [{"sparsity": 0, "min_seq_len": 0}, {"topk": 1, "min_seq_len": 0}, {}],
    "radial_attn": [{"decay_factor": 1e6, "model_type": "hunyuan"}],
    "sparge_attn": [{"topk": 1}, {"sparsity_ratio": 0}],
    "nabla_attn": [{"P": 1}],
    "ssta_attn": [{"topk": 1}, {}],
    "cube_attn": [{"topk": 1}, {"topk_ratio_list": [0.1, 1.0]}],
    "custom_sparse_attn": [{"topk": 1}, {"cdf": 1}, {"topk_blocks": 10**6}, {"topk": 0, "sink_frames": 10**6}],
    "video_sparse_attn": [{"sparsity": 0}, {"VSA_sparsity": [0.9, 0]}, {}],
    "sparse_video_gen_2_attn": [{"svg2_top_p_kmeans": 1}, {"svg2_min_kc_ratio": 1}],
    "sparse_video_gen_attn": [{"kept": 1}],
    "vmoba_attn": [{"temporal_chunk_size": 1, "moba_threshold": 1}, {"temporal_chunk_size": 99}, {}],
    "sol_attn": [{"keep_percent": 100}, {"sink_tokens": 512}, {"min_tokens": 513}],
}


@pytest.mark.parametrize("backend_id", KEEPS_ALL)
def test_nothing_left_out_is_dense_to_the_bit(backend_id: str) -> None:
    shape = (2, 16, 16)
    query, key, value = (torch.randn(1, 2, 512, 8) for _ in range(3))
    for options in KEEPS_ALL[backend_id]:
        with account() as run_report:
            output = attention(
                query, key, value, backend={"default": {"backend": backend_id, "extra": options}}, grid=shape
            )
        (row,) = run_report.as_dict()["rows"]
        assert (row["backend"], list(row["dense"].values())) == (backend_id, [1]), options
        assert torch.equal(output, attention(query, key, value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_branch_of_a_trained_gate_is_the_published_one(dtype: Any) -> None:
    torch.manual_seed(0)
    shape, box = (3, 7, 9), (2, 4, 4)
    query, key, value, gate = (
        torch.randn(2, heads, 189, size).to(dtype) for heads, size in ((4, 8), (2, 8), (2, 6), (4, 6))
    )
    found = video_sparse.coarse_branch(query, key, value, gate, shape, cube=box)
    expected = literal.coarse_branch(query, key, value, gate, shape, box)
    assert found.dtype == dtype
    assert (found.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):  # as FastVideo's pipelines run
        assert torch.equal(video_sparse.coarse_branch(query, key, value, gate, shape, cube=box), found)
    one_gate = video_sparse.coarse_branch(query, key, value, gate[:, :, :1], shape, cube=box)
    assert torch.equal(one_gate[:, :, :1], found[:, :, :1])
    with pytest.raises(ValueError, match="189"):
        video_sparse.coarse_branch(query, key, value, gate, (3, 7, 8))


PRESETS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("nabla_attn", {"P": 0.3}, {"tile": [1, 8, 8], "window": [11, 3, 3], "pushed_in": False, "cdf": 0.3}),
    (
        "ssta_attn",
        {"ssta_topk": 2, "win_size": [1, 3, 1]},
        {"tile": [6, 8, 8], "window": [1, 3, 1], "topk_blocks": 2, "score": "importance"},
    ),
    ("cube_attn", {"topk": [1.0, 0.5]}, {"topk": [1.0, 0.5]}),
]


@pytest.mark.parametrize(("backend_id", "options", "own"), PRESETS, ids=lambda value: str(value)[:10])
def test_published_methods_are_presets_of_the_custom_one(
    backend_id: str, options: dict[str, Any], own: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(14, 16, 24)
    call = AttentionCall(*(torch.randn(1, 2, grid.cells, 8) for _ in range(3)))
    found, expected = (
        selected(name, call, grid, given) for name, given in (("custom_sparse_attn", own), (backend_id, options))
    )
    assert isinstance(found, BlockMap)
    assert isinstance(expected, BlockMap)
    assert found.queries is expected.queries
    assert torch.equal(found.seen, expected.seen)
    assert found.pairs < 0.9


def test_the_custom_one_follows_a_curve() -> None:
    grid = TokenGrid(2, 8, 8)
    call = AttentionCall(*(torch.randn(1, 1, grid.cells, 8) for _ in range(3)))
    options = {"order": "curve", "block_size": 16, "topk": 0, "neighbours": 1}
    found = selected("custom_sparse_attn", call, grid, options)
    assert isinstance(found, BlockMap)
    assert found.keys is along_curve(grid, 16)
    assert found.seen.sum(-1)[0, 0].tolist() == [2, 3, 3, 3, 3, 3, 3, 2]


@pytest.mark.parametrize("backend_id", ["subblock_attn", "sparge_attn", "cube_attn", "video_sparse_attn"])
def test_of_equal_scores_the_first_blocks_are_kept(backend_id: str) -> None:
    grid = TokenGrid(4, 16, 16)
    call = AttentionCall(*(torch.ones(1, 1, grid.cells, 8) for _ in range(3)))
    options = {**LEAVES_OUT[backend_id], **({"smooth_k": False} if backend_id == "sparge_attn" else {})}
    found = selected(backend_id, call, grid, options)
    assert isinstance(found, BlockMap)
    kept = found.seen[0, 0, 0].int()
    assert kept.sum() < len(kept)
    assert torch.equal(kept.sort(descending=True).values, kept)


def test_of_equal_gates_the_first_chunks_are_kept_with_the_own_one() -> None:
    grid = TokenGrid(4, 6, 6)
    call = AttentionCall(*(torch.ones(1, 1, grid.cells, 8) for _ in range(3)))
    found = selected("vmoba_attn", call, grid, {"moba_select_mode": "topk", "temporal_chunk_size": 1})
    assert found.seen[0, 0, ::36].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


def test_a_query_of_nan_gives_nan_and_no_zeros() -> None:
    """No comparison finds NaN: without its own chunk such a query would see nothing, and the guard a finite output."""
    grid = TokenGrid(4, 6, 6)
    query, key = torch.randn(2, 1, 1, grid.cells, 8)
    query[..., 5, :] = torch.nan
    for mode in vmoba.MODES:
        extra = {"moba_select_mode": mode, "temporal_topk": 2, "temporal_chunk_size": 1, "first_full_step": 0}
        chosen = {"default": {"backend": "vmoba_attn", "extra": extra}}
        output = attention(query, key, key, backend=chosen, grid=grid.shape)
        assert output.isnan().all(-1)[0, 0].nonzero().tolist() == [[5]], mode


def sorted_gates(gate: Any, own: Any, threshold: float | None, count: int) -> Any:
    """VMoBA's chunks by a stable sort of all gates: the `count` highest with the own one, or until the threshold."""
    low, high = gate.aminmax(dim=-1, keepdim=True)
    others = gate.scatter(-1, own, torch.inf) if threshold is None else gate.scatter(-1, own, low)
    values, order = torch.sort(others, dim=-1, descending=True, stable=True)
    if threshold is None:
        return torch.zeros_like(gate, dtype=torch.bool).scatter(-1, order[:, :count], True)
    spread = torch.where(high - low > vmoba.EPSILON, high - low, 1)
    total = (gate.sum(-1, keepdim=True) - gate.shape[-1] * low) / spread + vmoba.EPSILON
    missing = (threshold - (gate.gather(-1, own) - low) / spread / total).clamp(min=0)
    kept = torch.ones_like(gate, dtype=torch.bool)
    kept[:, 1:] = (((values - low) / spread).cumsum(-1) / total)[:, :-1] < missing
    return torch.zeros_like(kept).scatter(-1, order, kept).scatter(-1, own, True)


@pytest.mark.parametrize("with_numpy", [True, False])
def test_chunks_are_those_of_a_sort_also_among_equal_gates(with_numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_numpy:

        def missing(tensor: Any) -> Any:
            raise RuntimeError("Numpy is not available")

        monkeypatch.setattr(torch.Tensor, "numpy", missing)
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(200):
        rows, chunks = rng.choice((1, 60)), rng.choice((2, 3, 16, 33, 96))
        gate = torch.randn(rows, chunks) * rng.choice((1e-7, 0.3, 5)) + rng.choice((0, -3))
        gate = rng.choice((gate, gate.round()))
        own, count = torch.randint(0, chunks, (rows, 1)), rng.randint(1, chunks)
        threshold = rng.choice((0.0, 0.01, 0.25, 0.6, 0.999, 1.0))
        found = vmoba.enough(gate.clone(), own, threshold)
        assert torch.equal(found, sorted_gates(gate, own, threshold, count)), (rows, chunks, threshold)
        found = vmoba.highest_with_own(gate.clone(), own, count)
        assert torch.equal(found, sorted_gates(gate, own, None, count)), (rows, chunks, count)


def test_layers_take_turns_with_their_chunks_after_those_that_are_dense() -> None:
    grid = TokenGrid(4, 6, 6)
    call = AttentionCall(*(torch.randn(1, 1, grid.cells, 8) for _ in range(3)))
    options = {
        "moba_config": {"temporal_chunk_size": 1, "spatial_chunk_size": [2, 3], "spatial_layer": 2},
        "st_chunk_size": [2, 3, 3], "first_full_layer": 1,
    }  # fmt: skip
    found = [selected("vmoba_attn", call, grid, options, at(layer=layer)) for layer in range(6)]
    assert isinstance(found[0], Dense)
    assert [one.keys.count for one in found[1:]] == [4, 6, 6, 8, 4]


@pytest.mark.usefixtures("small_blocks")
def test_heads_that_look_at_a_place_have_the_temporal_mask_and_are_computed_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    grid = TokenGrid(9, 3, 7, before=4, after=3)
    cell = torch.arange(grid.cells)
    frame, place = (torch.nn.functional.one_hot(number).double() for number in (cell // 21, cell % 21))
    of_frame, of_place = (torch.cat(pair, -1) for pair in ((frame, 0 * place), (0 * frame, place)))
    query, key = torch.stack((of_place, of_frame, of_place, of_place)), (of_frame + of_place).expand(2, -1, -1)
    query, key = (torch.nn.functional.pad(30 * one, (0, 0, 4, 3))[None] for one in (query, key))
    value = torch.randn(1, 2, grid.tokens, 6, dtype=torch.float64)
    computed: list[Any] = []
    gather = gathering.gather

    def noted(call: AttentionCall, *more: Any, **named: Any) -> Any:
        computed.append(call)
        return gather(call, *more, **named)

    monkeypatch.setattr(gathering, "gather", noted)
    rows = first_tokens(grid.cells, 64).tolist()
    cells = [one[:, :, 4:-3] for one in (query, key, value)]
    sees = literal.sparse_video_gen(*cells, grid.shape, grid.tokens, 5, kept=0.4, rows=rows, model="hunyuan")
    assert [torch.equal(sees[0, head], sees[0, 0]) for head in range(4)] == [True, False, True, True]
    config = {"default": {"backend": "sparse_video_gen_attn", "extra": {"kept": 0.4}}}
    output = attention(
        query, key, value, backend=config, grid=grid.shape, tokens_before=4, tokens_after=3, enable_gqa=True
    )
    expected = literal.masked_attention(query, key, value, literal.with_text(sees, 4, 3))
    assert (output - expected).norm() <= 1e-12 * expected.norm()
    assert sorted(call.query.shape[1] for call in computed) == [1, 3]


@pytest.mark.parametrize(("kept", "text", "share"), [(0.25, 0, 0.25), (0.5, 0, 0.5), (0.5, 960, 0.3), (0.3, 960, 0.1)])
def test_the_band_keeps_its_share_of_all_pairs_with_those_of_the_text(kept: float, text: int, share: float) -> None:
    """The text's rows and columns are counted twice where they cross, as published."""
    grid = TokenGrid(30, 16, 18)
    width = sparse_video_gen.band_width(kept, grid.cells, grid.cells + text)
    pairs = 1 - (1 - width / (grid.cells + text)) ** 2
    assert pairs == pytest.approx(share)
    spatial, temporal = sparse_video_gen.both_maps(grid, 64, width * grid.cells / (grid.cells + text), False)
    assert spatial.pairs == pytest.approx(share, abs=0.015)
    assert spatial.seen is temporal.seen


def test_of_equal_scores_no_block_stands_out_but_its_neighbours() -> None:
    grid = TokenGrid(1, 16, 20)
    call = AttentionCall(*(torch.ones(1, 1, grid.cells, 8) for _ in range(3)))
    for options in ({"keep_percent": 60}, {"tau": 0.5}):
        near = selected("sol_attn", call, grid, options).seen[0, 0].int()
        assert near.tolist() == [[int(abs(row - other) <= 1) for other in range(5)] for row in range(5)]


def test_the_block_that_reaches_the_share_is_the_last_one() -> None:
    assert until_share(torch.zeros(1, 4), 0.5).tolist() == [[True, True, False, False]]


def test_the_block_that_passes_the_share_is_the_last_one() -> None:
    assert passed_share(torch.zeros(1, 4), 0.5).tolist() == [[True, True, True, False]]
    assert passed_share(torch.zeros(1, 4), 0.0).tolist() == [[True, False, False, False]]


# Steps and layers


@pytest.mark.parametrize(
    ("value", "steps", "expected"),
    [
        (0.5, 4, [0.5] * 4),
        ([1.0, 0.8, 0.5], 3, [1.0, 0.8, 0.5]),
        ([1.0, 0.5], 4, [1.0, 1.0, 0.5, 0.5]),
        ([1.0, 0.8, 0.6, 0.4], 2, [1.0, 0.6]),
        ({"from": 1.0, "to": 0.0}, 5, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"from": 0.2, "to": 0.8, "start": 0.5}, 5, [0.2, 0.2, 0.2, 0.5, 0.8]),
        ({"from": 0.2, "to": 0.8, "start": 0.25, "end": 0.75}, 5, [0.2, 0.2, 0.5, 0.8, 0.8]),
        ({"from": 0.2, "to": 0.8}, 1, [0.2]),
    ],
    ids=str,
)
def test_values_that_change_by_step(value: object, steps: int, expected: list[float]) -> None:
    assert [value_at(value, at(step, steps)) for step in range(steps)] == pytest.approx(expected)
    assert value_at(value, OUTSIDE) == pytest.approx(
        value["to"] if isinstance(value, dict) else value[-1] if isinstance(value, list) else value
    )


def test_a_changing_share_reaches_the_map() -> None:
    grid = TokenGrid(4, 16, 16)
    call = AttentionCall(*(torch.randn(1, 1, grid.cells, 8) for _ in range(3)))
    kept = []
    for step in range(4):
        found = selected("cube_attn", call, grid, {"topk_ratio_list": [0.75, 0.5, 0.25, 0.25]}, at(step, 4))
        assert isinstance(found, BlockMap)
        kept.append(found.pairs)
    assert kept == [0.75, 0.5, 0.25, 0.25]


DENSE_STEPS = {
    "sliding_tile_attn": ("skip_time_steps", 15),
    "subblock_attn": ("skip_first_steps", 10),
    "radial_attn": ("dense_timesteps", 0),
    "sparse_video_gen_2_attn": ("svg2_first_times_fp", 10),
    "sparse_video_gen_attn": ("first_times_fp", 10),
    "vmoba_attn": ("first_full_step", 12),
    "sol_attn": ("dense_steps", 10),
    **dict.fromkeys(
        ("sparge_attn", "nabla_attn", "ssta_attn", "cube_attn", "custom_sparse_attn", "video_sparse_attn"),
        ("dense_steps", 0),
    ),
}
"""Backend -> its option, and how many of 50 steps are computed whole without it."""


@pytest.mark.parametrize("backend_id", DENSE_STEPS)
def test_steps_and_layers_that_are_computed_whole(backend_id: str) -> None:
    grid = TokenGrid(7, 11, 17)
    call = AttentionCall(*(torch.randn(1, 1, grid.cells, 8) for _ in range(3)))
    name, published = DENSE_STEPS[backend_id]

    def whole(steps: int, layer: int | None = None, **more: Any) -> int:
        """How many of the first steps are computed whole; then no step is."""
        options = {**LEAVES_OUT[backend_id], **more}
        found = [
            isinstance(selected(backend_id, call, grid, options, at(n, steps, layer)), Dense) for n in range(steps)
        ]
        assert found == sorted(found, reverse=True)
        return sum(found)

    assert whole(50) == published
    assert whole(20) == -(-published * 20 // 50)
    assert whole(20, **{name: 3}) == 3
    assert whole(20, **{name: 0}) == 0
    assert whole(6, dense_steps=6) == 6
    assert [whole(20, dense_steps=count) for count in (0, 2)] == [0, 2], "the published number is a default"
    two: Any = "0-1" if backend_id == "sol_attn" else 2
    assert whole(4, layer=1, **{name: 0}, dense_layers=two) == 4
    assert whole(4, layer=2, **{name: 0}, dense_layers=two) == 0
    assert whole(4, layer=None, **{name: 0}, dense_layers=two) == 0
    assert not isinstance(selected(backend_id, call, grid, LEAVES_OUT[backend_id]), Dense), "outside a sampler"


# Options


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("sliding_tile_attn", {"window_size": [3, 3]}, "window_size"),
    ("sliding_tile_attn", {"window_size": [3, 0, 3]}, "window_size"),
    ("sliding_tile_attn", {"window_size": [3, 3, 3], "mask_strategy_file_path": "a"}, "give one"),
    ("sliding_tile_attn", {"sta_mode": "x"}, "STA_inference"),
    ("sliding_tile_attn", {"skip_time_steps": -1}, "< 0"),
    ("subblock_attn", {"sparsity": 1.5}, "> 1"),
    ("subblock_attn", {"sparsity": [0.5, 1.5]}, "> 1"),
    ("subblock_attn", {"sparsity": []}, "no value"),
    ("subblock_attn", {"sparsity": {"from": 0.5}}, "'to' not given"),
    ("subblock_attn", {"sparsity": {"from": 0.5, "to": 2}}, "> 1"),
    ("subblock_attn", {"sparsity": {"from": 0.5, "to": 1, "start": 0.5, "end": 0.5}}, ">= end"),
    ("subblock_attn", {"sparsity": {"from": 0.5, "to": 1, "begin": 0.5}}, "begin"),
    ("subblock_attn", {"sparsity": 0.5, "topk": 0.5}, "give one"),
    ("subblock_attn", {"n_q": 3}, "1, 2, 4, 8"),
    ("radial_attn", {"block_size": 32}, "64, 128"),
    ("radial_attn", {"decay_factor": -1}, "< 0"),
    ("sparge_attn", {"topk": 0}, "< 1e-06"),
    ("sparge_attn", {"block_size": 128}, "must be 64, not 128"),
    ("sparge_attn", {"topk": 0.5, "cdfthreshd": 0.9}, "give one"),
    ("nabla_attn", {"P": 1.1}, "> 1"),
    ("nabla_attn", {"wT": 0}, "< 1"),
    ("nabla_attn", {"wW": 10**6}, "> 999999"),
    ("cube_attn", {"local_cube_size": [4, 4, 10**6]}, "1 to 999999"),
    ("ssta_attn", {"win_size": [[3, 3]]}, "win_size"),
    ("ssta_attn", {"ssta_topk": 4, "topk": 0.5}, "give one"),
    ("cube_attn", {"local_cube_size": [4, 4]}, "local_cube_size"),
    ("cube_attn", {"topk_ratio_list": [0.5, 0]}, "< 1e-06"),
    ("custom_sparse_attn", {"window": [3, 3]}, "window"),
    ("custom_sparse_attn", {"tile": [0, 4, 4]}, "tile"),
    ("custom_sparse_attn", {"order": "curve", "window": [3, 3, 3]}, "window: only with order tiles"),
    ("custom_sparse_attn", {"block_size": 64}, "block_size"),
    ("custom_sparse_attn", {"topk": 0.5, "cdf": 0.9}, "give one"),
    ("custom_sparse_attn", {"cdf": 0.9, "score": "importance"}, "score mean"),
    ("vmoba_attn", {"spatial_chunk_size": [3]}, "spatial_chunk_size"),
    ("vmoba_attn", {"moba_config": {"st_chunk_size": [3, 0, 3]}}, "st_chunk_size"),
    ("vmoba_attn", {"st_topk": 2, "moba_config": {"st_topk": 3}}, "give one"),
    ("vmoba_attn", {"moba_select_mode": "best"}, "threshold, topk"),
    ("vmoba_attn", {"temporal_layer": 0, "spatial_layer": 0, "st_layer": 0}, "all 0"),
    ("vmoba_attn", {"executor": "gather"}, "auto, merge"),
    ("sparse_video_gen_2_attn", {"executor": "flex"}, "auto, gather"),
    ("sol_attn", {"dense_layers": "0-x"}, "0-3,38"),
    ("sol_attn", {"tau": 1.5, "keep_percent": 10}, "give one"),
    ("sol_attn", {"keep_percent": 101}, "> 100"),
    ("sparse_video_gen_2_attn", {"svg2_top_p_kmeans": 1.1}, "> 1"),
    ("sparse_video_gen_attn", {"kept": 1.1}, "> 1"),
    ("sparse_video_gen_attn", {"model_type": "mochi"}, "auto, wan, hunyuan"),
]


@pytest.mark.parametrize(("backend_id", "options", "words"), REFUSED, ids=str)
def test_wrong_options_are_refused_with_what_is_allowed(backend_id: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AttentionSpec(backend_id, options)
    assert words in str(caught.value)


@pytest.mark.parametrize("backend_id", LEAVES_OUT)
def test_the_largest_and_smallest_allowed_values_run(backend_id: str) -> None:
    grid = TokenGrid(5, 12, 12)
    call = AttentionCall(*(torch.randn(1, 1, grid.cells, 8) for _ in range(3)))
    for option in BACKENDS[backend_id].options:
        if option.kind not in (int, float) or option.choices:
            continue
        largest = 2**100 if option.kind is int else 1e308
        least, most = option.minimum, largest if option.maximum is None else option.maximum
        assert least is not None
        for value in (option.kind(least), option.kind(most)):
            names = {"win_size", "window_size", "min_seq_len", "block_size"}
            extra = {name: kept for name, kept in LEAVES_OUT[backend_id].items() if name in names}
            found = selected(backend_id, call, grid, {**extra, option.name: value}, at(0, 2, 0))
            assert isinstance(found, Dense) or found.mask().any(-1).all(), option.name


NOT_BUILT: list[tuple[str, dict[str, Any]]] = [
    ("sliding_tile_attn", {"sta_mode": "STA_searching"}),
    ("sliding_tile_attn", {"STA_mode": "STA_tuning"}),
    ("sliding_tile_attn", {"mask_strategy_file_path": "/no/such/file.json"}),
    ("radial_attn", {"use_sage_attention": True}),
    ("sol_attn", {"thresh_type": "exact"}),
]


@pytest.mark.parametrize(("backend_id", "options"), NOT_BUILT, ids=str)
def test_what_is_not_built_falls_back_with_its_reason(backend_id: str, options: dict[str, Any]) -> None:
    (reason,) = BACKENDS[backend_id].option_reasons(CPU, options)
    query = torch.randn(1, 1, 60, 8)
    with account() as run_report:
        attention(query, query, query, backend={"default": {"backend": backend_id, "extra": options}}, grid=(3, 4, 5))
    (row,) = run_report.as_dict()["rows"]
    assert row["backend"] != backend_id
    assert str(reason) in str(row["reason"])


PASTED: dict[str, tuple[str, dict[str, Any]]] = {
    "--attention-backend sparge_attn --attention-backend-config topk=0.3": ("sparge_attn", {"topk": 0.3}),
    "infer.attn_type=sparge infer.attn_config.sparsity_ratio=0.5 infer.attn_config.block_size=64": (
        "sparge_attn",
        {"sparsity_ratio": 0.5, "block_size": 64},
    ),
    "--attention-backend sliding_tile_attn --attention-backend-config skip_time_steps=4,sta_mode=STA_inference": (
        "sliding_tile_attn",
        {"skip_time_steps": 4, "sta_mode": "STA_inference"},
    ),
    '--attention-backend subblock_sparse_attn --attention-backend-config \'{"sparsity": 0.85, "min_seq_len": 0}\'': (
        "subblock_attn",
        {"sparsity": 0.85, "min_seq_len": 0},
    ),
    "--component-attention-backends transformer=cube_sparse_attn --attention-backend-config "
    '\'{"local_cube_size": [4, 4, 4], "topk_ratio_list": [1.0, 1.0, 0.8, 0.7, 0.6, 0.5, 0.5]}\'': (
        "cube_attn",
        {"local_cube_size": [4, 4, 4], "topk_ratio_list": [1.0, 1.0, 0.8, 0.7, 0.6, 0.5, 0.5]},
    ),
}


@pytest.mark.parametrize("text", PASTED)
def test_what_other_systems_document_pastes_and_runs(text: str) -> None:
    config = parse_config(text)
    specs = [config.default, *config.per_role.values()]
    (spec,) = [spec for spec in specs if spec is not None and spec.backend == PASTED[text][0]]
    assert dict(spec.extra) == PASTED[text][1]
    query = torch.randn(1, 1, 4 * 33 * 40, 8)
    with account() as run_report:
        attention(query, query, query, backend=config, grid=(4, 33, 40))
    (row,) = run_report.as_dict()["rows"]
    assert (row["backend"], row["reason"]) == (spec.backend, None)
    assert row["kept"] < 0.9


# Mask strategy files


def strategy(steps: int, layers: int, heads: int) -> dict[str, list[int]]:
    return {
        f"{step}_{layer}_{head}": [1 + step, 1 + layer, 1 + head]
        for step in range(steps) for layer in range(layers) for head in range(heads)
    }  # fmt: skip


def test_each_head_has_the_window_of_its_step_and_layer(tmp_path: Path) -> None:
    path = tmp_path / "strategy.json"
    path.write_text(json.dumps(strategy(2, 3, 2)))
    grid = TokenGrid(13, 9, 17)
    call = AttentionCall(*(torch.zeros(1, 2, grid.cells, 8) for _ in range(3)))
    options = {"mask_strategy_file_path": str(path), "skip_time_steps": 0}
    for step, steps, expected in ((1, 2, 1), (3, 8, 0), (4, 8, 1), (0, 1, 0), (None, None, 1)):
        found = selected("sliding_tile_attn", call, grid, options, at(step, steps, layer=1))
        assert isinstance(found, BlockMap)
        windows = [(1 + expected, 2, 1 + head) for head in range(2)]
        assert torch.equal(found.mask(), literal.sliding_tile(grid.shape, (6, 8, 8), windows)), (step, steps)
    for where in (at(1, 2, layer=None), at(1, 2, layer=3)):
        assert isinstance(selected("sliding_tile_attn", call, grid, options, where), Dense)
    of_three = AttentionCall(*(torch.zeros(1, 3, grid.cells, 8) for _ in range(3)))
    assert isinstance(selected("sliding_tile_attn", of_three, grid, options, at(1, 2, layer=1)), Dense)


def test_a_loaded_kernel_reads_a_changed_strategy_file_again(tmp_path: Path) -> None:
    path, grid = tmp_path / "strategy.json", TokenGrid(13, 9, 17)
    call = AttentionCall(*(torch.zeros(1, 2, grid.cells, 8) for _ in range(3)))
    method: Any = BACKENDS["sliding_tile_attn"]
    path.write_text(json.dumps(strategy(1, 1, 2)))
    kernel = method.load(CPU, mask_strategy_file_path=str(path), skip_time_steps=0)

    def found() -> Any:
        return method.select_at(call, grid, at(0, 1, layer=0), kernel.options)

    assert torch.equal(found().mask(), literal.sliding_tile(grid.shape, (6, 8, 8), [(1, 1, 1), (1, 1, 2)]))
    path.write_text(json.dumps({"0_0_0": [3, 1, 1], "0_0_1": [1, 3, 1]}))
    assert torch.equal(found().mask(), literal.sliding_tile(grid.shape, (6, 8, 8), [(3, 1, 1), (1, 3, 1)]))
    path.write_text("{}")
    assert isinstance(found(), Dense)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a mapping"),
        ("{}", "not a mapping"),
        ('{"0_0": [1, 1, 1]}', "step_layer_head"),
        ('{"0_0_0": [1, 1]}', "0_0_0"),
        ('{"0_0_0": [1, 1, true]}', "0_0_0"),
        ('{"0_0_0": [1, 1, 1], "1_1_0": [1, 1, 1]}', "2 steps x 2 layers x 1 heads"),
        ('{"0_0_1": [1, 1, 1]}', "2 heads"),
    ],
)
def test_a_wrong_strategy_file_says_what_is_wrong(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        parse_strategy(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_strategy(str(tmp_path / "a.json"))


def test_a_strategy_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder, not a file"):
        read_strategy(str(tmp_path))
    if hasattr(os, "mkfifo"):  # reading it would wait for its other end
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="pipe, not a file"):
            read_strategy(str(tmp_path / "pipe"))
    with pytest.raises(ValueError, match="null"):
        read_strategy("a\0b")


def test_a_strategy_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(strategy(1, 1, 2)))
    first = read_strategy(str(path))
    assert read_strategy(str(path)) is first
    path.write_text(json.dumps(strategy(1, 2, 2)))
    assert read_strategy(str(path)).layers == 2


def test_static_maps_are_made_once_and_read_nothing_from_a_device() -> None:
    grid = TokenGrid(13, 17, 20)
    meta = AttentionCall(*(torch.empty(1, 2, grid.cells, 8, device="meta") for _ in range(3)))
    for backend_id, options in (("sliding_tile_attn", {"window_size": [1, 1, 1]}), ("radial_attn", {"block_size": 64})):
        one, two = (selected(backend_id, meta, grid, options) for _ in range(2))
        assert isinstance(one, BlockMap)
        assert isinstance(two, BlockMap)
        assert one.seen is two.seen
        assert one.counts is not None


def test_maps_of_many_heads_are_not_kept() -> None:
    """A mask strategy file has other windows in each step and layer: those maps together would take gigabytes."""
    several = (1, 1, 3), (3, 1, 1), (3, 3, 3)
    found, count = window_map((3, 4, 5), several, pushed_in=True)
    assert (found.shape, count) == ((1, 3, 60, 60), None)
    gone = weakref.ref(found)
    del found
    assert gone() is None
    assert window_map((3, 4, 5), ((1, 1, 3), (3, 1, 1)), pushed_in=True)[1] == 3


READ = ("sparse_video_gen_2_attn", "sparse_video_gen_attn", "vmoba_attn")
"""Methods for which the host reads from the device in a call."""


@pytest.mark.parametrize("backend_id", [name for name in LEAVES_OUT if name not in READ])
def test_choosing_reads_nothing_from_a_device_and_mixes_none(backend_id: str) -> None:
    grid = TokenGrid(7, 11, 17)
    meta = AttentionCall(*(torch.empty(1, heads, grid.cells, 8, device="meta") for heads in (4, 2, 2)), enable_gqa=True)
    found = selected(backend_id, meta, grid, LEAVES_OUT[backend_id])
    assert isinstance(found, BlockMap)
    static = backend_id in ("sliding_tile_attn", "radial_attn")
    assert found.seen.device.type == ("cpu" if static else "meta")


def test_each_method_is_compared() -> None:
    modules = (cube, custom, nabla, radial, sliding_tile, sol, sparge, sparse_video_gen, sparse_video_gen_2, ssta,
               subblock, video_sparse, vmoba)  # fmt: skip
    methods = {module.BACKENDS[0].id for module in modules}
    assert methods == set(CASES) == set(LEAVES_OUT) == set(KEEPS_ALL) == set(DENSE_STEPS)


class Peak(TorchDispatchMode):
    """The most bytes of new tensors at a time."""

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in given}
        self.now = self.most = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and (of := tensor.untyped_storage())._cdata not in self.sizes:
                self.sizes[of._cdata] = of.nbytes()
                self.now += of.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(of, self._freed, of._cdata)
        return made

    def _freed(self, of: int) -> None:
        self.now -= self.sizes.pop(of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend_id", LEAVES_OUT)
def test_choosing_keeps_to_its_stated_workspace(backend_id: str, dtype: Any) -> None:
    grid = TokenGrid(4, 24, 20)
    call = AttentionCall(*(torch.randn(1, 2, grid.cells, 64).to(dtype) for _ in range(3)))
    method = BACKENDS[backend_id]
    assert isinstance(method, SparseMethod)
    extra = LEAVES_OUT[backend_id]
    if backend_id == "video_sparse_attn":
        extra = {"fastvideo_vsa_topk": 2}  # the default's cubes are larger
    if backend_id == "vmoba_attn":
        extra = {"temporal_layer": 0, "st_layer": 0}  # the layers with most chunks
    assert not isinstance(selected(backend_id, call, grid, extra), Dense), "and what is kept for a grid is made"
    with Peak(call.query, call.key, call.value) as peak:
        selected(backend_id, call, grid, extra)
    assert 0.1 * peak.most <= 0.1 * method.choosing_bytes(call.request(grid=grid), grid) <= peak.most
