"""The benchmark of two cards, on two threads whose clocks advance by their amount of work (`tests/card_workers.py`)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_backends.backends.cards.transport import Transport
from attention_backends.backends.engine.session import Session
from attention_backends.backends.values.request import AttentionRequest
from card_workers import CPU, Bench, Worker

SHAPES = {
    "long": AttentionRequest(1, 8, 640, 640, 16, "float32"),
    "short": AttentionRequest(1, 8, 20, 20, 16, "float32"),
}


def script() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "two_cards.py"
    spec = importlib.util.spec_from_file_location("two_cards", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


two_cards = script()


class Peer(Worker):
    """Its copies are slower through the host."""

    has_peer_access = True

    def _measured(self, like: torch.Tensor) -> Any:
        before = self.bandwidth
        self.bandwidth = before if self.has_peer_access else before / 4
        try:
            return super()._measured(like)
        finally:
            self.bandwidth = before


class Threads(two_cards.Machine):  # type: ignore[misc,name-defined]
    """A home thread and another one, which is 1.5 times as fast."""

    dtypes = (torch.float32,)
    host_bytes = 1 << 16

    def __init__(self, bandwidth: float = 1e8, speed: float = 1.5e8) -> None:
        super().__init__(CPU, CPU, "torch_sdpa")
        self.bandwidth, self.speed = bandwidth, speed
        self.benches: list[Bench] = []

    def transport(self) -> Transport:
        return Peer("cuda:1", Bench().home, bandwidth=self.bandwidth)

    def session(self, *, divided: bool) -> Session:
        bench = Bench(self.bandwidth, speeds=(1e8, self.speed))
        self.benches.append(bench)
        if not divided:
            bench.session.divider = None
        return bench.session

    def now(self) -> float:
        """One thread works at a time: the sum is the clock of both sessions."""
        return sum(bench.home.passed for bench in self.benches)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def test_divided_calls_are_right_whatever_their_shares() -> None:
    rows = two_cards.correct(Threads(), tokens=96)
    assert {name.removesuffix(", float32") for name in rows} == set(two_cards.CASES)
    assert [name for name, row in rows.items() if row["wrong"] or not row["same_bits"]] == []
    assert all(0 < row["error"] < row["limit"] for row in rows.values())
    assert two_cards.shares_of(7) == [(4, 3), (1, 6), (6, 1), (0, 7)]


def test_a_wrong_result_of_the_other_card_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def bring(self: Worker, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source + 1)

    monkeypatch.setattr(Worker, "bring", bring)
    rows = two_cards.correct(Threads(), {"one": two_cards.CASES["no mask"]}, tokens=96)
    (row,) = rows.values()
    assert len(row["wrong"]) == len(two_cards.shares_of(8))
    assert not row["same_bits"]


def test_a_card_that_cannot_be_used_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(self: Worker, tensors: Any) -> Any:
        raise RuntimeError("no such card")

    monkeypatch.setattr(Worker, "send", send)
    (row,) = two_cards.correct(Threads(), {"one": two_cards.CASES["no mask"]}, tokens=96).values()
    assert len(row["wrong"]) == 1
    assert "no such card" in row["wrong"][0]


def test_a_card_that_computes_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    both = two_cards.Both(Threads())
    monkeypatch.setattr(two_cards, "Both", lambda machine: both)
    monkeypatch.setattr(both, "divided", lambda slot, call, *_: both.one.attention(both.slots(call)[0], call))
    (row,) = two_cards.correct(both.machine, {"one": two_cards.CASES["no mask"]}, tokens=96).values()
    assert {text.partition(": ")[2] for text in row["wrong"]} == {"the other card computed nothing"}


def test_both_ways_between_the_cards_are_measured() -> None:
    found = two_cards.links(Threads())
    ways = found["ways"]
    assert found["has_peer_access"]
    assert list(ways) == ["peer access", "through the host", "cpu and pinned memory"]
    assert ways["peer access"]["there"]["gb_per_second"] == pytest.approx(0.1, rel=0.01)
    assert ways["through the host"]["back"]["gb_per_second"] == pytest.approx(0.025, rel=0.01)
    assert ways["cpu and pinned memory"]["there"]["gb_per_second"] > 0


def test_one_card_against_two_and_what_was_predicted() -> None:
    found = dict(two_cards.calls(Threads(), SHAPES, 3))
    assert found["long"]["faster"]["median"] > 2.2
    assert sum(found["long"]["heads_chosen"]) == 8
    assert found["long"]["heads_chosen"][1] > found["long"]["heads_predicted"][1] >= 4
    assert found["long"]["measured_over_predicted"] < 1.0  # it was taken to be as fast as the home card
    slow = dict(two_cards.calls(Threads(1e5), SHAPES, 3))
    assert [row["heads_chosen"] for row in slow.values()] == [None, None]
    assert slow["long"]["heads_of_each"] == (4, 4)
    assert slow["long"]["faster"]["median"] < 1.0
    assert 0.85 < slow["long"]["measured_over_predicted"] < 1.15


def test_a_call_that_fails_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(two_cards, "_call", fails)
    assert "out of memory" in dict(two_cards.calls(Threads(), SHAPES, 1))["long"]["error"]


def test_the_figures_and_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(two_cards, "CASES", {})
    monkeypatch.setattr(two_cards, "correct", lambda machine: {"x": {"same_bits": False, "wrong": ["heads (1, 2)"]}})
    found = json.loads(json.dumps(two_cards.measured(Threads(1e5), SHAPES, 1, "python it")))
    page = two_cards.table({**found, "calls": {**found["calls"], "large": {"error": "no room"}}})
    assert "; 1 wrong." in page
    assert "- x: heads (1, 2)" in page
    assert "`python it`" in page
    assert "4 + 4, not chosen" in page
    assert "no room" in page
    assert torch.__version__.partition("+")[0] in page


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are two CUDA devices")
def test_without_two_cards_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert two_cards.main(["--pairs", "1"]) == 0
    assert capsys.readouterr().out == "skipped: no second CUDA device\n"


def test_the_shapes_are_those_of_real_models() -> None:
    shapes = two_cards.shapes_of()
    assert {(of.num_heads, of.q_len, of.dtype) for of in shapes.values()} >= {
        (40, 32760, "bfloat16"), (40, 75600, "bfloat16"), (24, 4111, "bfloat16"),
    }  # fmt: skip
    assert all(of.grid is None for of in shapes.values())
