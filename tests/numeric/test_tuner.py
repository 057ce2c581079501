"""The measured choice on simulated machines: kernels with set costs and noise, on a clock that only they move."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.config.layers import Choice  # noqa: E402
from attention_backends.backends.engine.mask_reader import inspect  # noqa: E402
from attention_backends.backends.engine.plan import CallKind, SplitPlan  # noqa: E402
from attention_backends.backends.engine.router import NOTHING_MEASURES, Router  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.engine.sub_calls import calls_of, plan_sub_calls  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.measure.call_key import key_of  # noqa: E402
from attention_backends.backends.observe import observe  # noqa: E402
from attention_backends.backends.observe.autotune import contest as contest_module  # noqa: E402
from attention_backends.backends.observe.autotune.candidates import candidates  # noqa: E402
from attention_backends.backends.observe.autotune.contest import Contest  # noqa: E402
from attention_backends.backends.observe.autotune.store import Store  # noqa: E402
from attention_backends.backends.observe.autotune.tuner import Tuner  # noqa: E402
from attention_backends.backends.observe.guard import Guard  # noqa: E402
from attention_backends.backends.values.faults import KernelFaultError  # noqa: E402
from attention_backends.backends.values.grid import TokenGrid  # noqa: E402
from attention_backends.backends.values.request import AttentionCall  # noqa: E402
from measured_machines import INCUMBENT, Costed, CostedSparse, Machine, noisy, ran, sdpa, small_call, steady  # noqa: E402

NAMES = ("sdpa_math", "sdpa_flash", "flash_attn_2", "flash_attn_3", "xformers", "aiter")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "measured.sqlite3")


def tuning(session: Session) -> dict[str, Any]:
    found: Any = session.run_report.as_dict()["tuning"]
    return found


def only_entry(store: Store) -> dict[str, Any]:
    (entry,) = store.entries()
    return entry


def drawn(source: random.Random) -> tuple[dict[str, float], dict[str, Any]]:
    """A machine: what each kernel really takes, and its noisy costs."""
    usual = source.uniform(1.5, 20)
    real = {INCUMBENT: usual}
    real |= {name: usual * source.uniform(0.5, 2.5) for name in source.sample(NAMES, source.randint(2, 6))}
    sigma, outliers = source.uniform(0.05, 0.1), source.uniform(0, 0.03)
    return real, {name: noisy(ms, source, sigma, outliers) for name, ms in real.items()}


def test_the_choice_is_within_3_percent_of_the_best_on_19_of_20_machines(tmp_path: Path) -> None:
    source, good = random.Random(0), 0
    for number in range(20):
        real, costs = drawn(source)
        store = Store(tmp_path / f"{number}.sqlite3")
        machine = Machine(store, costs)
        session = machine.run(small_call(), blocks=50, steps=5)
        entry = only_entry(store)
        good += real[entry["winner"]] <= 1.03 * min(real.values())
        assert tuning(session) == {
            "state": "tuning", "kinds": 1, "open": 0, "decided": 1, "from_store": 0, "not_tuned": 0,
        }  # fmt: skip
        for name in set(real) - {INCUMBENT, entry["winner"]}:
            spent = machine.backends[name].spent  # its last call may be held up: nobody can know that before
            assert spent <= contest_module.BUDGET * real[INCUMBENT] + 5 * 1.3 * real[name]
        if entry["put_off"]:  # held up in its very first call
            machine.run(small_call())
            entry = only_entry(store)
        before = {name: backend.calls for name, backend in machine.backends.items()}
        again = machine.run(small_call(), blocks=10, steps=3)
        spent_again = {name: backend.calls - before[name] for name, backend in machine.backends.items()}
        assert spent_again == {name: 30 if name == entry["winner"] else 0 for name in real}
        assert tuning(again)["from_store"] == tuning(again)["kinds"] == 1
    assert good >= 19


def test_that_is_no_luck(store: Store) -> None:
    """Twelve more times 20 machines, without sessions and kernels: more than one of 20 is rare, and bad luck."""
    location = (store.path.name, "exact", key_of("self", small_call().request()))
    worse_ones = []
    for seed in range(1, 13):
        source, worse_ones = random.Random(seed), [*worse_ones, 0]
        for _ in range(20):
            real, costs = drawn(source)
            contest = Contest(location, small_call().request(), INCUMBENT, [name for name in real if name != INCUMBENT])
            for number in range(50 * 4):
                name = contest.next((number // 50) / 3) if contest.is_open else None
                if name is not None:
                    contest.begin(name)
                    contest.record_time(name, costs[name]())
            assert contest.entry is not None
            worse_ones[-1] += real[contest.entry.winner] > 1.03 * min(real.values())
    assert sum(worse_ones) <= 0.03 * 20 * len(worse_ones)
    assert sum(count > 1 for count in worse_ones) <= 1


def test_times_that_come_late_give_the_same_choice(store: Store) -> None:
    source = random.Random(5)
    machine = Machine(
        store, {INCUMBENT: noisy(3, source), "sdpa_math": noisy(2, source), "aiter": noisy(60, source)}, delay=True
    )
    session = machine.run(small_call())
    entry = only_entry(store)
    assert entry["winner"] == "sdpa_math"
    assert entry["rejected"].keys() | entry["put_off"].keys() == {"aiter"}
    assert machine.backends["aiter"].calls == 1, "a candidate of unknown speed is tried again only when its time is in"
    assert ran(session) == {name: backend.calls for name, backend in machine.backends.items()}


def test_trials_are_spread_over_steps_2_to_4_and_take_turns(store: Store) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=3.3, sdpa_flash=2.8))
    seen: list[tuple[int, str]] = []
    for name, backend in machine.backends.items():

        def cost(ms: float = backend.cost(), name: str = name) -> float:
            seen.append((machine.tuner.steps, name))
            return ms

        backend.cost = cost
    machine.run(small_call(), blocks=30, steps=4)
    assert only_entry(store)["winner"] == "sdpa_flash"
    tried = [(step, name) for step, name in seen if name == "sdpa_math"]
    by_step = [sum(1 for at, _ in tried if at == step) for step in (1, 2, 3, 4)]
    assert by_step[0] == 0
    assert all(by_step[1:]), by_step
    assert max(by_step) <= 4
    order = [name for step, name in seen if step == 2][:9]
    assert {order.index(name) for name in ("sdpa_math", "sdpa_flash")} <= {0, 1, 2, 3}
    assert sorted(order[:3]) == sorted(order[3:6]) == sorted(machine.backends), "everybody once in each round"
    assert order[:3] != order[3:6]


def test_an_open_contest_does_not_keep_the_session_of_its_run(store: Store) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0))
    session = weakref.ref(machine.run(small_call(), blocks=4, steps=1))
    assert len(store.contests) == 1
    del machine
    gc.collect()
    assert session() is None


def test_a_candidate_twice_as_slow_is_dropped_after_one_call(store: Store, snapshot: SnapshotAssertion) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=6.2))
    session = machine.run(small_call())
    assert machine.backends["sdpa_math"].calls == 2, "the first call only warms up"
    entry = only_entry(store)
    assert entry["rejected"] == snapshot
    assert entry["winner"] == INCUMBENT
    assert ran(session) == {INCUMBENT: 238, "sdpa_math": 2}


def test_one_call_that_was_held_up_does_not_drop_a_candidate(store: Store) -> None:
    times = iter([2.0, 30.0])
    costs = {INCUMBENT: lambda: 3.0, "sdpa_math": lambda: next(times, 2.0)}
    Machine(store, costs).run(small_call())
    assert only_entry(store)["winner"] == "sdpa_math"


def test_the_first_call_may_compile(store: Store) -> None:
    times = iter([20.0])
    machine = Machine(store, {INCUMBENT: lambda: 3.0, "sdpa_math": lambda: next(times, 2.0)})
    machine.run(small_call())
    assert only_entry(store)["winner"] == "sdpa_math"
    assert only_entry(store)["ms"]["sdpa_math"] == 2.0


def test_a_first_call_beyond_the_budget_puts_a_candidate_off_to_the_next_run(store: Store) -> None:
    times = iter([4000.0])
    machine = Machine(store, {INCUMBENT: lambda: 3.0, "sdpa_math": lambda: next(times, 2.0)})
    machine.run(small_call())
    assert only_entry(store)["winner"] == INCUMBENT
    assert only_entry(store)["put_off"] == {"sdpa_math": 1}
    assert machine.backends["sdpa_math"].calls == 1
    machine.run(small_call())
    assert only_entry(store)["winner"] == "sdpa_math"
    assert only_entry(store)["put_off"] == {}
    assert ran(machine.run(small_call())) == {"sdpa_math": 240}, "nothing is tried again"


def test_one_that_always_compiles_is_put_off_twice_only(store: Store, snapshot: SnapshotAssertion) -> None:
    """Once for compiling, once more in case that the next call was held up."""
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=4000.0))
    for _ in range(5):
        machine.run(small_call())
    assert machine.backends["sdpa_math"].calls == 3
    assert only_entry(store)["rejected"] == snapshot


def test_calls_under_a_millisecond_are_not_tuned(store: Store, snapshot: SnapshotAssertion) -> None:
    machine = Machine(store, steady(torch_sdpa=0.9, sdpa_math=0.1))
    session = machine.run(small_call())
    assert ran(session) == {INCUMBENT: 240}
    assert store.entries() == []
    assert tuning(session)["not_tuned"] == 1
    sources = {row.source for row in session.run_report.rows.values() if row.calls}
    assert sources == snapshot


@pytest.mark.parametrize(("ms", "winner"), [(2.95, INCUMBENT), (2.9, "sdpa_math")])
def test_the_incumbent_stays_unless_another_is_over_2_percent_faster(store: Store, ms: float, winner: str) -> None:
    session = Machine(store, steady(torch_sdpa=3.0, sdpa_math=ms)).run(small_call())
    assert only_entry(store)["winner"] == winner
    said = (
        "2.9 ms, 3 % faster than torch_sdpa, 2 candidates"
        if winner != INCUMBENT
        else "3 ms, none is faster, 2 candidates"
    )
    assert f"node.default: autotune ({said})" in {row.source for row in session.run_report.rows.values()}


def worse(call: AttentionCall) -> torch.Tensor:
    return 1.3 * sdpa(call)


def out_of_memory(call: AttentionCall) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 39 GiB")


def broken(call: AttentionCall) -> torch.Tensor:
    raise RuntimeError("no kernel image is available")


def spoils(call: AttentionCall) -> torch.Tensor:
    output = sdpa(call).clone()
    call.key.zero_()
    return output


@pytest.mark.parametrize(
    ("kernel", "accuracy"),
    [
        (worse, "exact"),
        (worse, "quantized"),
        (out_of_memory, "exact"),
        (broken, "exact"),
        (spoils, "exact"),
    ],
)
def test_a_candidate_that_goes_wrong_harms_nothing(
    store: Store, kernel: Any, accuracy: str, snapshot: SnapshotAssertion
) -> None:
    bad = Costed("sage_attn", None, lambda: 1.2, kernel, accuracy)  # type: ignore[arg-type]
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0), accuracy="quantized", others=[bad])
    call = small_call()
    exact, key = sdpa(call), call.key.clone()
    session = machine.begin()
    outputs = []
    slot = session.plan(CallKind(call.request(), "self", "self"))
    for _ in range(40):
        machine.tuner.model_call(object() if machine.tuner.steps < 4 else machine.tuner._step)
        outputs.append(session.attention(slot, call))
    assert all(torch.equal(output, exact) for output in outputs)
    assert torch.equal(call.key, key)
    entry = only_entry(store)
    assert entry["rejected"] == snapshot
    assert entry["winner"] == "sdpa_math"
    assert bad.calls == 1
    assert "sage_attn" not in ran(session)
    assert sum(ran(session).values()) == 40
    assert session.failed == {}


def test_a_fault_of_the_gpu_is_never_swallowed(store: Store, snapshot: SnapshotAssertion) -> None:
    def fault(call: AttentionCall) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bad = Costed("sdpa_math", None, lambda: 1.2, fault)  # type: ignore[arg-type]
    machine = Machine(store, steady(torch_sdpa=3.0), others=[bad])
    with pytest.raises(KernelFaultError) as caught:
        machine.run(small_call())
    assert str(caught.value) == snapshot


def test_out_of_memory_of_the_incumbent_is_passed_on(store: Store) -> None:
    bad = Costed(INCUMBENT, None, lambda: 3.0, out_of_memory)  # type: ignore[arg-type]
    machine = Machine(store, steady(sdpa_math=2.0), others=[bad])
    with pytest.raises(torch.OutOfMemoryError):
        machine.run(small_call())


def test_an_incumbent_that_fails_falls_back_as_ever(store: Store) -> None:
    bad = Costed(INCUMBENT, None, lambda: 3.0, broken)  # type: ignore[arg-type]
    machine = Machine(store, steady(sdpa_math=2.0), others=[bad])
    session = machine.begin()
    call = small_call()
    slot = session.plan(CallKind(call.request(), "self", "self"))
    assert torch.equal(session.attention(slot, call, host=sdpa), sdpa(call))
    assert slot.plan.decision.backend == "comfy"
    assert store.entries() == []


def test_what_a_person_named_is_never_tried(store: Store) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=9.0), asked="sdpa_math")
    session = machine.run(small_call())
    assert ran(session) == {"sdpa_math": 240}
    assert tuning(session) == {
        "state": None, "kinds": 0, "open": 0, "decided": 0, "from_store": 0, "not_tuned": 0,
    }  # fmt: skip


def test_lossy_kernels_are_tried_only_where_they_are_allowed(store: Store) -> None:
    def machine(accuracy: str) -> Machine:
        lossy = Costed("sage_attn", None, lambda: 1.5, accuracy="quantized")  # type: ignore[arg-type]
        return Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.5), accuracy=accuracy, others=[lossy])

    exact = machine("exact")
    exact.run(small_call())
    assert exact.backends["sage_attn"].calls == 0
    allowed = machine("quantized")
    allowed.run(small_call())
    winners = {entry["accuracy"]: entry["winner"] for entry in store.entries()}
    assert winners == {"exact": "sdpa_math", "quantized": "sage_attn"}, "each accuracy has a choice of its own"
    session = machine("quantized").begin()
    slot = session.plan(CallKind(small_call().request(exact_only=True), "self", "self"))
    assert slot.plan.is_trial
    assert {*slot.plan._contest.candidate_times} == {INCUMBENT, "sdpa_math"}


@pytest.mark.parametrize(
    ("accuracy", "ms", "others", "winner"),
    [
        ("exact", 4, {}, INCUMBENT),
        ("quantized", 4, {}, INCUMBENT),
        ("sparse", 4, {}, "sparse"),
        ("sparse", 9.9, {}, INCUMBENT),
        ("sparse", 4, {"faster": 3}, "faster"),
    ],
)
def test_a_sparse_kernel_wins_where_it_is_allowed_and_the_fastest(
    store: Store, accuracy: str, ms: float, others: dict[str, float], winner: str
) -> None:
    sparse = CostedSparse("sparse", lambda: ms)
    costs = steady(**{INCUMBENT: 10, "slower": 12, **others})
    machine = Machine(store, costs, accuracy=accuracy, others=[sparse])
    machine.run(small_call())
    (entry,) = store.entries()
    assert entry["winner"] == winner
    assert bool(sparse.calls) == (accuracy == "sparse")


def test_sparse_methods_are_candidates_of_calls_with_a_grid() -> None:
    router = Router(detect(torch.device("cpu")))
    call = AttentionCall(*(torch.empty(1, 2, 256, 64, device="meta") for _ in range(3)))
    sparse = {name for name, backend in BACKENDS.items() if backend.sparse}

    def found(accuracy: str, grid: TokenGrid | None) -> set[str]:
        names = candidates(router, call.request(grid=grid), INCUMBENT, accuracy, {})
        return sparse & set(names)

    assert found("sparse", TokenGrid(4, 8, 8)) >= {"sparge_attn", "radial_attn", "subblock_attn", "nabla_attn"}
    assert not found("sparse", None)
    assert not found("quantized", TokenGrid(4, 8, 8))


def test_a_sparse_kernel_that_errs_too_much_is_rejected(store: Store) -> None:
    sparse = CostedSparse("sparse", lambda: 2, kernel=lambda call: sdpa(call) * 3)
    machine = Machine(store, steady(**{INCUMBENT: 10}), accuracy="sparse", others=[sparse])
    machine.run(small_call())
    (entry,) = store.entries()
    assert (entry["winner"], list(entry["rejected"]), sparse.calls) == (INCUMBENT, ["sparse"], 1)


def test_calls_that_a_sparse_kernel_computes_whole_are_no_evidence(store: Store) -> None:
    """The dense winner is used at once; later runs try the sparse one, and it wins once it is sparse."""
    sparse = CostedSparse("sparse", lambda: 2, whole=lambda: machine.tuner.steps < 8)
    machine = Machine(store, steady(**{INCUMBENT: 10, "faster": 5}), accuracy="sparse", others=[sparse])
    for run in range(6):
        session = machine.run(small_call(), steps=6)
        (entry,) = store.entries()
        assert (entry["winner"], entry["put_off"], entry["rejected"]) == ("faster", {"sparse": 1}, {})
        assert not sparse.calls
        whole = sum(sum(row.kept.dense.values()) for row in session.run_report.rows.values() if row.kept is not None)
        assert whole <= 6, "once in a step"
        assert run == 0 or ran(session)["faster"] > 170
    session = machine.run(small_call(), steps=20)
    (entry,) = store.entries()
    assert (entry["winner"], entry["put_off"]) == ("sparse", {})
    assert ran(session)["sparse"] > 200


def test_the_chosen_lossy_kernel_is_watched_as_usual(store: Store) -> None:
    lossy = Costed("sage_attn", None, lambda: 1.5, accuracy="quantized")  # type: ignore[arg-type]
    machine = Machine(store, steady(torch_sdpa=3.0), accuracy="quantized", guard="watch", others=[lossy])
    machine.run(small_call())
    session = machine.run(small_call(), blocks=3)
    found: Any = session.run_report.as_dict()["guard"]
    assert [entry["checked"] for entry in found] == [1, 1, 1]


def test_a_bad_lossy_trial_under_enforce_leaves_its_block_free(store: Store, snapshot: SnapshotAssertion) -> None:
    """It is right in its first call, and wrong from the second on: enforce looks at each trial."""
    calls = iter([sdpa])
    lossy = Costed("sage_attn", None, lambda: 1.5, lambda call: next(calls, worse)(call), "quantized")  # type: ignore[arg-type]
    machine = Machine(store, steady(torch_sdpa=3.0), accuracy="quantized", guard="enforce", others=[lossy])
    session = machine.run(small_call(), blocks=3, steps=30)
    guard = session.registered(Guard)
    assert guard is not None
    assert guard.refused == {}
    assert only_entry(store)["rejected"] == snapshot
    assert ran(session) == {INCUMBENT: 89, "sage_attn": 1}


def test_an_incumbent_that_is_not_exact_is_watched_while_it_is_measured(store: Store) -> None:
    lossy = Costed("sage_attn", None, lambda: 3.0, worse, "quantized")  # type: ignore[arg-type]
    machine = Machine(store, steady(torch_sdpa=4.0), accuracy="quantized", guard="enforce", others=[lossy])
    machine.router.priority = machine.router.priority._replace(order=("sage_attn", INCUMBENT))
    session, call = machine.begin(), small_call()
    slot = session.plan(CallKind(call.request(), "self", "self", "blocks.0"))
    assert (slot.plan.decision.backend, slot.plan.is_trial) == ("sage_attn", True)
    for _ in range(30):
        assert torch.equal(session.attention(slot, call), sdpa(call))
    assert ran(session) == {INCUMBENT: 30}
    assert lossy.calls == 1


def test_a_run_that_is_too_short_is_finished_by_later_ones(store: Store) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0))
    states = []
    for _ in range(8):
        session = machine.run(small_call(), blocks=2, steps=3)
        states.append(tuning(session)["state"])
        assert sum(ran(session).values()) == 6
    assert states[0] == "tuning"
    assert states[-1] == "measured"
    assert only_entry(store)["winner"] == "sdpa_math"
    assert session.run_report.notes == {}


def test_the_account_counts_what_ran(store: Store, snapshot: SnapshotAssertion) -> None:
    source = random.Random(2)
    machine = Machine(store, {name: noisy(3 + at, source) for at, name in enumerate((INCUMBENT, *NAMES[:3]))})
    session = machine.run(small_call())
    assert ran(session) == {name: backend.calls for name, backend in machine.backends.items()}
    assert list(session.run_report.notes) == snapshot
    audit: Any = session.run_report.as_dict()["audit"]
    assert [(finding["asked"], finding["source"], finding["verdict"]) for finding in audit] == [
        ("autotune", "node.default", "as asked")
    ]


def test_strict_refuses_nothing(store: Store) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0), strict=True)
    machine.run(small_call())
    assert only_entry(store)["winner"] == "sdpa_math"
    machine.backends["sdpa_math"].most = 4
    session = machine.run(small_call())
    assert ran(session) == {INCUMBENT: 240}


def test_a_winner_that_cannot_run_another_length_of_the_bucket_gives_way(
    store: Store, snapshot: SnapshotAssertion
) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0))
    machine.run(small_call(37))
    machine.backends["sdpa_math"].most = 38
    other = machine.run(small_call(39))  # 37 to 40 are one bucket
    assert len(store.entries()) == 1
    assert ran(other) == {INCUMBENT: 240}
    (said,) = {row.source for row in other.run_report.rows.values()}
    assert said == snapshot
    assert ran(machine.run(small_call(38))) == {"sdpa_math": 240}


def test_what_presets_found_for_a_category_holds_for_its_roles(store: Store) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0))
    machine.run(small_call(), role="joint")
    session = machine.begin()
    slot = session.plan(CallKind(small_call().request(), "flux.single", "joint"))
    assert slot.plan.decision.backend == "sdpa_math"
    assert session.plan(CallKind(small_call().request(), "flux.single", "cross")).plan.is_trial


def test_a_kernel_that_is_new_here_is_tried(store: Store) -> None:
    Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0)).run(small_call())
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0, sdpa_flash=1.5))
    machine.run(small_call())
    assert only_entry(store)["winner"] == "sdpa_flash"


def test_one_kernel_under_two_names_is_tried_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, flash_attn=2.0, flash_attn_2=2.0))
    monkeypatch.setattr(machine.backends["flash_attn"], "kernel_name", lambda request, platform: "flash_attn_2")
    machine.run(small_call())
    assert only_entry(store)["winner"] == "flash_attn"
    assert machine.backends["flash_attn_2"].calls == 0


def test_kernels_that_a_route_avoids_are_no_candidates(
    store: Store, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, flex_attn=2.0, reference=1.1, emulated_int8=1.1))
    monkeypatch.setattr(machine.backends["flex_attn"], "avoid_reasons", lambda request, platform: ["compiles"])
    session = machine.run(small_call())
    assert ran(session) == {INCUMBENT: 240}
    (source,) = {row.source for row in session.run_report.rows.values()}
    assert source == snapshot


def test_nothing_is_tried_where_that_may_not_be(
    store: Store, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert ran(machine.run(small_call(), steps=4)) == {INCUMBENT: 120}
    monkeypatch.undo()
    session = machine.begin()
    machine.tuner.paused = "a recorded run is repeated"
    slot = session.plan(CallKind(small_call().request(), "self", "self"))
    assert slot.plan.decision.source == snapshot
    machine.run(small_call())
    session = machine.begin()
    machine.tuner.paused = "a recorded run is repeated"
    assert session.plan(CallKind(small_call().request(), "self", "self")).plan.decision.backend == "sdpa_math", (
        "what is known counts"
    )


def test_without_a_tuner_measured_is_auto_and_says_so() -> None:
    machine = Machine(Store(Path("nowhere")), steady(torch_sdpa=3.0, sdpa_math=2.0), strict=True)
    session = Session(machine.router, machine.layers)
    slot = session.plan(CallKind(small_call().request(), "self", "self"))
    assert slot.plan.decision.backend == INCUMBENT
    assert list(session.run_report.notes) == [NOTHING_MEASURES]


def test_parts_of_a_mask_are_measured_one_by_one(store: Store) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0))
    session = machine.begin()
    for backend in machine.backends.values():
        backend.varlen, backend.load_varlen = True, lambda platform: sdpa
    call = small_call()
    visible = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    visible[0, ..., 6:], visible[1, ..., :2] = False, False
    whole = AttentionCall(*(torch.cat([tensor, tensor]) for tensor in (call.query, call.key, call.value)), visible)
    mask_plan = inspect(visible, 8)

    def split(session: Session) -> SplitPlan:
        calls = calls_of(session, mask_plan, whole, None)
        slot = plan_sub_calls(
            session, mask_plan, whole, calls, lambda part, *_: session.plan(CallKind(part.request(), "self", "self"))
        )
        return slot.split

    assert split(session).varlen is None
    assert all(slot.plan.is_trial for slot in split(session).slots)
    machine.run(call.changed(key=call.key[:, :, :6], value=call.value[:, :, :6]))
    assert split(machine.begin()).varlen is not None


def test_a_checkpoints_preference_counts_as_over_auto(store: Store) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0))
    session = machine.begin()
    preferred = Choice("sdpa_math", "the checkpoint's own preference")
    slot = session.plan(CallKind(small_call().request(), "self", "self"), preferred=preferred)
    assert (slot.plan.decision.backend, slot.plan.decision.source) == ("sdpa_math", preferred.source)


def test_without_a_clock_of_the_work_nothing_is_tried(store: Store) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0))
    machine.clock.measures_device_time = False
    assert ran(machine.run(small_call())) == {INCUMBENT: 240}
    assert store.entries() == []


@pytest.mark.gpu
def test_on_a_card_real_kernels_are_tried(store: Store) -> None:
    device = torch.device("cuda")
    router = Router(detect(device))
    layers = (AttentionConfig(AttentionSpec("autotune"), source="node"),)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 24, 8192, 128, generator=generator).to(device, torch.bfloat16) for _ in range(3)]
    call = AttentionCall(*tensors)
    for _ in range(10):
        session = observe(Session(router, layers))
        tuner = Tuner(session, store)
        session.register(tuner)
        slot = session.plan(CallKind(call.request(), "self", "self"))
        for _ in range(5):
            tuner.model_call(object())
            for _ in range(40):
                session.attention(slot, call)
        torch.cuda.synchronize()
        tuner.close()
        if store.entries() and not only_entry(store)["put_off"]:
            break
    entry = only_entry(store)
    assert entry["ms"][entry["winner"]] <= min(entry["ms"].values()) * 1.03
    session = observe(Session(router, layers))
    session.register(Tuner(session, store))
    assert session.plan(CallKind(call.request(), "self", "self")).plan.decision.backend == entry["winner"]


def test_on_an_accelerator_kernels_that_keep_all_scores_are_left_out_where_they_are_huge(store: Store) -> None:
    machine = Machine(store, steady(torch_sdpa=3.0, sdpa_math=2.0))
    session = machine.begin()
    large = replace(machine.router.platform, kind="cuda")
    backends = {**machine.router.backends, "sdpa_math": BACKENDS["sdpa_math"]}
    session.router = Router(large, backends, use_probe_results=False)
    request = small_call().request()._replace(q_len=14336, kv_len=14336, num_heads=24)
    assert machine.tuner.candidates(request, INCUMBENT, "exact") == (INCUMBENT,)
    assert machine.tuner.candidates(small_call().request(), INCUMBENT, "exact") == (INCUMBENT, "sdpa_math")
