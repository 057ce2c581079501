"""Models of Diffusers whose tokens `enable_parallelism` divides over processes (gloo, on the CPU)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
if not hasattr(os, "fork") or not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("no fork or no gloo", allow_module_level=True)

from rank_processes import RankProcesses, RankSet  # noqa: E402

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def two() -> Iterator[RankSet]:
    processes = RankProcesses()
    yield processes.start(2)
    processes.close()


def divided(found: dict[str, Any]) -> list[list[Any]]:
    """Role, backend and calls of the rows whose calls all processes make: each has the whole prompt for the others."""
    return [row[:3] for row in found["rows"] if row[0] != "cross"]


@pytest.mark.parametrize("backend", ["sdpa_math", pytest.param("torch_sdpa", marks=SLOW)])
@pytest.mark.parametrize("way", ["ulysses", "ring"])
@pytest.mark.parametrize("model", ["wan", pytest.param("flux", marks=SLOW)])
def test_a_divided_model_gives_what_it_gives_whole(two: RankSet, model: str, way: str, backend: str) -> None:
    """FLUX has an odd number of text tokens, so its processes have different numbers of tokens."""
    parallel = {f"{way}_degree": 2, f"{way}_anything": model == "flux"}
    calls = 4 if model == "wan" else 8
    for found in two.run("diffusers_model", model=model, parallel=parallel, backend=backend, within=200):
        assert found["error"] < 2e-6 * found["size"], found
        assert sum(row[2] for row in divided(found)) == calls, found
        assert {row[1] for row in divided(found)} == {backend}
        assert any(note.endswith(f"{way} over 2 ranks") for note in found["notes"]), found


def test_what_is_chosen_before_the_model_is_divided_applies_too(two: RankSet) -> None:
    parallel = {"ulysses_degree": 2}
    for found in two.run("diffusers_model", model="wan", parallel=parallel, backend="sdpa_math", first=True):
        assert divided(found) == [["self", "sdpa_math", 4]]


@SLOW
@pytest.mark.parametrize("way", ["ulysses", "ring"])
def test_calls_in_compiled_blocks_are_divided_too(two: RankSet, way: str) -> None:
    parallel = {f"{way}_degree": 2}
    for found in two.run("diffusers_model", model="wan", parallel=parallel, backend="sdpa_math", compiled=True):
        assert found["error"] < 2e-6 * found["size"], found
        assert divided(found) == [["self", "sdpa_math", 4]]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=SLOW)])
def test_a_schedule_that_came_before_the_division_leaves_the_calls_to_diffusers(two: RankSet, compiled: bool) -> None:
    answers = two.run(
        "diffusers_model", model="wan", parallel={"ulysses_degree": 2}, backend=BY_STEP, first=True, compiled=compiled
    )
    for found in answers:
        assert found["error"] < 2e-6 * found["size"], found
        assert {row[1] for row in divided(found)} == {"diffusers"}
        assert sum(row[2] for row in divided(found)) == 4
        assert all("schedule" in row[3] for row in found["rows"] if row[1] == "diffusers")


def test_tensors_of_different_dtypes_are_left_to_diffusers(two: RankSet) -> None:
    """Under autocast its function casts them."""
    for found in two.run("diffusers_model", model="wan", parallel={"ulysses_degree": 2}, backend="auto", wide=True):
        assert found["error"] < 0.02 * found["size"], found
        assert [row for row in found["rows"] if row[0] == "self"] == [
            ["self", "diffusers", 2, "dtypes differ: float32, float32, bfloat16"],
        ] * 2  # fmt: skip


BY_STEP = {"default": "torch_sdpa", "schedule": [{"backend": "sdpa_math", "steps": "0"}]}


@pytest.mark.parametrize(
    ("parallel", "config", "words"),
    [
        ({"ulysses_degree": 2}, BY_STEP, "schedule"),
        ({"ulysses_degree": 2, "ring_degree": 2}, "torch_sdpa", "Ulysses and ring together"),
    ],
    ids=["schedule", "both"],
)
def test_what_is_not_honoured_is_refused(parallel: dict[str, int], config: Any, words: str) -> None:
    import tiny_diffusers as tiny
    from attention_backends.backends.values.errors import NoBackendError
    from attention_backends.integrations.diffusers import apply, in_group
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig

    model, _ = tiny.wan()
    context = ContextParallelConfig(**parallel)
    model._parallel_config = ParallelConfig(context_parallel_config=context)
    if words == "schedule":
        assert "enable_parallelism" in str(in_group.read(model._parallel_config))
        context._ulysses_mesh = type("Mesh", (), {"get_group": lambda self: None})()
    with pytest.raises(NoBackendError, match=words):
        apply(model, config)


def test_processes_that_chose_different_backends_all_stop(two: RankSet) -> None:
    answers = two.run("diffusers_model", model="wan", parallel={"ring_degree": 2}, backend=["sdpa_math", "torch_sdpa"])
    assert [answer["error"] for answer in answers] == ["CheckError"] * 2
    assert all("sdpa_math" in answer["text"] and "torch_sdpa" in answer["text"] for answer in answers)


def test_the_guard_of_a_run_watches_divided_calls_too(two: RankSet) -> None:
    for found in two.run("diffusers_guarded", guard="watch", wrong=6):
        assert found["checked"] == 4, "once in each forward"
        assert [error < 0.01 for error in found["errors"]] == [True, True, False, True]
        assert any("model call 3" in note for note in found["notes"]), found


def test_what_the_guard_refuses_is_refused_in_all_processes_until_the_run_ends(two: RankSet) -> None:
    for found in two.run("diffusers_guarded", guard="enforce", wrong=5):  # the call that forward 3 checks
        assert [row[:3] for row in found["rows"] if row[0] == "self"] == [
            ["self", "emulated_int8", 4], ["self", "torch_sdpa", 4],
        ]  # fmt: skip
        assert max(found["errors"]) < 0.01
    for found in two.run("diffusers_guarded", guard="enforce", wrong=0):
        assert divided(found) == [["self", "emulated_int8", 8]]


def test_processes_compute_a_forward_again_together(two: RankSet) -> None:
    """One has the inexact kernel, in calls that it computes alone; what comes of it reaches all."""
    for found in two.run("diffusers_guarded", guard="enforce", wrong=6, role="cross", lacking=True, within=30):
        assert max(found["errors"]) < 0.01, found
        assert divided(found) == [["self", "torch_sdpa", 10]]
