"""Executors of installed packages: each computes the map of each method, on machines with fakes of the packages."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import literal_sparse as literal  # noqa: E402
from attention_backends.backends.doctor import probe, sparse_executors  # noqa: E402
from attention_backends.backends.doctor.install import running_interpreter  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.sparse import blocks as orders  # noqa: E402
from attention_backends.backends.sparse.block_map import BlockMap, Dense, with_other_tokens  # noqa: E402
from attention_backends.backends.sparse.executors import OF_PACKAGES  # noqa: E402
from attention_backends.backends.sparse.executors import fa4 as by_flash  # noqa: E402
from attention_backends.backends.sparse.executors import fastvideo as by_fastvideo  # noqa: E402
from attention_backends.backends.sparse.executors import flashinfer as by_flashinfer  # noqa: E402
from attention_backends.backends.sparse.kernel import NoExecutorError, SparseKernel  # noqa: E402
from attention_backends.backends.sparse.method import SparseMethod, Where  # noqa: E402
from attention_backends.backends.values.grid import Kept, Place, Progress, TokenGrid  # noqa: E402
from attention_backends.backends.values.platform import Platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall  # noqa: E402
from fakes import arithmetic, flash_attn_4, machine  # noqa: E402
from sparse_cases import ORDERS, TOLERANCE, random_grid, random_map  # noqa: E402

EXECUTORS = {executor.id: executor for executor in OF_PACKAGES}
PACKAGES = {
    "flashinfer": ("flashinfer-python==0.7.4", (9, 0)),
    "fastvideo": ("fastvideo-kernel==0.3.5 triton==3.6.0", (9, 0)),
    "spas_sage": ("spas-sage-attn==0.1.0 triton==3.6.0", (8, 9)),
    "fa4": ("flash-attn-4==4.0.0b36", (10, 0)),
}
HALVES = (torch.float16, torch.bfloat16)
DTYPES = {"flashinfer": HALVES, "fastvideo": (torch.bfloat16,), "spas_sage": HALVES, "fa4": HALVES}
WHOLE = ("spas_sage", "fa4")
"""They hide no keys within a block, so blocks of keys consist of whole ones."""
OUTSIDE = Where(None, None, None, None, "self", ())
METHODS = {
    "sliding_tile_attn": {"window_size": [1, 1, 1]},
    "video_sparse_attn": {"sparsity": 0.5},
    "sparge_attn": {"topk": 0.4},
    "radial_attn": {"decay_factor": 0.2, "block_size": 64, "model_type": "wan"},
    "subblock_attn": {"sparsity": 0.6, "min_seq_len": 0},
    "nabla_attn": {"P": 0.3, "wT": 1, "wH": 1, "wW": 1},
    "ssta_attn": {"ssta_topk": 1, "win_size": [[1, 1, 1]]},
    "cube_attn": {"topk": 0.3},
    "custom_sparse_attn": {},
}
"""Options with which a method leaves something out of a small grid."""


def installed(executor_id: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The platform of a machine with a fake of the executor's package."""
    return machine(monkeypatch, *PACKAGES[executor_id]).platform


def near(output: Any, expected: Any, dtype: Any, executor_id: str = "") -> bool:
    """Kernels round weights to the dtype before they multiply with the values; one computes in 8 bits."""
    most = 0.05 if executor_id == "spas_sage" else 3 * TOLERANCE[dtype]
    return bool(output.dtype == dtype and (output.double() - expected).norm() <= most * expected.norm())


def random_call(rng: random.Random, grid: TokenGrid, dtype: Any, shares: int = 1, batch: int = 0) -> AttentionCall:
    batch, heads = batch or rng.randint(1, 2), 2
    query, key, value = (
        torch.randn(batch, grid.tokens, count, 64).to(dtype).transpose(1, 2)
        for count in (heads, heads // shares, heads // shares)
    )
    return AttentionCall(query, key, value, enable_gqa=shares > 1, scale=rng.choice((None, 0.2)))


def suited(executor_id: str, call: AttentionCall) -> AttentionCall:
    """The call with a scale that the package takes."""
    return call.changed(scale=None) if executor_id == "fastvideo" else call


@pytest.mark.parametrize("executor_id", [name for name in EXECUTORS if name not in WHOLE])
def test_each_executor_computes_any_map(executor_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_fastvideo, "MOST_FILLED", 64)
    platform = installed(executor_id, monkeypatch)
    run, rng = EXECUTORS[executor_id].load(platform), random.Random(executor_id)
    torch.manual_seed(0)
    for order in ORDERS:
        for shares in (1, 2):
            grid = random_grid(rng)
            call = suited(executor_id, random_call(rng, grid, rng.choice(DTYPES[executor_id]), shares))
            block_map, dtype = random_map(rng, grid, order, call), call.query.dtype
            assert not EXECUTORS[executor_id].call_reasons(call, block_map)
            expected = literal.masked_attention(call.query, call.key, call.value, block_map.mask(), call.scale)
            assert near(run(call, block_map), expected, dtype, executor_id), (order, shares, grid)


@pytest.mark.parametrize("executor_id", EXECUTORS)
def test_each_executor_computes_the_maps_of_each_method(executor_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = installed(executor_id, monkeypatch)
    torch.manual_seed(0)
    able = {
        name for name in BACKENDS if isinstance(method := BACKENDS[name], SparseMethod) and method.only_executor is None
    }
    assert able == set(METHODS)
    if executor_id == "fa4":
        monkeypatch.setattr(by_flash, "is_hopper", lambda device: True)  # where key blocks may have 64 tokens
        monkeypatch.setattr(flash_attn_4, "CAPABILITY", (9, 0))
    whole = executor_id in WHOLE
    grid, rng = TokenGrid(4, 8, 16, 0, 9) if whole else TokenGrid(3, 11, 13, 0, 9), random.Random(1)
    left_out: list[str] = []
    for name, options in METHODS.items():
        method = BACKENDS[name]
        assert isinstance(method, SparseMethod)
        call = suited(executor_id, random_call(rng, grid, torch.bfloat16, batch=1))
        cells = call.changed(**{side: getattr(call, side)[:, :, : grid.cells] for side in ("query", "key", "value")})
        kernel = method.load(platform, **options, executor=executor_id)
        assert isinstance(kernel, SparseKernel)
        found = method.select_at(cells, grid, OUTSIDE, kernel.options)
        if isinstance(found, Dense):
            continue
        seen = with_other_tokens(found, grid, grid.after, method.other_block)
        assert isinstance(seen, BlockMap)
        if EXECUTORS[executor_id].call_reasons(call, seen):
            continue
        kept = Kept()
        output = kernel.bound(call.request(grid=grid), Place(), Progress(), kept, pytest.fail)(call)
        expected = literal.masked_attention(call.query, call.key, call.value, seen.mask(), call.scale)
        assert near(output, expected, torch.bfloat16, executor_id), name
        assert kept.executors == {executor_id: 1}
        left_out.append(name) if not seen.seen.all() else None
    assert set(METHODS) - {*left_out} <= {"radial_attn", "subblock_attn", "sliding_tile_attn"}, "all is kept there"


def block_map(tokens: int = 128, size: int = 32, heads: int = 2) -> BlockMap:
    blocks = orders.in_order(tokens, size)
    seen = torch.rand(1, heads, blocks.count, blocks.count) < 0.5
    seen[..., 0] = True
    return BlockMap(blocks, blocks, seen)


def halves(tokens: int = 128, heads: int = 2, size: int = 64) -> AttentionCall:
    return AttentionCall(*(torch.randn(1, heads, tokens, size).bfloat16() for _ in range(3)))


def test_flashinfer_plans_a_map_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = EXECUTORS["flashinfer"].load(installed("flashinfer", monkeypatch))
    call = halves()
    for size, wrapper in ((32, "BlockSparse"), (48, "VariableBlockSparse"), (2, "VariableBlockSparse")):
        one, two = block_map(size=size), block_map(size=size)
        arithmetic.CALLS.clear()
        for used in (one, one, two, one, two):
            expected = literal.masked_attention(call.query, call.key, call.value, used.mask())
            assert near(run(call, used), expected, torch.bfloat16)
        assert arithmetic.CALLS.count(f"{wrapper}AttentionWrapper.plan") == 2
        del one, used
        arithmetic.CALLS.clear()
        run(call, block_map(size=size))
        assert arithmetic.CALLS[0].endswith(".plan"), "the wrapper of a map that is gone is planned again"
    run(halves(size=128), block_map(size=32))
    assert arithmetic.CALLS[-3].endswith("Wrapper"), "another kernel has another wrapper"


def test_flashinfer_plans_many_heads_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    run = EXECUTORS["flashinfer"].load(installed("flashinfer", monkeypatch))
    monkeypatch.setattr(by_flashinfer, "MOST_ROWS", 12)
    for size, listed in ((32, 2**26), (48, 3 * 128)):
        monkeypatch.setattr(by_flashinfer, "MOST_LISTED", listed)
        call, found = halves(heads=4), block_map(size=size, heads=4)
        key, value = (tensor[:, :2].contiguous() for tensor in (call.key, call.value))
        for each in (call, call.changed(key=key, value=value, enable_gqa=True)):
            expected = literal.masked_attention(each.query, each.key, each.value, found.mask())
            assert near(run(each, found), expected, torch.bfloat16)
            assert len(by_flashinfer.parts(each, found)) == (2 if size == 32 else 4)


WANTED = {
    **{"size": 64, "dtype": torch.bfloat16, "trained": False, "scale": None},
    **{"grid": TokenGrid(1, 16, 16), "options": {}},
}
TILES = {"tile": [1, 8, 16]}
REFUSED = (
    ("flashinfer", {"size": 72}, {}, "head_dim"),
    ("flashinfer", {"dtype": torch.float32}, {}, "float32"),
    ("flashinfer", {"trained": True}, {}, "gradients"),
    ("flashinfer", {}, {"MOST_ROWS": 3}, "query blocks"),
    ("fastvideo", {"size": 80}, {}, "head_dim"),
    ("fastvideo", {"dtype": torch.float16}, {}, "float16"),
    ("fastvideo", {"scale": 0.5}, {}, "scale"),
    ("fastvideo", {"trained": True}, {}, "gradients"),
    ("fastvideo", {"grid": TokenGrid(1, 8, 8), "options": {"tile": [1, 2, 4]}}, {}, "filled up"),
    ("spas_sage", {"size": 80}, {}, "head_dim"),
    ("spas_sage", {"dtype": torch.float32}, {}, "float32"),
    ("spas_sage", {"grid": TokenGrid(1, 15, 15)}, {}, "block of keys"),
    ("fa4", {"size": 136}, {}, "head_dim"),
    ("fa4", {"size": 60}, {}, "head_dim"),
    ("fa4", {"dtype": torch.float32}, {}, "float32"),
    ("fa4", {"trained": True, "options": TILES}, {}, "gradients"),
    ("fa4", {}, {}, "128 tokens"),
    ("fa4", {"options": {"tile": [1, 1, 48]}}, {}, "128 tokens"),
)


@pytest.mark.parametrize(("executor_id", "changed", "limits", "words"), REFUSED, ids=str)
def test_what_a_package_does_not_compute_is_refused(
    executor_id: str, changed: dict[str, Any], limits: dict[str, int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = installed(executor_id, monkeypatch)
    for name, value in limits.items():
        monkeypatch.setattr(by_flashinfer, name, value)
    method = BACKENDS["custom_sparse_attn"]
    assert isinstance(method, SparseMethod)
    wanted = SimpleNamespace(
        size=64, dtype=torch.bfloat16, trained=False, scale=None, grid=TokenGrid(1, 16, 16), options={}
    )
    vars(wanted).update(changed)
    kernel = method.load(platform, **wanted.options, executor=executor_id)
    assert isinstance(kernel, SparseKernel)
    tensors = [
        torch.randn(1, 2, wanted.grid.cells, wanted.size, dtype=wanted.dtype, requires_grad=wanted.trained)
        for _ in range(3)
    ]
    call = AttentionCall(*tensors, scale=wanted.scale)
    with pytest.raises(NoExecutorError, match=words):
        kernel.bound(call.request(grid=wanted.grid), Place(), Progress(), Kept(), pytest.fail)(call)


def test_fastvideo_is_not_given_what_the_kernel_of_hopper_or_another_card_would_misread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = EXECUTORS["fastvideo"]
    rows, columns = orders.in_order(128, 64), orders.in_order(192, 64)
    longer = BlockMap(rows, columns, torch.ones(1, 1, 2, 3, dtype=torch.bool))
    (reason,) = executor.call_reasons(halves(), longer)
    assert "192" in reason
    generations = {0: (9, 0), torch.device("cuda:1"): (8, 9), torch.device("cuda:2"): (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", generations.__getitem__)
    assert [by_fastvideo.first_card_differs(torch.device(f"cuda:{index}")) for index in range(3)] == [
        False,
        True,
        False,
    ]


def test_spas_sage_takes_keys_in_any_order_with_a_last_block_of_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, platform = EXECUTORS["spas_sage"], installed("spas_sage", monkeypatch)
    run = executor.load(platform)
    torch.manual_seed(0)
    for grid, order in ((TokenGrid(1, 16, 13), orders.along_curve), (TokenGrid(1, 9, 9), orders.raster)):
        blocks = order(grid, 64)
        seen = torch.rand(1, 2, blocks.count, blocks.count) < 0.5
        seen[..., -1] = True
        found = BlockMap(blocks, blocks, seen)
        for shares in (1, 2):
            call = random_call(random.Random(0), grid, torch.float16, shares)
            expected = literal.masked_attention(call.query, call.key, call.value, found.mask(), call.scale)
            assert not executor.call_reasons(call, found)
            assert near(run(call, found), expected, torch.float16, "spas_sage")
    assert executor.call_reasons(call, BlockMap(orders.in_order(81, 8), blocks, seen)), "filled up to 16 times as many"
    assert executor.unavailable_reasons(Platform("cuda", capability=(9, 0), packages=platform.packages))


@pytest.mark.parametrize(("capability", "size"), [((9, 0), 64), ((9, 0), 128), ((10, 0), 128), ((10, 3), 256)])
def test_fa4_takes_keys_in_any_order_with_a_last_block_of_fewer(
    capability: tuple[int, int], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, platform = (
        EXECUTORS["fa4"],
        machine(monkeypatch, PACKAGES["fa4"][0], capability).platform,
    )
    monkeypatch.setattr(by_flash, "is_hopper", lambda device: capability[0] == 9)
    run = executor.load(platform)
    torch.manual_seed(0)
    for grid, order in ((TokenGrid(2, 16, 13), orders.along_curve), (TokenGrid(1, 19, 19), orders.raster)):
        keys, queries = order(grid, size), order(grid, 100)
        for heads, shares in ((2, 1), (2, 2), (1, 1)):
            seen = torch.rand(1, heads, queries.count, keys.count) < 0.5
            seen[..., 0, -1] = seen[..., 1, 0] = True
            seen[..., 0] |= ~seen.any(-1)
            found, call = BlockMap(queries, keys, seen), random_call(random.Random(0), grid, torch.float16, shares)
            expected = literal.masked_attention(call.query, call.key, call.value, found.mask(), call.scale)
            assert not executor.call_reasons(call, found)
            assert near(run(call, found), expected, torch.float16)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)])
def test_fa4_is_not_taken_where_it_reads_no_lists(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On sm8x its kernel drops the lists without an error, and the call would be computed whole."""
    platform = machine(monkeypatch, PACKAGES["fa4"][0], capability).platform
    executor, call = EXECUTORS["fa4"], halves(tokens=256)
    assert executor.unavailable_reasons(platform)
    found = block_map(tokens=256, size=128)
    found.seen[..., 1] = False
    run = executor.load(platform)
    if capability[0] == 12:
        with pytest.raises(AssertionError, match="not supported"):
            run(call, found)
    else:
        whole = literal.masked_attention(call.query, call.key, call.value, torch.ones(256, 256, dtype=torch.bool))
        assert near(run(call, found), whole, torch.bfloat16)


def test_fa4_is_not_taken_beside_a_card_of_another_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    generations = {0: (9, 0), 1: (10, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", generations.__getitem__)
    for count, differ in ((1, False), (2, True)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        by_flash.cards_differ.cache_clear()
        assert by_flash.cards_differ() == differ
    by_flash.cards_differ.cache_clear()


@pytest.mark.parametrize("executor_id", EXECUTORS)
def test_a_probe_compares_each_executor_with_gather(executor_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    platform, executor = installed(executor_id, monkeypatch), EXECUTORS[executor_id]
    assert sparse_executors.to_probe(platform) == [f"executor:{executor_id}"]

    def judged() -> Any:
        return sparse_executors.judge(executor, platform, torch.device("cpu"))

    assert judged().status == "ok"
    exact = arithmetic.exact
    monkeypatch.setattr(arithmetic, "exact", lambda *args: exact(*args) * 1.5)
    assert judged().reason.startswith("wrong")
    monkeypatch.setattr(arithmetic, "exact", lambda *args: exact(*args) * float("nan"))
    assert judged().reason.startswith("wrong")
    monkeypatch.delattr(arithmetic, "exact")
    assert judged().reason.startswith("raised AttributeError")
    assert sparse_executors.judge(executor, Platform("cpu"), torch.device("cpu")).status == "unavailable"


@pytest.mark.parametrize("executor_id", EXECUTORS)
def test_the_doctor_has_a_row_for_each_executor(executor_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    platform, declared = installed(executor_id, monkeypatch), EXECUTORS[executor_id].declared

    def row() -> Any:
        rows = sparse_executors.examine(platform, running_interpreter(), {})
        assert [one.id for one in rows if one.available] in ([executor_id], [])
        return next(one for one in rows if one.id == executor_id)

    assert (row().available, row().symbols.missing) == (True, ())
    need = declared.symbols[0]
    monkeypatch.delattr(sys.modules[need.module], need.names[0])
    assert (row().available, row().symbols.missing) == (False, (f"{need.module}.{need.names[0]}",))


@pytest.mark.slow
def test_a_probe_of_an_executor_has_a_process_for_itself() -> None:
    assert probe.probe("executor:flashinfer").status in ("unavailable", "ok")
