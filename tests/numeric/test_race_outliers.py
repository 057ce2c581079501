"""The measured choice where one call compiles, one is held up, or a run has few calls. Times are simulated."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.measure.call_key import key_of  # noqa: E402
from attention_backends.backends.observe.autotune import contest as contest_module  # noqa: E402
from attention_backends.backends.observe.autotune.contest import Contest  # noqa: E402
from attention_backends.backends.observe.autotune.entry import Entry  # noqa: E402
from attention_backends.backends.observe.autotune.store import Store  # noqa: E402
from measured_machines import INCUMBENT, Machine, small_call, steady  # noqa: E402

USUAL = 3.0
REQUEST = small_call().request()
PLACE = ("here", "exact", key_of("self", REQUEST))


def race_once(times: dict[str, Iterator[float]], before: Entry | None = None, calls: int = 400) -> Contest:
    """One race of these against the incumbent; of what an earlier one put off where `before` is that one."""
    incumbent = INCUMBENT if before is None else before.winner
    names = [name for name in times if name != incumbent and (before is None or name in before.deferred)]
    contest = Contest(PLACE, REQUEST, incumbent, names, before)
    for _ in range(calls):
        name = contest.next(1.0) if contest.is_open else None
        if name is not None:
            contest.begin(name)
            contest.record_time(name, next(times[name]))
    return contest


def disturbed(real: float, first: float, held_up: dict[int, float]) -> Iterator[float]:
    """`first` for the first call, and calls that were held up by their number."""
    return (first if call == 0 else held_up.get(call, real) for call in itertools.count())


@pytest.mark.parametrize("real", [0.5, 1.0, 1.8])
def test_no_kernel_is_dropped_because_one_call_compiled_and_one_was_held_up(real: float) -> None:
    """Unless both take the same time, within 10 %, of two to four calls: such a kernel is taken for a slow one."""
    kernel_ms = real * USUAL
    for first in (kernel_ms, 2.5 * USUAL, 20.0, 30.0, 400.0, 4000.0):
        for call, ms in itertools.product(range(1, 8), (2.1 * USUAL, 20.0, 30.0, 400.0)):
            times = {INCUMBENT: itertools.repeat(USUAL), "other": disturbed(kernel_ms, first, {call: ms})}
            entry = None
            for _ in range(3):  # later runs try again what one put off
                entry = race_once(times, entry).entry
                if entry is not None and not entry.deferred:
                    break
            assert entry is not None
            assert "other" not in entry.rejected, (first, call, ms, entry)
            assert entry.deferred == {}
            assert entry.ms["other"] <= 1.25 * kernel_ms, (first, call, ms, entry)
            assert entry.winner == ("other" if real < 1 else INCUMBENT)


def test_an_incumbent_that_compiles_and_is_held_up_does_not_win_or_lose_by_it() -> None:
    for call, ms in itertools.product(range(1, 12), (10.0, 400.0)):
        times = {INCUMBENT: disturbed(USUAL, 50.0, {call: ms}), "other": itertools.repeat(0.9 * USUAL)}
        entry = race_once(times).entry
        assert entry is not None
        assert entry.winner == "other", (call, ms, entry)
        assert entry.ms[INCUMBENT] == USUAL


@pytest.mark.parametrize("real", [2.1, 3.0, 3.9])
def test_a_kernel_that_is_plainly_slower_is_dropped_after_two_calls(real: float, snapshot: SnapshotAssertion) -> None:
    times = {INCUMBENT: itertools.repeat(USUAL), "other": itertools.repeat(real * USUAL)}
    contest = race_once(times)
    assert contest.entry is not None
    assert contest.entry.rejected["other"] == snapshot
    assert contest.candidate_times["other"].spent == pytest.approx(2 * real * USUAL)


@pytest.mark.parametrize("real", [5.0, 11.0, 100.0])
def test_a_far_slower_kernel_costs_at_most_three_budgets(real: float) -> None:
    spent = 0.0

    def counted() -> Iterator[float]:
        nonlocal spent
        while True:
            spent += real * USUAL
            yield real * USUAL

    times = {INCUMBENT: itertools.repeat(USUAL), "other": counted()}
    entry = None
    for _ in range(5):
        if entry is None or entry.deferred:
            entry = race_once(times, entry).entry
    assert entry is not None
    assert entry.winner == INCUMBENT
    assert entry.deferred == {}
    assert spent <= 3 * max(contest_module.BUDGET * USUAL + real * USUAL, real * USUAL)


def test_the_choice_is_as_good_with_many_calls_held_up() -> None:
    """Up to one call in ten takes 3 to 30 times as long, and every first call compiles."""
    source, good, contests = random.Random(3), 0, 150
    for _ in range(contests):
        real = {INCUMBENT: USUAL} | {name: USUAL * source.uniform(0.5, 1.5) for name in ("a", "b", "c")}

        def noisy(ms: float) -> Iterator[float]:
            yield ms * source.uniform(1, 8)
            while True:
                held_up = source.uniform(3, 30) if source.random() < 0.1 else 1.0
                yield ms * source.lognormvariate(0, 0.05) * held_up

        times, entry = {name: noisy(ms) for name, ms in real.items()}, None
        for _ in range(2):
            if entry is None or entry.deferred:
                entry = race_once(times, entry).entry
        assert entry is not None
        good += real[entry.winner] <= 1.1 * min(real.values())
    assert good >= 0.93 * contests


@pytest.mark.parametrize(("blocks", "steps"), [(1, 60), (2, 40), (4, 20), (8, 8)])
def test_a_run_with_few_calls_in_a_step_goes_on_after_step_4(tmp_path: Path, blocks: int, steps: int) -> None:
    store = Store(tmp_path / "measured.sqlite3")
    Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0, sdpa_flash=3.5)).run(small_call(), blocks=blocks, steps=steps)
    (entry,) = store.entries()
    assert entry["winner"] == "sdpa_math"


@pytest.mark.parametrize(("blocks", "steps"), [(1, 4), (2, 4), (1, 8)])
def test_a_run_that_is_too_short_hands_its_times_to_the_next_one(tmp_path: Path, blocks: int, steps: int) -> None:
    """As distilled models run: four steps, few blocks."""
    store = Store(tmp_path / "measured.sqlite3")
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0, sdpa_flash=3.5))
    runs = 0
    while not store.entries():
        machine.run(small_call(), blocks=blocks, steps=steps)
        runs += 1
        assert runs < 30
    (entry,) = store.entries()
    assert entry["winner"] == "sdpa_math"
    assert machine.backends["sdpa_flash"].spent <= contest_module.BUDGET * 3.0 + 3.5, "the same budget over all runs"
    assert machine.backends["sdpa_math"].calls <= contest_module.BUDGET * 3.0 / 2.0 + 1
