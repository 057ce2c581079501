"""Attention over the ranks of a group is attention in one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
if not hasattr(os, "fork") or not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("no fork or no gloo", allow_module_level=True)

from rank_processes import RankProcesses, RankSet  # noqa: E402

NORMAL, SLOW = 50, 450
"""Random cases for each number of ranks and strategy: 200 in the normal run, 1,800 more behind `slow`."""


@pytest.fixture(scope="module")
def processes() -> Iterator[RankProcesses]:
    made = RankProcesses()
    yield made
    made.close()


@pytest.fixture(scope="module")
def four(processes: RankProcesses) -> RankSet:
    return processes.start(4)


def ranks(size: int) -> tuple[int, ...]:
    return tuple(range(size))


@pytest.mark.parametrize("parallel", ["ulysses", "ring"])
@pytest.mark.parametrize("size", [2, 4])
def test_random_calls(four: RankSet, size: int, parallel: str) -> None:
    assert four.run("sweep", ranks(size), parallel=parallel, first=0, count=NORMAL, within=300) == [[]] * size


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ulysses", "ring"])
@pytest.mark.parametrize("size", [2, 4])
def test_many_random_calls(four: RankSet, size: int, parallel: str) -> None:
    assert four.run("sweep", ranks(size), parallel=parallel, first=NORMAL, count=SLOW, within=3000) == [[]] * size


def test_random_calls_have_what_they_are_for(four: RankSet) -> None:
    """Also with 3 ranks, and with one."""
    found: dict[str, Any] = four.run("coverage", ranks(1), first=0, count=NORMAL)[0]
    assert all(found.values()), found
    for size in (1, 3):
        for parallel in ("ulysses", "ring"):
            assert four.run("sweep", ranks(size), parallel=parallel, first=900, count=6) == [[]] * size


def test_auto_takes_what_is_predicted_faster(four: RankSet) -> None:
    found = four.run("chosen", ranks(2), speeds=[1e12, 1e8])
    assert found[0] == found[1]  # also the measured numbers
    fast, slower, measured = found[0]["notes"]
    assert fast == ["parallel: ulysses over 2 ranks"]
    assert slower == ["parallel: ring over 2 ranks"]
    assert measured in (fast, slower)
    assert found[0]["measured once"]
    exchange, to_next, flops, copied = found[0]["link"]
    for points in (exchange, to_next):
        assert [size for size, _ in points] == [1 << 12, 1 << 19, 1 << 22]
        assert 0 < points[0][1] < points[-1][1] < 60
    assert flops > 1e6
    assert copied > 1e6


def test_sparse_methods_get_the_whole_grid(four: RankSet) -> None:
    for found in four.run("sparse", ranks(4), parallel="ulysses"):
        assert found["off"] < 1e-6 < found["from exact"]
        assert found["rows"] == found["alone"] == ["video_sparse_attn"]
    for found in four.run("sparse", ranks(2), parallel="auto"):
        assert found["notes"] == ["parallel: ulysses over 2 ranks"]
    for found in four.run("sparse", ranks(2), parallel="ring"):
        assert found["rows"] == ["torch_sdpa"]


@pytest.mark.parametrize("parallel", ["ulysses", "ring"])
def test_a_kernel_that_fails_on_one_rank_is_replaced_on_all(processes: RankProcesses, parallel: str) -> None:
    broken = {"rank": 1, "backend": "sdpa_math", "how": "RuntimeError"}
    for found in processes.start(2).run("reported", broken=broken, backend="sdpa_math", parallel=parallel):
        assert found["off"] < 1e-5
        assert found["rows"] == [["sdpa_math", 0], ["torch_sdpa", 1]]
        assert found["notes"] == [
            f"parallel: {parallel} over 2 ranks",
            "attention backend sdpa_math failed in the group (rank 1: RuntimeError: sdpa_math is broken); torch_sdpa "
            "runs on all ranks",
        ]


def test_what_a_guard_refuses_on_one_rank_runs_on_none(processes: RankProcesses) -> None:
    broken = {"rank": 1, "backend": "emulated_int8", "how": "zeros"}
    for found in processes.start(2).run("guarded", broken=broken):
        assert found["off"] < 1e-5
        assert ["torch_sdpa", 1] in found["rows"]
        assert "(rank 1: guard:" in found["notes"][-1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"scale": [0.5, 0.25]},
            "ValueError: the ranks of the group make different calls; scale: rank 0 has 0.5, rank 1",
        ),
        ({"layout": ["BHSD", "SDHB"]}, "rank 1: layout 'SDHB' is not one of"),
        ({"sequence_order": ["contiguous", "odd"]}, "rank 1: sequence_order 'odd' is not one of"),
        ({"backend": ["sdpa_math", "reference"]}, "backend: rank 0 has sdpa_math, rank 1 has reference"),
        ({"grid": [[1, 2, 3], [1, 2, 3]]}, "grid 1x2x3 has 6 tokens, and the ranks together have 12"),
        ({"replicated_before": [7, 7]}, "6 tokens on rank 0, fewer than the 7 + 0 replicated ones"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_call_that_one_rank_refuses_all_refuse(four: RankSet, arguments: dict[str, list[Any]], text: str) -> None:
    found = four.run("refused", ranks(2), arguments=arguments)
    assert found[0] == found[1]
    assert text.removeprefix("ValueError: ") in found[0]
    assert all(off < 1e-5 for off in four.run("simple", ranks(2)))  # the group goes on


def test_a_backend_that_one_rank_lacks_is_refused_where_it_is_strict(processes: RankProcesses) -> None:
    found = processes.start(2).run("strictly", lacking=1)
    assert found[0] == found[1]
    assert "(sdpa_math was asked for strictly)" in found[0]
    assert "sdpa_math: rank 1: not here" in found[0]


@pytest.mark.parametrize("parallel", ["ulysses", "ring"])
def test_a_rank_that_fails_stops_all_with_its_reason(processes: RankProcesses, parallel: str) -> None:
    """Also where it catches its error. No rank hangs, and none can go on."""
    broken = {"rank": 1, "backend": "reference", "how": "OutOfMemoryError"}
    found = processes.start(4).run("caught", broken=broken, backend="reference", parallel=parallel, within=30)
    reason = "rank 1: OutOfMemoryError: reference is broken"
    assert found[1] == ["OutOfMemoryError: reference is broken", f"GroupError: {reason}"]
    for rank in (0, 2, 3):
        assert found[rank] == [f"GroupError: {reason}"] * 2


@pytest.mark.parametrize("parallel", ["ulysses", "ring"])
def test_a_killed_rank_stops_all(processes: RankProcesses, parallel: str) -> None:
    started = processes.start(4)
    started.run("simple")
    late = ({"rank": 2, "seconds": 0.3},)
    found = started.run("many", kill_after=late, within=30, count=10, late=2, parallel=parallel)
    assert found[2] is None
    for rank in (0, 1, 3):
        assert found[rank].startswith("GroupError: the connection to another rank was lost; no answer from rank 2 (")


def test_a_killed_rank_that_was_computing_stops_all(processes: RankProcesses) -> None:
    started = processes.start(3)
    assert max(started.run("simple")) < 1e-5
    found = started.run("many", kill_after=({"rank": 0, "seconds": 1.0},), within=30, count=10**6)
    assert found[0] is None
    assert all(found[rank].startswith("GroupError: the connection to another rank was lost") for rank in (1, 2))


def test_a_rank_that_is_killed_before_its_first_call_stops_all(processes: RankProcesses) -> None:
    found = processes.start(3).run("many", kill_after=({"rank": 1, "seconds": 2.0},), within=30, count=1, late=1)
    assert found[1] is None
    assert all(found[rank].startswith("GroupError: the connection to another rank was lost") for rank in (0, 2))


def test_many_calls_keep_nothing(processes: RankProcesses) -> None:
    for found in processes.start(2).run("growth", count=500):
        assert found["agreed"] == found["threads"] == 0
        assert found["objects"] < 200
        assert found["memory"] < 8 << 10
