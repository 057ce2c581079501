"""Block maps are the published ones, and what computes them is exact: against literal forms in float64."""

from __future__ import annotations

import contextlib
import random
import threading
from contextvars import copy_context
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import literal_sparse as literal  # noqa: E402
from attention_backends.backends import CheckError, account, attention  # noqa: E402
from attention_backends.backends.config.text import parse_config  # noqa: E402
from attention_backends.backends.config.timetable import Timetable  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.report.audit import asked_and_ran, fell_back  # noqa: E402
from attention_backends.backends.sparse import blocks as orders  # noqa: E402
from attention_backends.backends.sparse import kernel as sparse_kernel  # noqa: E402
from attention_backends.backends.sparse.block_map import BlockMap, with_other_tokens  # noqa: E402
from attention_backends.backends.sparse.executors import gather as gathering  # noqa: E402
from attention_backends.backends.sparse.executors.gather import gather  # noqa: E402
from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from attention_backends.backends.values.grid import OFF_GRID, TokenGrid, parse_grid  # noqa: E402
from attention_backends.backends.values.reasons import TEMPLATES  # noqa: E402
from attention_backends.backends.values.request import AttentionCall, AttentionRequest  # noqa: E402
from sparse_cases import ORDERS, TOLERANCE, random_call, random_grid, random_map  # noqa: E402


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_permutations_in_whole_blocks(order: str) -> None:
    rng = random.Random(order)
    for _ in range(40):
        grid = random_grid(rng)
        blocks = ORDERS[order](grid, rng.choice((6, 12)))
        assert blocks.tokens == grid.cells
        assert min(blocks.sizes) > 0
        if blocks.index is not None:
            assert torch.equal(blocks.index.sort().values, torch.arange(grid.cells))


def test_tiles_hold_neighbours_only() -> None:
    grid = TokenGrid(3, 5, 7)
    expected = literal.boxes(grid.shape, (2, 2, 4))
    blocks = orders.tiles(grid, (2, 2, 4))
    assert [part.tolist() for part in torch.split(blocks.index, list(blocks.sizes))] == expected


def test_neighbours_on_the_curve_are_neighbours_on_the_grid() -> None:
    grid = TokenGrid(4, 8, 8)
    index = orders.along_curve(grid, 16).index
    places = torch.stack((index // 64, index // 8 % 8, index % 8), 1)
    assert ((places[1:] - places[:-1]).abs().sum(1) == 1).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("path", ["by head", "all heads"])
def test_gather_computes_exactly_its_map(dtype: Any, order: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "all heads":  # what other devices run
        monkeypatch.setattr(gathering, "_by_head", lambda *args: gathering._all_heads(*args[:-1]))
    rng = random.Random(f"{dtype}{order}{path}")
    torch.manual_seed(rng.randrange(2**31))
    for _ in range(6):
        grid = random_grid(rng)
        call = random_call(rng, grid, dtype)
        block_map = random_map(rng, grid, order, call)
        expected = literal.masked_attention(call.query, call.key, call.value, block_map.mask(), call.scale)
        output = gather(call, block_map)
        assert output.dtype == dtype
        assert (output.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm(), (grid, call.query.shape)


def test_gather_never_passes_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spied(*args: Any, **kwargs: Any) -> Any:
        given.append((len(args), kwargs.get("attn_mask"), kwargs.get("is_causal", False)))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
    rng = random.Random(0)
    for order in ORDERS:
        grid = random_grid(rng)
        call = random_call(rng, grid, torch.float32)
        gather(call, random_map(rng, grid, order, call))
    assert given
    assert set(given) == {(3, None, False)}


def test_gather_keeps_to_its_stated_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = TokenGrid(4, 16, 16)
    monkeypatch.setattr(gathering, "BUDGET_ON_CPU", 200_000)
    sizes: list[int] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spied(query: Any, key: Any, value: Any, **kwargs: Any) -> Any:
        sizes.append(key.nbytes + value.nbytes + 8 * key.shape[1] * key.shape[2])
        return sdpa(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
    call = AttentionCall(*(torch.randn(1, 2, grid.cells, 32) for _ in range(3)))
    blocks = orders.raster(grid, 64)
    for share in (0.1, 0.9):
        seen = torch.rand(1, 2, blocks.count, blocks.count) < share
        seen[..., 0] = True
        gather(call, BlockMap(blocks, blocks, seen))
    assert max(sizes) <= max(200_000, gathering.workspace_bytes(call.request(), 4, on_cpu=True))
    assert len(sizes) > 8


def test_a_map_with_everything_kept_is_dense() -> None:
    grid = TokenGrid(2, 5, 6, 3, 4)
    call = AttentionCall(*(torch.randn(2, 2, grid.tokens, 16) for _ in range(3)))
    blocks = orders.tiles(grid, (2, 2, 2))
    block_map = with_other_tokens(BlockMap(blocks, blocks, torch.ones(1, 1, *[blocks.count] * 2).bool()), grid, 4, 8)
    assert block_map.pairs == 1
    expected = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)
    torch.testing.assert_close(gather(call, block_map), expected)


HIDDEN: dict[str, list[tuple[list[int], bool]]] = {
    "the end of the prompt": [([3, 4], True)],
    "its beginning": [([0, 1], True)],
    "its middle": [([1, 2], True)],
    "two places": [([1, 3], False)],
    "all of it and the last token": [([0, 1, 2, 3, 4, 283], True)],
    "other keys in each sample": [([3, 4], True), ([0], True)],
    "a key of the grid": [([4, 5], False)],
    "one sample sees all": [([], True), ([2, 3, 4, 280, 281, 282, 283], True)],
}
"""Which of 5 + 270 + 9 keys each sample hides, and whether the rest is one run before the grid and the grid."""


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=str)
@pytest.mark.parametrize("name", HIDDEN)
def test_padded_prompts_before_the_grid_leave_the_call_sparse(name: str, dtype: Any) -> None:
    torch.manual_seed(0)
    samples = HIDDEN[name]
    query, key, value = (torch.randn(len(samples), 2, 284, 8, dtype=torch.float64) for _ in range(3))
    shown = torch.ones(len(samples), 1, 1, 284, dtype=torch.bool)
    for sample, (hidden, _) in enumerate(samples):
        shown[sample, ..., hidden] = False
    mask = shown if dtype is torch.bool else torch.zeros(shown.shape, dtype=dtype).masked_fill(~shown, -torch.inf)
    with account() as run_report:
        output = attention(
            query, key, value, mask, backend=SPARSE_HALF, grid=(5, 6, 9), tokens_before=5, tokens_after=9
        )
    count = literal.video_sparse_count(0.5, 2 * 2 * 3)
    cells = slice(5, 275)
    on_grid = literal.video_sparse(query[:, :, cells], key[:, :, cells], (5, 6, 9), (4, 4, 4), count)
    sees = literal.with_text(on_grid, 5, 9) & shown
    if not all(sparse for _, sparse in samples):
        assert all(row.backend != "video_sparse_attn" for row in run_report.rows.values())
        assert not any(TEMPLATES["grid.unknown"] in str(row.reason) for row in run_report.rows.values())
        sees = shown
    else:
        assert {row.backend for row in run_report.rows.values()} == {"video_sparse_attn"}
    expected = literal.masked_attention(query, key, value, sees)
    assert (output - expected).norm() <= 1e-6 * expected.norm()


SPARSE_HALF = {"default": {"backend": "video_sparse_attn", "extra": {"sparsity": 0.5}}}


@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize("text", [(0, 0), (5, 0), (0, 9), (5, 9)], ids=str)
def test_video_sparse_is_the_published_map(text: tuple[int, int], hidden: int) -> None:
    if hidden and not text[1]:
        pytest.skip("no text after the grid whose keys could be hidden")
    torch.manual_seed(sum(text))
    before, after = text
    shape = (5, 6, 9)
    cells = slice(before, before + 270)
    query, key, value = (torch.randn(2, 2, before + 270 + after, 8, dtype=torch.float64) for _ in range(3))
    mask = None
    if hidden:
        mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool)
        mask[..., -hidden:] = False
    count = literal.video_sparse_count(0.5, 2 * 2 * 3)
    sees = literal.with_text(
        literal.video_sparse(query[:, :, cells], key[:, :, cells], shape, (4, 4, 4), count), before, after
    )
    if mask is not None:
        sees = sees & mask
    with account() as run_report:
        output = attention(
            query, key, value, mask, backend=SPARSE_HALF, grid=shape, tokens_before=before, tokens_after=after
        )
    (row,) = run_report.as_dict()["rows"]
    assert (row["backend"], row["reason"]) == ("video_sparse_attn", None)
    expected = literal.masked_attention(query, key, value, sees)
    assert (output - expected).norm() <= 1e-6 * expected.norm()  # scores are chosen in float32
    live = sees if mask is None else sees[..., : key.shape[2] - hidden]
    assert row["kept"] == pytest.approx(live.double().mean().item(), abs=1e-4)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "grid.unknown"),
        ({"grid": (5, 6, 8)}, "grid.proof"),
        ({"grid": (5, 6, 9), "tokens_after": 1}, "grid.proof"),
        ({"grid": (5, 6, 9), "is_causal": True}, "causal"),
    ],
    ids=str,
)
def test_what_the_method_cannot_know_is_computed_whole(given: dict[str, Any], reason: str) -> None:
    query = torch.randn(1, 2, 270, 8)
    with account() as run_report:
        output = attention(query, query, query, backend=SPARSE_HALF, **given)
    (row,) = run_report.rows.values()
    assert row.backend != "video_sparse_attn"
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, query, query, is_causal=given.get("is_causal", False)
    )
    torch.testing.assert_close(output, expected)


CROSS = {"per_role": {"cross": SPARSE_HALF["default"]}}
WINDOW = {"schedule": [{**SPARSE_HALF["default"], "blocks": "0-9"}]}


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        (SPARSE_HALF, {"role": "cross"}, True),
        (SPARSE_HALF, {"role": "ltx2.audio_to_video"}, True),
        (SPARSE_HALF, {}, False),
        (SPARSE_HALF, {"grid": (5, 6, 8)}, False),
        (SPARSE_HALF, {"role": "cross", "grid": (5, 6, 9), "is_causal": True}, False),
        (CROSS, {"role": "cross"}, False),
    ],
    ids=str,
)
def test_a_role_that_the_method_is_not_for_is_no_failure_unless_it_was_named(
    config: dict[str, Any], given: dict[str, Any], expected: bool
) -> None:
    query = torch.randn(1, 2, 270, 8)
    with account() as run_report:
        attention(query, query, query, backend=config, **given)
    (row,) = run_report.as_dict()["rows"]
    assert row["reason"]
    assert row.get("expected", False) == expected
    assert fell_back(row) != expected
    (finding,) = asked_and_ran(run_report)
    assert finding.verdict == ("not for this role" if expected else "explained")
    assert ("fallback" in run_report.summary()) != expected
    strict = {**config, "strict": True}
    with contextlib.nullcontext() if expected else pytest.raises(NoBackendError):
        attention(query, query, query, backend=strict, **given)


def test_a_window_of_a_schedule_names_no_role_unless_it_says_one() -> None:
    for role, named in ((None, False), ("cross", True)):
        entry = {**WINDOW["schedule"][0], **({} if role is None else {"role": role})}
        layers = (parse_config({"schedule": [entry]}),)
        timetable = Timetable(layers, blocks=("blocks.0",))
        choice, _ = timetable.resolve(timetable.at(None), "cross", "cross", "blocks.0")
        assert (choice.asked, choice.for_all_roles) == ("video_sparse_attn", not named)


def test_a_role_without_any_grid_is_told_from_an_unknown_one() -> None:
    request = AttentionRequest(1, 2, 60, 60, 8, "float32")
    method = BACKENDS["video_sparse_attn"]
    for grid, is_not_for_it in ((OFF_GRID, True), (None, False), (TokenGrid(3, 4, 5, queries_only=True), False)):
        reasons = method.unsupported_reasons(request._replace(grid=grid), detect())
        assert method.is_not_for("self", reasons) == is_not_for_it
        assert method.is_not_for("cross", reasons)
    assert parse_grid(OFF_GRID.describe()) == OFF_GRID


def test_a_grid_may_be_of_the_numbers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    query = torch.randn(1, 2, 275, 8)
    output = attention(query, query, query, backend=SPARSE_HALF, grid=(5, 6, 9), tokens_after=5)
    sizes = numpy.array([5, 6, 9, 5])
    again = attention(query, query, query, backend=SPARSE_HALF, grid=tuple(sizes[:3]), tokens_after=sizes[3])
    assert torch.equal(again, output)
    for wrong in ((5.0, 6, 9), (True, 6, 9), (5, 6), (5, 6, 9, 1), (5, 6, 0), numpy.array([5, 6, 9]) / 2):
        with pytest.raises(CheckError, match="three whole numbers"):
            attention(query, query, query, backend=SPARSE_HALF, grid=wrong)


def test_nothing_left_out_is_dense_to_the_bit() -> None:
    query = torch.randn(1, 2, 270, 8)
    everything = {"default": {"backend": "video_sparse_attn", "extra": {"sparsity": 0.0}}}
    with account() as run_report:
        output = attention(query, query, query, backend=everything, grid=(5, 6, 9))
    assert torch.equal(output, attention(query, query, query))
    (row,) = run_report.as_dict()["rows"]
    assert list(row["dense"].values()) == [1]


def test_grids_read_back() -> None:
    for grid in (
        TokenGrid(21, 30, 52),
        TokenGrid(1, 4, 4, 512),
        TokenGrid(2, 3, 4, 1, 2, True),
        TokenGrid(1, 4, 4, 0, 77),
        TokenGrid(2, 3, 4, 5, 6),
        TokenGrid(2, 3, 4, 5, 6, hidden_before=5),
    ):
        assert parse_grid(grid.describe()) == grid
    for text in ("", "4", "4x4", "0x4x4", "4x4x4+", "1+2+3x3x3", "ax4x4", "-1+2x2x2", "4-5+2x2x2", "4--1+2x2x2"):
        with pytest.raises(ValueError, match="FRAMESxHEIGHTxWIDTH"):
            parse_grid(text)


Q = torch.randn(1, 2, 270, 8)
EIGHTH = {"default": {"backend": "video_sparse_attn", "extra": {"sparsity": 0.8}}}


def ran_sparsely(*tensors: Any, mask: Any = None) -> Any:
    with account() as run_report:
        output = attention(*tensors, mask, backend=EIGHTH, grid=(5, 6, 9))
    assert [(row.backend, row.reason) for row in run_report.rows.values()] == [("video_sparse_attn", None)]
    return output


def test_buffers_made_under_inference_mode_are_left_alone_outside_it() -> None:
    with torch.inference_mode():
        expected = ran_sparsely(Q, Q, Q)
    assert torch.equal(ran_sparsely(Q, Q, Q), expected)
    with torch.no_grad():
        assert torch.equal(ran_sparsely(Q, Q, Q), expected)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_gradients_are_those_of_the_masked_call(trained: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 270, 8, dtype=torch.float64).requires_grad_(at in trained) for at in range(3)]
    count = literal.video_sparse_count(0.8, 2 * 2 * 3)
    sees = literal.video_sparse(tensors[0].detach(), tensors[1].detach(), (5, 6, 9), (4, 4, 4), count)
    given = [tensors[at] for at in trained]
    expected = torch.autograd.grad(literal.masked_attention(*tensors, sees).square().sum(), given)
    found = torch.autograd.grad(ran_sparsely(*tensors).square().sum(), given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_call_within_a_call_has_its_own_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ran_sparsely(Q, Q, Q)
    sdpa, inner = torch.nn.functional.scaled_dot_product_attention, []

    def calls_again(*args: Any, **kwargs: Any) -> Any:
        if not inner:
            inner.append(None)
            inner[0] = attention(Q * 3, Q * 2, Q + 1, backend=EIGHTH, grid=(5, 6, 9))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", calls_again)
    assert torch.equal(ran_sparsely(Q, Q, Q), expected)
    assert inner[0] is not None


def test_autocast_changes_nothing() -> None:
    expected = ran_sparsely(Q, Q, Q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ran_sparsely(Q, Q, Q), expected)


def test_while_a_cuda_graph_is_recorded_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_kernel, "is_recorded", lambda call: True)
    with account() as run_report:
        output = attention(Q, Q, Q, backend=EIGHTH, grid=(5, 6, 9))
    assert torch.equal(output, attention(Q, Q, Q))
    (row,) = run_report.as_dict()["rows"]
    assert (row["kept"], sum(row["dense"].values())) == (None, 1)


def test_a_batch_of_no_samples_is_no_failure() -> None:
    empty = Q[:0]
    assert ran_sparsely(empty, empty, empty).shape == empty.shape


def test_a_sample_without_a_visible_key_leaves_the_others_sparse() -> None:
    batch = torch.randn(2, 2, 270, 8)
    mask = torch.ones(2, 1, 1, 270, dtype=torch.bool)
    mask[1] = False
    output = ran_sparsely(batch, batch, batch, mask=mask)
    assert torch.equal(output[:1], ran_sparsely(*[batch[:1]] * 3))
    assert not output[1].any()


def test_the_kept_fraction_is_that_of_all_calls_and_keeps_no_map() -> None:
    with account() as run_report:
        for sparsity in (0.25, 0.5, 0.75) * 4:
            backend = {"default": {"backend": "video_sparse_attn", "extra": {"sparsity": sparsity}}}
            attention(*[torch.ones(1, 1, 256, 8)] * 3, backend=backend, grid=(4, 8, 8))
    (row,) = run_report.rows.values()
    assert row.kept is not None
    assert row.kept.calls == 12
    assert row.kept.fraction == pytest.approx(0.5)
    assert isinstance(row.kept.total, float)


def test_what_other_threads_and_inner_blocks_kept_counts_too() -> None:
    def some(sparsity: float) -> None:
        backend = {"default": {"backend": "video_sparse_attn", "extra": {"sparsity": sparsity, "executor": "gather"}}}
        attention(*[torch.ones(1, 1, 256, 8)] * 3, backend=backend, grid=(4, 8, 8))

    with account() as run_report:
        some(0.25)
        with account():
            some(0.5)
            some(0)
        thread = threading.Thread(target=copy_context().run, args=(some, 0.75))
        thread.start()
        thread.join()
    (row,) = run_report.as_dict()["rows"]
    assert (row["calls"], row["kept"], row["executors"]) == (4, 0.5, {"gather": 3})
    assert list(row["dense"].values()) == [1]


@pytest.mark.parametrize(
    "grid", [5, "5x6x9", (True, 30, 9), (5, 6), (5, 6, 9, 1), (5.0, 6, 9), (0, 6, 9), (-5, -6, 9)], ids=str
)
def test_a_grid_that_is_none_is_refused_in_words(grid: Any) -> None:
    with pytest.raises(CheckError, match="three whole"):
        attention(Q, Q, Q, backend=EIGHTH, grid=grid)


@pytest.mark.parametrize("given", [{"tokens_before": 3}, {"tokens_after": 3}], ids=str)
def test_other_tokens_without_a_grid_are_refused_in_words(given: dict[str, int]) -> None:
    with pytest.raises(CheckError, match="give grid"):
        attention(Q, Q, Q, **given)


def test_a_default_device_does_not_stay_in_an_order() -> None:
    with torch.device("meta"):
        for grid in (TokenGrid(3, 5, 7), TokenGrid(2, 9, 5)):
            for order in ("tiles", "pixels", "curve"):
                index = ORDERS[order](grid, 12).index
                assert index is not None
                assert index.device.type == "cpu"
