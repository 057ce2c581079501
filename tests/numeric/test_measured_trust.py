"""Measured choices that are not to be taken at their word: from a document by hand, or outrun by what came later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.config.layers import Choice  # noqa: E402
from attention_backends.backends.engine.plan import CallKind  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.measure.call_key import key_of  # noqa: E402
from attention_backends.backends.observe.autotune.candidates import with_store  # noqa: E402
from attention_backends.backends.observe.autotune.store import Store  # noqa: E402
from attention_backends.backends.observe.autotune.tuner import Tuner  # noqa: E402
from attention_backends.backends.observe.guard import Guard  # noqa: E402
from attention_backends.backends.values.faults import KernelFaultError  # noqa: E402
from measured_entries import entry  # noqa: E402
from measured_machines import INCUMBENT, Costed, Machine, ran, sdpa, small_call, steady  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "user" / "measured.sqlite3")


def imported(store: Store, *entries: Any) -> int:
    return store.import_(json.loads(json.dumps({**store.export(), "entries": [one.as_dict() for one in entries]})))


@pytest.mark.parametrize("winner", ["emulated_int8", "reference", "comfy", "not_a_backend"])
def test_an_imported_winner_that_may_not_run_is_measured_anew(store: Store, winner: str) -> None:
    call = small_call()
    router = Router(detect(CPU))
    session = Session(router, (AttentionConfig(AttentionSpec("measured"), accuracy="exact"),))
    tuner = Tuner(session, store)
    session.register(tuner)
    others = tuner.candidates(call.request(), INCUMBENT, "exact")
    times = {**dict.fromkeys(others, 5.0), winner: 0.001}
    imported(store, entry(key_of("self", call.request()), ms=times))

    slot = session.plan(CallKind(call.request(), "self", "self"))
    session.attention(slot, call)
    assert winner not in ran(session)
    assert slot.plan.is_trial
    decision = router.select(call.request(), Choice("measured", "test"))
    assert with_store(decision, call.request(), "self", "self", "exact", router, store).backend == INCUMBENT


def test_a_winner_that_a_route_avoids_for_another_length_of_the_bucket_gives_way(
    store: Store, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0))
    machine.run(small_call(37))
    monkeypatch.setattr(
        machine.backends["sdpa_math"],
        "avoid_reasons",
        lambda request, platform: ["wrong with odd lengths"] if request.q_len == 39 else [],
    )
    other = machine.run(small_call(39))  # 37 to 40 are one bucket
    assert ran(other) == {INCUMBENT: 240}
    (said,) = {row.source for row in other.run_report.rows.values()}
    assert said == snapshot
    assert ran(machine.run(small_call(38))) == {"sdpa_math": 240}


def test_a_winner_that_fails_later_is_not_chosen_for_ever(store: Store, snapshot: SnapshotAssertion) -> None:
    machine = Machine(store, steady(torch_sdpa=5.0, sdpa_math=2.0, flex_attn=3.0))
    machine.run(small_call())
    assert store.entries()[0]["winner"] == "sdpa_math"

    def broken(call: Any) -> Any:
        raise RuntimeError("no kernel image")

    machine.backends["sdpa_math"].kernel = broken
    counts = ran(machine.run(small_call()))  # one block falls back, and those that are planned later know already
    assert counts == {INCUMBENT: 8, "flex_attn": 232}
    (kept,) = store.entries()
    assert kept["winner"] == "flex_attn"
    assert kept["rejected"] == snapshot
    calls = machine.backends["sdpa_math"].calls
    assert ran(machine.run(small_call())) == {"flex_attn": 240}
    assert machine.backends["sdpa_math"].calls == calls


def test_a_winner_that_runs_out_of_memory_later_is_not_chosen_for_ever(store: Store) -> None:
    machine = Machine(store, steady(torch_sdpa=5.0, sdpa_math=2.0))
    machine.run(small_call())

    def too_large(call: Any) -> Any:
        raise torch.OutOfMemoryError("8 GiB")

    machine.backends["sdpa_math"].kernel = too_large
    with pytest.raises(torch.OutOfMemoryError):
        machine.run(small_call())
    assert store.entries()[0]["winner"] == INCUMBENT
    assert ran(machine.run(small_call())) == {INCUMBENT: 240}


def test_a_winner_that_leaves_the_gpu_unusable_is_not_chosen_for_ever(store: Store) -> None:
    machine = Machine(store, steady(torch_sdpa=5.0, sdpa_math=2.0))
    machine.run(small_call())

    def fault(call: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    machine.backends["sdpa_math"].kernel = fault
    with pytest.raises(KernelFaultError, match="sdpa_math"):
        machine.run(small_call())
    assert store.entries()[0]["winner"] == INCUMBENT
    assert ran(machine.run(small_call())) == {INCUMBENT: 240}


def test_a_candidate_that_leaves_the_gpu_unusable_is_not_tried_again_after_a_restart(
    store: Store, snapshot: SnapshotAssertion
) -> None:
    def fault(call: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    costs = steady(torch_sdpa=5.0, sdpa_math=2.0)
    bad = Costed("flex_attn", None, lambda: 1.0, fault)  # type: ignore[arg-type]
    with pytest.raises(KernelFaultError, match="flex_attn"):
        Machine(store, costs, others=[bad]).run(small_call())
    restarted = Machine(Store(store.path), costs, others=[bad])
    calls = bad.calls
    restarted.run(small_call())
    assert ran(restarted.run(small_call())) == {"sdpa_math": 240}
    assert bad.calls == calls
    (kept,) = store.entries()
    assert kept["rejected"] == snapshot


@pytest.mark.parametrize("guard", ["watch", "enforce"])
def test_a_lossy_winner_that_the_guard_catches_later_is_not_chosen_for_ever(store: Store, guard: str) -> None:
    lossy = Costed("emulated_fp8", None, lambda: 2.0, accuracy="quantized")  # type: ignore[arg-type]
    machine = Machine(store, steady(torch_sdpa=5.0), accuracy="quantized", guard=guard, others=[lossy])
    machine.run(small_call())
    assert store.entries()[0]["winner"] == lossy.id
    lossy.kernel = lambda call: -2 * sdpa(call)
    machine.run(small_call())
    (kept,) = store.entries()
    assert kept["winner"] == INCUMBENT
    assert kept["rejected"][lossy.id].startswith("guard: relative L2")
    assert ran(machine.run(small_call())) == {INCUMBENT: 240}


def test_what_is_not_finite_is_seen_in_the_trials_of_a_lossy_kernel_too(
    store: Store, snapshot: SnapshotAssertion
) -> None:
    calls: list[Any] = []

    def not_finite_later(call: Any) -> Any:
        calls.append(call)
        return sdpa(call) if len(calls) == 1 else sdpa(call) * float("nan")

    lossy = Costed("emulated_fp8", None, lambda: 2.0, not_finite_later, "quantized")  # type: ignore[arg-type]
    machine = Machine(store, steady(torch_sdpa=5.0), accuracy="quantized", guard="watch", others=[lossy])
    session, call, plans = machine.begin(), small_call(), {}
    for number in range(1, 4):
        step = object()
        machine.tuner.model_call(step)

        def blocks() -> Any:
            for block in range(30):
                if block not in plans:
                    plans[block] = session.plan(CallKind(call.request(), "self", "self", f"blocks.{block}"))
            return torch.stack([session.attention(plan, call) for plan in plans.values()])

        guard = session.registered(Guard)
        assert guard is not None
        finite = guard.model_call(step, blocks, blocks).isfinite().all()
        assert bool(finite) == (number == 1)
    assert session.run_report.notes == snapshot


def test_an_incumbent_that_failed_in_one_run_is_measured_in_the_next(store: Store) -> None:
    calls: list[Any] = []

    def fails_once(call: Any) -> Any:
        calls.append(call)
        if len(calls) == 40:  # when every block is planned
            raise RuntimeError("once")
        return sdpa(call)

    usual = Costed(INCUMBENT, None, lambda: 5.0, fails_once)  # type: ignore[arg-type]
    machine = Machine(store, steady(sdpa_math=2.0), others=[usual])
    call = small_call()
    machine.run(call, host=sdpa)
    assert store.entries() == []
    machine.run(call)
    assert store.entries()[0]["winner"] == "sdpa_math"
