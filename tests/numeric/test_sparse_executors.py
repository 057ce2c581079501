"""Executors: which one runs where, and that FlexAttention's lists of blocks are the map."""

from __future__ import annotations

import json
import random
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import literal_sparse as literal  # noqa: E402
from attention_backends.backends import account, attention  # noqa: E402
from attention_backends.backends.kernels.flex_attn import cpp_compiler  # noqa: E402
from attention_backends.backends.report import kept as kept_lines  # noqa: E402
from attention_backends.backends.sparse import blocks as orders  # noqa: E402
from attention_backends.backends.sparse import executors as package  # noqa: E402
from attention_backends.backends.sparse.block_map import BlockMap, on_device, with_other_tokens  # noqa: E402
from attention_backends.backends.sparse.executor import EXECUTOR, Executor, executors, select  # noqa: E402
from attention_backends.backends.sparse.executors import flex as flexing  # noqa: E402
from attention_backends.backends.sparse.executors import gather as gathering  # noqa: E402
from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from attention_backends.backends.values.grid import Kept, TokenGrid  # noqa: E402
from attention_backends.backends.values.platform import Platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall  # noqa: E402
from attention_backends.cli import main  # noqa: E402
from sparse_cases import (  # noqa: E402
    ORDERS,
    TOLERANCE,
    literal_flex,  # noqa: F401
    literally,
    random_call,
    random_grid,
    random_map,
)

CPU = Platform("cpu", torch="2.13.0", os="linux")


@pytest.fixture
def flex(literal_flex: Any) -> Any:  # noqa: F811
    """The executor with a literal kernel and small blocks."""
    return flexing.Flex().load(CPU)


@pytest.mark.parametrize("order", ORDERS)
def test_flex_is_given_exactly_the_map(order: str, flex: Any) -> None:
    rng = random.Random(order)
    torch.manual_seed(rng.randrange(2**31))
    for _ in range(4):
        grid = random_grid(rng)
        call = random_call(rng, grid, torch.float32)
        block_map = random_map(rng, grid, order, call)
        expected = literal.masked_attention(call.query, call.key, call.value, block_map.mask(), call.scale)
        output = flex(call, block_map)
        assert output.shape == expected.shape
        assert (output.double() - expected).norm() <= 2e-6 * expected.norm(), (grid, call.query.shape)


@pytest.mark.parametrize(("tokens", "masked"), [(64, False), (60, True)])
def test_flex_masks_only_where_something_is_filled_in(
    tokens: int, masked: bool, flex: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(flexing.Variants, "of", lambda self, arguments: given.append(arguments) or literally)
    call = AttentionCall(*(torch.randn(1, 2, tokens, 8) for _ in range(3)))
    blocks = orders.in_order(tokens, 16)
    flex(call, BlockMap(blocks, blocks, torch.ones(1, 1, 4, 4, dtype=torch.bool)))
    ((query, _, _, _, lists, _),) = given
    assert bool(lists.kv_num_blocks.any()) == masked
    assert (query is call.query) != masked, "in order and whole: no copy"


def test_a_place_without_a_token_has_one_of_its_own_block() -> None:
    """So that a NaN reaches the queries that see its block, and no others."""
    blocks = orders.tiles(TokenGrid(1, 9, 13), (1, 8, 8))
    side = flexing.fill(blocks, torch.device("cpu"))
    assert (side.size, side.length) == (64, 256)
    assert side.tokens is not None
    for places, tokens in zip(side.tokens.split(64), blocks.index.split(list(blocks.sizes)), strict=True):
        assert set(places.tolist()) == set(tokens.tolist())


def test_flex_leaves_what_it_cannot_do_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, blocks of few tokens, and a kernel that fails."""
    ran: list[str] = []

    class Failing(flexing.Flex):
        def avoid_reasons(self, request: Any, platform: Any) -> list[str]:
            return []

        def load(self, platform: Platform) -> Any:
            def run(call: Any, block_map: Any) -> Any:
                ran.append("flex")
                raise RuntimeError("the compiler gave up")

            return run

    gather = gathering.Gather()
    monkeypatch.setattr(package, "EXECUTORS", (Failing(), gather))
    select.cache_clear()
    try:
        for cube, trained, tried in (([1, 2, 2], False, 0), ([2, 8, 8], True, 0), ([2, 8, 8], False, 1)):
            ran.clear()
            query = torch.randn(1, 1, 512, 16, requires_grad=trained)
            chosen = {"default": {"backend": "cube_attn", "extra": {"local_cube_size": cube, "topk": 0.5}}}
            with account() as run_report:
                for role in ("self", "self", "joint"):
                    attention(query, query, query, role=role, backend=chosen, grid=(2, 16, 16))
            for row in run_report.as_dict()["rows"]:
                assert (row["backend"], row["reason"], row["kept"]) == ("cube_attn", None, 0.5)
            assert len(ran) == tried, "once, not at each call and in each plan"
    finally:
        select.cache_clear()


def test_blocks_that_fill_in_much_are_left_to_gather_unless_flex_is_named(literal_flex: Any) -> None:  # noqa: F811
    del literal_flex
    blocks = orders.in_order(60, 3)
    (reason,) = flexing.Flex().avoid_map_reasons(BlockMap(blocks, blocks, torch.ones(1, 1, 20, 20, dtype=torch.bool)))
    assert reason.split()[-1] == "160"
    query = torch.randn(1, 1, 60, 16)
    extra = {"local_cube_size": [1, 1, 3], "topk": 0.5, "executor": "flex"}
    with account() as run_report:
        attention(query, query, query, backend={"default": {"backend": "cube_attn", "extra": extra}}, grid=(1, 20, 3))
    (row,) = run_report.as_dict()["rows"]
    assert row["backend"] != "cube_attn" or (row["kept"], row["dense"]) == (0.5, {})


def test_a_named_executor_is_the_only_one() -> None:
    query = torch.randn(1, 1, 512, 16, dtype=torch.float64)
    extra = {"local_cube_size": [2, 8, 8], "topk": 0.5}
    for named, kept in (("gather", 0.5), ("flex", None)):
        chosen = {"default": {"backend": "cube_attn", "extra": {**extra, "executor": named}}}
        with account() as run_report:
            output = attention(query, query, query, backend=chosen, grid=(2, 16, 16))
        (row,) = run_report.as_dict()["rows"]
        assert ((row["backend"] == "cube_attn"), row.get("kept")) == (named == "gather", kept), "it has no float64"
        if named == "flex":
            assert str(row["reason"]).startswith("cube_attn: executor flex: ")
            with pytest.raises(NoBackendError, match="executor flex"):
                attention(query, query, query, backend={**chosen, "strict": True}, grid=(2, 16, 16))
            torch.testing.assert_close(output, attention(query, query, query))


def test_a_named_executor_that_cannot_compute_one_call_is_a_fallback_and_stops_strict(literal_flex: Any) -> None:  # noqa: F811
    del literal_flex
    query = torch.randn(1, 1, 512, 16, requires_grad=True)
    extra = {"local_cube_size": [2, 8, 8], "topk": 0.5, "executor": "flex"}
    chosen = {"default": {"backend": "cube_attn", "extra": extra}}
    with account() as run_report:
        attention(query, query, query, backend=chosen, grid=(2, 16, 16))
    (row,) = (row for row in run_report.as_dict()["rows"] if row["calls"])
    assert row["backend"] != "cube_attn"
    assert "executor flex" in str(row["reason"])
    with pytest.raises(NoBackendError, match="executor flex"):
        attention(query, query, query, backend={**chosen, "strict": True}, grid=(2, 16, 16))


def test_calls_that_wait_for_their_device_are_counted() -> None:
    """The map tells whether its counts are known; here on a device that has no values to read."""
    even, uneven = orders.in_order(60, 20), orders.in_order(60, 25)
    for device, blocks, counts, waits in (
        ("meta", even, None, True),
        ("meta", uneven, (2, 2, 2), True),
        ("meta", even, (2, 2, 2), False),
        ("cpu", uneven, None, False),
    ):
        found = BlockMap(blocks, blocks, torch.empty(1, 1, 3, 3, dtype=torch.bool, device=device), counts)
        assert gathering.Gather().reads_back(found) == waits, (device, counts)
    rows = [{"role": "self", "backend": "x", "calls": 3, "dense": {}, "measured_gain": None}]
    one, two = Kept(), Kept()
    one.add(0.5, "gather", True)
    two.add(0.5, "gather", False)
    two.add_up(one)
    (found_,) = kept_lines.of_rows([{**rows[0], **two.as_dict()}])
    assert found_["read_back"] == 1
    assert "1 call waited" in kept_lines.lines([{**rows[0], **two.as_dict()}])[0]
    assert "waited" not in kept_lines.lines([{**rows[0], **Kept(1, total=0.5).as_dict()}])[0]


def test_what_is_kept_for_a_grid_is_copied_to_a_device_once() -> None:
    blocks = orders.in_order(60, 25)
    seen = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    meta = torch.device("meta")
    assert on_device(seen, meta) is on_device(seen, meta)
    assert on_device(seen, seen.device) is seen
    assert gathering._side(blocks, meta) is gathering._side(blocks, meta)
    on_grid, grid = BlockMap(blocks, blocks, seen), TokenGrid(1, 6, 10, 5)
    first, again = (with_other_tokens(on_grid, grid, 0, 64) for _ in range(2))
    assert first.seen is again.seen
    gone = weakref.ref(first.seen)
    del first, again, on_grid, seen
    assert gone() is None


MACHINES = (
    *("cpu,os=linux", "cpu,os=win32", "cpu,os=darwin"),
    "cuda:7.5,packages=triton==3.6.0",
    "cuda:8.0,packages=flashinfer-python==0.7.4;fastvideo-kernel==0.3.5;spas-sage-attn==0.1.0",
    *("cuda:8.6,os=win32", "cuda:8.9,packages=triton==3.6.0", "cuda:9.0,packages=triton==3.6.0"),
    "cuda:10.0,packages=flash-attn-4==4.0.0b36",
    *("cuda:12.0,os=win32,packages=triton-windows==3.6.0", "rocm", "xpu", "mps", "npu"),
)


def test_explain_says_which_executor_runs_on_which_machine(capsys: pytest.CaptureFixture[str], snapshot: Any) -> None:
    call = ("--request", "num_heads=2,q_len=4096,head_dim=128,dtype=fp16,grid=4x32x32", "--config", "subblock_attn")
    found = {}
    for machine in MACHINES:
        assert main(["explain", "--json", "--platform", machine, *call]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["backend"] == "subblock_attn"
        reasons = [f"not {name}: {'; '.join(why)}" for name, why in answer["executors"]["reasons"].items()]
        found[machine] = [*answer["executors"]["able"], *reasons]
    assert found == snapshot
    assert main(["explain", "--platform", "cuda:9.0", *call]) == 0
    assert "by: gather." in capsys.readouterr().out
    named = json.dumps({"default": {"backend": "subblock_attn", "extra": {"executor": "flex"}}})
    request = ("--request", call[1].replace("fp16", "fp64"), "--config", named)
    assert main(["explain", "--json", "--platform", "cuda:9.0,packages=triton==3.6.0", *request]) == 0
    (refused, *_) = json.loads(capsys.readouterr().out)["rejected"]
    assert refused["reasons"][0].startswith("executor flex: ")


def test_each_executor_says_what_it_takes() -> None:
    call = AttentionCall(*(torch.empty(2, 4, 4096, 64, dtype=torch.float16, device="meta") for _ in range(3)))
    request = call.request(grid=TokenGrid(4, 32, 32))
    assert set(EXECUTOR.choices) == {"auto", *(executor.id for executor in executors())}
    for executor in executors():
        assert isinstance(executor, Executor)
        assert executor.workspace_bytes(request, CPU) > 0


@pytest.mark.slow
@pytest.mark.skipif(cpp_compiler("linux")[1] is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flex_compiled_computes_exactly_its_map(dtype: Any) -> None:
    rng = random.Random(str(dtype))
    torch.manual_seed(0)
    run = flexing.Flex().load(CPU)
    for grid, heads, order in (
        (TokenGrid(2, 16, 16), 2, "raster"),  # whole blocks, no mask
        (TokenGrid(3, 11, 13, 5, 9), 1, "tiles"),
    ):
        size = 64 if order == "raster" else 0
        blocks = orders.raster(grid, size) if size else orders.tiles(grid, (3, 5, 5))
        seen = torch.rand(1, 2, blocks.count, blocks.count) < 0.4
        seen[..., 0] = True
        block_map = with_other_tokens(BlockMap(blocks, blocks, seen), grid, grid.after, 64)
        tensors = (torch.randn(1, count, grid.tokens, 16).to(dtype) for count in (2, heads, heads))
        call = AttentionCall(*tensors, enable_gqa=heads == 1, scale=rng.choice((None, 0.3)))
        expected = literal.masked_attention(call.query, call.key, call.value, block_map.mask(), call.scale)
        output = run(call, block_map)
        assert (output.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm(), order
