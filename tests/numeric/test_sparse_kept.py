"""What Sparse VideoGen 2 keeps between steps for each sample of each block, and what Sol-Attn computes whole."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import literal_sparse as literal  # noqa: E402
from attention_backends.backends import account, attention  # noqa: E402
from attention_backends.backends.config.names import RefusedBackendError  # noqa: E402
from attention_backends.backends.config.text import parse_config  # noqa: E402
from attention_backends.backends.engine import session as sessions  # noqa: E402
from attention_backends.backends.engine.plan import CallKind  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.sparse.block_map import Dense, HeadMaps  # noqa: E402
from attention_backends.backends.sparse.kmeans import cluster, first_tokens  # noqa: E402
from attention_backends.backends.sparse.layers import layer_of  # noqa: E402
from attention_backends.backends.sparse.method import SparseMethod, Where  # noqa: E402
from attention_backends.backends.sparse.methods.sol import parse_layers  # noqa: E402
from attention_backends.backends.values.grid import Kept, Place, Progress, TokenGrid  # noqa: E402
from attention_backends.backends.values.platform import Platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall  # noqa: E402

CPU = Platform("cpu", torch="2.13.0", os="linux")
GRID = TokenGrid(3, 5, 6)
OPTIONS = {
    "svg2_num_q_centroids": 4, "svg2_num_k_centroids": 8, "svg2_top_p_kmeans": 0.4, "svg2_first_layers_fp": 0,
    "svg2_first_times_fp": 0, "svg2_kmeans_iter_init": 4, "svg2_kmeans_iter_step": 1,
}  # fmt: skip
METHOD: Any = BACKENDS["sparse_video_gen_2_attn"]


def tensors(seed: int, batch: int = 1) -> AttentionCall:
    torch.manual_seed(seed)
    return AttentionCall(*(torch.randn(batch, 2, GRID.cells, 8) for _ in range(3)))


def select(call: AttentionCall, kept: dict[Any, Any], samples: tuple[str, ...], **more: Any) -> Any:
    assert isinstance(METHOD, SparseMethod)
    place = {"step": 3, "steps": 10, "block": "blocks.1", "blocks": ("blocks.0", "blocks.1"), "layer": 1}
    options = {**OPTIONS, **{name: more.pop(name) for name in list(more) if name.startswith("svg2")}}
    where = Where(**{**place, "sigma": None, "role": "self", "samples": samples, "kept": kept, **more})
    return METHOD.select_at(call, GRID, where, METHOD.values(options))


def test_a_later_step_goes_on_from_the_centroids_of_the_one_before() -> None:
    calls, kept = [tensors(seed) for seed in range(3)], {}
    found = [select(call, kept, ("a",)) for call in calls]
    for head in range(2):
        sides = []
        for name, count in (("query", 4), ("key", 8)):
            per_step = [getattr(call, name)[0, head].double() for call in calls]
            before = literal.clusters(per_step[0], per_step[0][first_tokens(GRID.cells, count)], 4)
            steps = [before]
            for tokens in per_step[1:]:
                steps.append(literal.clusters(tokens, steps[-1][1], 1))
            sides.append(steps)
        for step, (of_queries, of_keys) in enumerate(zip(*sides, strict=True)):
            expected = literal.sparse_video_gen_2(of_queries, of_keys, 0.4, 0.1)
            assert torch.equal(found[step].mask()[0, head], expected), (head, step)


def test_each_sample_has_its_own_however_they_are_batched() -> None:
    kept: dict[Any, Any] = {}
    apart: dict[Any, Any] = {}
    for seed, samples in ((0, ("a", "b")), (1, ("b", "a"))):  # ComfyUI batches them in any order, or not at all
        call = tensors(seed, 2)
        together = select(call, kept, samples).mask()
        for at in (1, 0):
            one = call.changed(**{name: getattr(call, name)[at : at + 1] for name in ("query", "key", "value")})
            assert torch.equal(select(one, apart, samples[at : at + 1]).mask(), together[at : at + 1])
    assert kept.keys() == apart.keys()
    assert len(kept) == 4


@pytest.mark.parametrize(
    "other", [{"samples": ("b",)}, {"block": "blocks.0"}, {"role": "joint"}, {"samples": ()}], ids=str
)
def test_what_was_kept_elsewhere_is_not_used(other: dict[str, Any]) -> None:
    kept: dict[Any, Any] = {}
    select(tensors(0), kept, ("a",))
    begun = select(tensors(1), {}, ("a",)).mask()
    assert not torch.equal(select(tensors(1), dict(kept), ("a",)).mask(), begun)
    assert torch.equal(select(tensors(1), kept, **{"samples": ("a",), **other}).mask(), begun)


def test_what_a_step_did_not_use_is_forgotten() -> None:
    """Context windows may move in every step, and each window counts as a separate sample."""
    kept: dict[Any, Any] = {}
    for step in range(6):
        samples = ("a", f"window {step}")
        for block in ("blocks.0", "blocks.1"):
            select(tensors(step, 2), kept, samples, step=step, block=block, layer=None)
        assert len(kept) == 2 * 2 * (2 if step == 0 else 3), "queries and keys of two blocks: a, this window, the last"
    begun = select(tensors(7), {}, ("a",), step=6).mask()
    assert not torch.equal(select(tensors(7), kept, ("a",), step=6).mask(), begun), "a was there in every step"
    assert torch.equal(select(tensors(7), kept, ("window 1",), step=6).mask(), begun)


def test_shares_of_two_cards_are_added_up() -> None:
    """A row of the run report is shared by the cards of a run, and a tensor of one is not added to one of another."""

    class OnAnotherCard:
        device = torch.device("cuda", 1)

        def to(self, device: Any) -> Any:
            return torch.tensor(0.25, device=device)

    kept = Kept()
    kept.add(torch.tensor(0.5), "gather")
    kept.add(OnAnotherCard(), "gather")
    assert (kept.calls, kept.fraction) == (2, 0.375)


def test_a_part_of_a_batch_keeps_nothing() -> None:
    kept: dict[Any, Any] = {}
    assert isinstance(select(tensors(0), kept, ("a", "b")), HeadMaps)
    assert kept == {}


def test_prompts_of_different_lengths_leave_each_sample_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[Any, Any] = {}
    monkeypatch.setattr(sessions, "Progress", lambda: Progress(3, 10, samples=("a", "b"), kept=kept))
    query = torch.randn(2, 2, 5 + GRID.cells, 8)
    mask = torch.ones(2, 1, 1, query.shape[2], dtype=torch.bool)
    mask[0, ..., :2] = False
    mask[1, ..., :4] = False
    svg2 = {"default": {"backend": METHOD.id, "extra": OPTIONS}}
    with account() as run_report:
        attention(query, query, query, mask, backend=svg2, grid=GRID.shape, tokens_before=5)
    assert {row.backend for row in run_report.rows.values()} == {METHOD.id}
    assert [place[3] for place in kept] == ["a", "a", "b", "b"], "of queries and of keys"


@pytest.mark.parametrize(("early", "expected"), [(False, 0), (True, 2)])
def test_dense_steps_cluster_only_where_a_person_says_so(early: bool, expected: int) -> None:
    kept: dict[Any, Any] = {}
    first = {"svg2_first_times_fp": 4, "svg2_zero_step_kmeans_init": early}
    assert isinstance(select(tensors(0), kept, ("a",), **first), Dense)
    assert len(kept) == expected
    kept.clear()
    assert isinstance(select(tensors(0), kept, ("a",), **first, svg2_first_layers_fp=2), Dense)
    assert not kept, "this layer is dense in every step"


@pytest.mark.parametrize(("share", "dense"), [(0.03, 0), (0.5, 1), (0.99, 1), (1, 2), (2, 2)])
def test_dense_layers_are_a_share_of_the_whole_model(share: float, dense: int) -> None:
    blocks = ("txt_in.individual_token_refiner.blocks.0", "double_blocks.0", "single_blocks.0")
    found = [
        select(tensors(0), {}, ("a",), svg2_first_layers_fp=share, block=block, blocks=blocks, layer=layer)
        for layer, block in enumerate(blocks[1:])
    ]
    assert [isinstance(one, Dense) for one in found] == [at < dense for at in range(2)]


@pytest.mark.parametrize(
    ("block", "layer"),
    [
        ("double_blocks.1", 1), ("single_blocks.0", 2), ("single_blocks.1", 3), ("refiner.blocks.0", 0),
        ("double_blocks.7", 7), ("single", None),
    ],
)  # fmt: skip
def test_single_stream_blocks_are_counted_after_the_double_stream_ones(block: str, layer: int | None) -> None:
    """As FastVideo's and SGLang's prefixes number HunyuanVideo's, `single_blocks.{i + num_layers}`."""
    blocks = ("refiner.blocks.0", "double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1")
    assert layer_of(block, blocks) == layer
    diffusers = tuple(
        name.replace("double_", "transformer_").replace("single_", "single_transformer_") for name in blocks
    )
    assert (
        layer_of(block.replace("double_", "transformer_").replace("single_", "single_transformer_"), diffusers) == layer
    )


def test_calls_of_a_model_have_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, seen = ("double_blocks.0", "double_blocks.1", "single_blocks.0"), []
    cube: Any = BACKENDS["cube_attn"]
    monkeypatch.setattr(type(cube), "select_at", lambda self, call, grid, where, options: seen.append(where.layer))
    call = tensors(0)
    for block in blocks:
        kernel = cube.load(CPU).bound(
            call.request(grid=GRID), Place(block=block), Progress(blocks=blocks), Kept(), lambda call: call.query
        )
        with pytest.raises(AttributeError):  # there is no map to compute
            kernel(call)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(("share", "steps", "dense"), [(0.2, 1, 1), (0.2, 4, 1), (0.2, 8, 1), (0.2, 50, 10), (0, 4, 0)])
def test_a_short_run_has_a_dense_step_unless_there_shall_be_none(share: float, steps: int, dense: int) -> None:
    values, whole = METHOD.values({"svg2_first_times_fp": share}), 0
    for step in range(steps):
        whole += METHOD.dense_at(Where(step, steps, None, 9, "self", ()), values) is not None
    assert whole == dense


def test_the_published_numbers_of_clusters_are_scaled_to_the_tokens() -> None:
    grid = TokenGrid(1, 63, 60)  # a twentieth of what they are published for
    call = AttentionCall(*(torch.randn(1, 1, grid.cells, 8) for _ in range(3)))
    values = METHOD.values({"svg2_kmeans_iter_init": 1})
    found = METHOD.select_blocks(call, grid, Where(None, None, None, None, "self", ()), values)
    assert (found.of_head(0).queries.count, found.of_head(0).keys.count) == (15, 50)
    assert METHOD.blocks(grid, values).count == 15


def test_clusters_are_the_same_each_time_and_leave_torchs_generator_alone() -> None:
    tokens = torch.randn(1, 2, 300, 8)
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    found = [cluster(tokens, tokens[:, :, first_tokens(300, 9)], 6).labels for _ in range(2)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(torch.randn(3), expected)


def test_equally_near_tokens_go_to_the_first_centroid_and_an_empty_one_stays() -> None:
    tokens = torch.zeros(1, 1, 6, 2)
    tokens[..., 0] = torch.tensor([-1.0, -1, 0, 1, 1, 1])
    begin = torch.tensor([[[[-1.0, 0], [1, 0], [1, 0], [9, 9]]]])
    found = cluster(tokens, begin, 1)
    assert found.labels.tolist() == [[[0, 0, 0, 1, 1, 1]]]
    assert found.sizes.tolist() == [[[3, 3, 0, 0]]]
    assert found.centroids[0, 0, 2:].tolist() == [[1, 0], [9, 9]]
    assert found.centroids[0, 0, 0].tolist() == pytest.approx([-2 / 3, 0])


SOL: Any = BACKENDS["sol_attn"]


@pytest.mark.parametrize(
    ("written", "dense"), [("0,1", {0, 1}), ("0-3, 5", {0, 1, 2, 3, 5}), (4, {4}), ("", set()), (None, set())], ids=str
)
def test_dense_layers_are_written_as_numbers_and_ranges(written: object, dense: set[int]) -> None:
    options = SOL.values({"dense_layers": written, "dense_steps": 0})
    where = Where(3, 10, None, None, "self", ())
    assert {layer for layer in range(8) if SOL.dense_at(where._replace(layer=layer), options)} == dense
    assert SOL.dense_at(where, options) is None


def test_dense_calls_run_on_the_backend_that_a_person_names() -> None:
    call = tensors(0)
    session = Session(Router(CPU))
    kind = CallKind(call.request(), "self", "self")
    output = SOL.dense_kernel(partial(session._dense, kind), {"dense_backend": "emulated_int8"})(call)
    assert torch.equal(output, BACKENDS["emulated_int8"].load(CPU)(call))
    exact = SOL.dense_kernel(partial(session._dense, kind), {"dense_backend": "fa"})(call)
    assert 0 < (output - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize(("name", "executor"), [("sol_attn", "gather"), ("vmoba_attn", "merge")])
def test_of_a_method_with_one_executor_only_its_reasons_count(name: str, executor: str) -> None:
    tokens = torch.randn(1, 1, 6 * 8 * 8, 8, requires_grad=True)
    with account() as run_report:
        attention(tokens, tokens, tokens, backend={"default": {"backend": name}}, grid=(6, 8, 8))
    (row,) = run_report.as_dict()["rows"]
    ((reason, calls),) = row["dense"].items()
    assert (reason.count("executor"), calls) == (1, 1)
    assert executor in reason


def test_a_dense_backend_that_cannot_run_here_is_a_reason() -> None:
    reasons = SOL.option_reasons(CPU, {"dense_backend": "sage_attn"})
    assert reasons
    assert SOL.option_reasons(CPU, {"dense_backend": "fa"}) == []


@pytest.mark.parametrize(("name", "layers"), [("sol-attn", 2), ("sla", 0), ("SOL_ATTN", 2)])
def test_the_words_of_comfyuis_node_are_accepted(name: str, layers: int) -> None:
    spec = parse_config(f"default: {name}\n").default
    assert spec.backend == "sol_attn"
    values = SOL.values(spec.extra)
    assert values["min_tokens"] == (0 if layers else 12288)
    assert sum(map(len, parse_layers(values["dense_layers"]))) == layers
    assert (values["keep_percent"] is None) == (name != "sla")


def test_thu_mls_method_of_that_name_is_refused() -> None:
    for name in ("SLA_ATTN", "sla_attn", "sage_sla_attn"):
        with pytest.raises(RefusedBackendError):
            parse_config(f"default: {name}\n")
