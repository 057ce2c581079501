"""The guard: what it catches, that it leaves honest kernels alone, how likely it is to see what is rare."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.engine.plan import CallKind  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.kernels.reference import reference_attention  # noqa: E402
from attention_backends.backends.observe import observe  # noqa: E402
from attention_backends.backends.observe.guard import BUDGETS, VARIABLE, Guard, GuardAlarm, GuardedKernel  # noqa: E402
from attention_backends.backends.observe.guard import rows as guard_rows  # noqa: E402
from attention_backends.backends.observe.guard.turns import period  # noqa: E402
from attention_backends.backends.report import Row, RunReport  # noqa: E402
from attention_backends.backends.report.findings import ROWS, Findings, chance, lines, worst_first  # noqa: E402
from attention_backends.backends.values.platform import Platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall, AttentionRequest  # noqa: E402
from attention_backends.backends.values.tolerance import SPARSE, TOLERANCES, accuracy  # noqa: E402
from attention_calls import as_comfyui_runs, call_for, cast, copied  # noqa: E402
from guarded_runs import (  # noqa: E402
    BLOCKS,
    LOSSY,
    SABOTAGES,
    STEPS,
    Sabotage,
    ToyModel,
    int8,
    sdpa,
    session,
    some_call,
    tensors,
)

ROOT = Path(__file__).resolve().parents[2]
RUNS = 100
sabotages = pytest.mark.parametrize("name", SABOTAGES)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with as_comfyui_runs():
        yield


def run_once(made: Session, call: AttentionCall, block: str = "0") -> torch.Tensor:
    return made.attention(made.plan(CallKind(call.request(), "self", "self", block)), call)


def watch_of(guard: Guard, kernel: Any, accuracy: str = "quantized") -> tuple[GuardedKernel, Row]:
    row = Row("self", "0", LOSSY, "test", "none")
    return guard.watched(kernel, accuracy, row), row


# What it catches


@sabotages
def test_every_sabotage_is_caught_in_every_run(name: str) -> None:
    caught = 0
    for run in range(RUNS):
        kernel, call = SABOTAGES[name](random.Random(run))
        made = session(kernel, "watch", seed=run)
        run_once(made, copied(call))
        caught += made.run_report.as_dict()["guard"][0]["alarms"]
    assert caught == RUNS


@sabotages
def test_enforce_gives_the_exact_result_in_every_run(name: str) -> None:
    for run in range(RUNS if "100,000" not in name else 20):
        kernel, call = SABOTAGES[name](random.Random(run))
        made = session(kernel, "enforce", seed=run)
        given = copied(call)
        output = run_once(made, given)
        assert torch.equal(output, sdpa(call)), run
        assert torch.equal(given.key, call.key)  # and the caller's tensors are what they were


def only_in(block: int, sabotage: Sabotage) -> ToyModel:
    """A model in which this kernel is wrong in one block."""

    def wrong(call: AttentionCall, at: int, step: int) -> torch.Tensor:
        return sabotage.kernel(call) if at == block else sdpa(call)

    return ToyModel(sabotage.call, wrong)


@pytest.mark.parametrize("name", [name for name in SABOTAGES if "100,000" not in name])
def test_with_enforce_a_whole_run_equals_the_exact_one(name: str) -> None:
    for run in range(20):
        model = only_in(run % BLOCKS, SABOTAGES[name](random.Random(run)))
        exact = model.run(session(sdpa, "off"))
        made = session(model.kernel, "enforce", seed=run)
        assert torch.equal(model.run(made), exact), run
        ran = {(row.block, row.backend): row.calls for row in made.run_report.rows.values() if row.calls}
        caught = str(run % BLOCKS)
        assert ran.pop((caught, "torch_sdpa")) == STEPS, "caught in its first call"
        assert set(ran.values()) == {STEPS}, "the other blocks stay"
        account = made.run_report.as_dict()
        assert [entry["block"] for entry in account["guard"] if entry["alarms"]] == [caught]
        assert account["audit"][0]["verdict"] == "explained"


def nan_from(step: int, block: int, call: AttentionCall) -> ToyModel:
    """Right, but for one row of one head of NaN in one block from one step on."""

    def wrong(call: AttentionCall, at: int, now: int) -> torch.Tensor:
        output = sdpa(call)
        if now >= step and at == block:
            output = output.clone()
            output[0, 0, now % output.shape[2]] = float("nan")
        return output

    return ToyModel(call, wrong)


def test_nan_from_step_2_on_is_caught_in_every_run() -> None:
    caught = 0
    for run in range(RUNS):
        model = nan_from(2, run % BLOCKS, some_call(random.Random(run)))
        made = session(model.kernel, "watch", seed=run)
        model.run(made, steps=4)
        caught += any("model call 3 was not finite" in note for note in made.run_report.notes)
    assert caught == RUNS


def test_nan_from_step_2_on_with_enforce_gives_the_exact_result() -> None:
    for run in range(RUNS):
        model = nan_from(2, run % BLOCKS, some_call(random.Random(run)))
        exact = model.run(session(sdpa, "off"), steps=5)
        made = session(model.kernel, "enforce", seed=run)
        assert torch.equal(model.run(made, steps=5), exact), run
        calls = sum(row.calls for row in made.run_report.rows.values() if row.backend == LOSSY)
        again = any("computed again with exact kernels" in note for note in made.run_report.notes)
        # The block whose turn it is is caught itself, and the others stay.
        caught = any(entry["alarms"] for entry in made.run_report.as_dict()["guard"])
        assert caught is not again
        assert calls == (3 * BLOCKS if again else 5 * BLOCKS - 3), "two steps, and the one that was run again"


def test_where_nothing_is_watched_no_output_is_looked_at() -> None:
    guard = Guard("enforce", RunReport(), everything=False)
    bad = torch.tensor([float("nan")])
    assert guard.model_call(object(), lambda: bad, lambda: pytest.fail("computed again")) is bad


@pytest.mark.parametrize("kind", [tuple, list])
def test_an_output_of_several_tensors_is_looked_at(kind: type) -> None:
    made = session(sdpa, "enforce")
    run_once(made, some_call(random.Random(0)))
    good = kind((None, torch.zeros(2), "text", torch.ones(2, dtype=torch.int64)))
    bad = kind((torch.zeros(2), torch.tensor([1.0, float("nan")])))
    guard = made.registered(Guard)
    assert guard is not None
    assert guard.model_call(object(), lambda: good, lambda: bad) is good
    assert guard.model_call(object(), lambda: bad, lambda: good) is good
    assert len(made.run_report.notes) == 1


def test_a_model_that_is_never_finite_is_not_blamed_on_attention(snapshot: SnapshotAssertion) -> None:
    made = session(sdpa, "enforce")
    run_once(made, some_call(random.Random(0)))
    runs, guard = itertools.count(), made.registered(Guard)

    def model() -> torch.Tensor:
        next(runs)
        return torch.full((2, 2), float("inf"))

    for _ in range(3):
        guard.model_call(object(), model, model)
    assert next(runs) == 4, "run again once, not at every step"
    assert made.run_report.notes == snapshot


@pytest.mark.parametrize("head", [0, 5, 23])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_worst_head_is_named_and_stands_beside_the_whole_call(head: int, batch: int) -> None:
    call = AttentionCall(*tensors(random.Random(head), batch, 24, 100, 120, 32))
    right = sdpa(call)
    wrong = right.clone()
    wrong[batch - 1, head] *= 1.2
    guard = Guard("watch", RunReport(), everything=False)
    watch, row = watch_of(guard, lambda call: wrong)
    watch(call)
    found = row.guard
    assert found.head == head
    assert found.relative_l2 == pytest.approx(0.2, rel=1e-3)
    assert 0.1 * 0.2 / (24 * batch) ** 0.5 < found.call_l2 < 3 * 0.2 / (24 * batch) ** 0.5
    data = found.as_dict()
    assert (data["head"], data["call_l2_limit"]) == (head, BUDGETS["quantized"].call_l2)
    said = lines([{"role": "self", "block": "0", "backend": LOSSY, "calls": 1, **data}])[1]
    assert f"; head {head} " in said
    assert f" {found.call_l2:.2g} (limit 0.075)" in said


def test_an_error_of_all_heads_is_seen_that_a_head_may_have_alone() -> None:
    call = AttentionCall(*tensors(random.Random(0), 1, 8, 100, 120, 32))
    for error, alarms in ((0.07, 0), (0.08, 1), (0.095, 1)):
        guard = Guard("watch", RunReport(), everything=False)
        watch, row = watch_of(guard, lambda call, error=error: sdpa(call) * (1 + error))
        watch(call)
        assert row.guard.alarms == alarms, error
        assert not alarms or re.search(rf"^relative L2 {error:.3g} .* > 0\.075", row.guard.first_alarm)


@pytest.mark.parametrize(("heads", "kv_heads", "batch"), [(1, 1, 1), (8, 2, 2), (4, 4, 9)])
def test_the_figures_are_those_of_the_definition(heads: int, kv_heads: int, batch: int) -> None:
    draw = torch.Generator().manual_seed(heads)
    expected, output = (torch.randn(batch, heads, 16, 8, generator=draw) for _ in range(2))
    found = guard_rows.Figures(*guard_rows.compared(output, expected, None, torch.zeros(())).tolist())
    error = (output - expected).square().sum(dim=-1)
    energy = expected.square().sum(dim=-1).mean(dim=-1)
    of_heads = (error.mean(dim=-1) / energy).sqrt()
    assert found.relative_l2 == pytest.approx(float(of_heads.max()), rel=1e-5)
    assert found.head == int(of_heads.amax(dim=0).argmax())
    assert found.call_l2 == pytest.approx(float((output - expected).norm() / expected.norm()), rel=1e-5)
    assert found.row_error == pytest.approx(float((error / energy[..., None]).max().sqrt()), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(output.flatten(2), expected.flatten(2), dim=-1)
    assert found.cosine == pytest.approx(float(cosine.min()), rel=1e-4)


@pytest.mark.parametrize("length", [40, 4096])
def test_a_check_starts_few_operations(length: int) -> None:
    """Counted, since each is a launch on a card; a figure per head is no reason for more of them."""
    call = AttentionCall(*(torch.randn(1, 2, length, 16) for _ in range(3)))
    output = torch.zeros(1, 2, length, 16)
    guard = Guard("watch", RunReport(), everything=False)
    watch, _ = watch_of(guard, lambda call: output)
    started = 0

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal started
            started += 1
            return func(*args, **(kwargs or {}))

    with Counted():
        guard.check(watch, call, 0)
    assert started <= 235, "what it was before the worst head was named"


def test_inputs_that_are_not_finite_are_not_blamed_on_the_kernel() -> None:
    call = some_call(random.Random(0))
    call.value[:, :, 0] = float("nan")
    made = session(int8, "watch")
    run_once(made, call)
    (found,) = made.run_report.as_dict()["guard"]
    assert (found["checked"], found["alarms"]) == (1, 0)


@pytest.mark.parametrize("dropped", [True, False])
def test_the_twin_tells_a_dropped_mask_that_no_budget_would(dropped: bool) -> None:
    """One key of hundreds is hidden: dropping that costs less than the budget, and honest INT8 is not taken for it."""
    for run in range(RUNS):
        source = random.Random(run)
        call = AttentionCall(*tensors(source, 1, 4, 100, source.randint(250, 400), 64))
        call.query *= 0.3  # even weights: each key counts for little
        call.attn_mask = torch.ones(1, 1, 1, call.key.shape[2], dtype=torch.bool)
        call.attn_mask[..., source.randrange(call.key.shape[2])] = False
        guard = Guard("watch", RunReport(), everything=False, seed=run)
        watch, row = watch_of(guard, (lambda call: int8(without_mask(call))) if dropped else int8)
        watch(call)
        assert row.guard.relative_l2 < BUDGETS["quantized"].relative_l2
        assert row.guard.alarms == dropped, row.guard
        assert not dropped or "result without the mask" in row.guard.first_alarm


def without_mask(call: AttentionCall) -> AttentionCall:
    return AttentionCall(call.query, call.key, call.value)


# Honest kernels


def requests(count: int) -> Iterator[AttentionRequest]:
    source = random.Random(0)
    for _ in range(count):
        mask, heads = source.choice(("none", "none", "key_padding", "bool", "bias")), source.choice((1, 2, 4))
        causal = mask == "none" and source.random() < 0.2
        q_len = source.randint(1, 200)
        yield AttentionRequest(
            batch=source.choice((1, 1, 2)),
            num_heads=heads,
            q_len=q_len,
            kv_len=q_len if causal else source.randint(2, 200),
            head_dim=source.choice((16, 32, 64, 128)),
            dtype=source.choice(("float32", "bfloat16", "float16")),
            num_kv_heads=source.choice((0, 1)),
            mask=mask,
            is_causal=causal,
        )


@pytest.mark.parametrize(("kernel", "accuracy", "count"), [(int8, "quantized", 3000), (sdpa, "exact", 1000)])
def test_honest_kernels_give_no_alarm(kernel: Any, accuracy: str, count: int) -> None:
    guard = Guard("watch", RunReport(), everything=True)
    watch, row = watch_of(guard, kernel, accuracy)
    for number, request in enumerate(requests(count)):
        guard.check(watch, call_for(request, seed=number), number)
    assert row.guard.checked == count
    assert row.guard.alarms == 0, row.guard
    assert row.guard.relative_l2 > 0


def test_the_run_is_the_same_to_the_bit_where_nothing_is_wrong() -> None:
    model = ToyModel(some_call(random.Random(1)), lambda call, block, step: int8(call))
    torch.manual_seed(7)
    plain = model.run(session(model.kernel, "off"))
    after = torch.rand(1)
    for mode in ("watch", "enforce"):
        torch.manual_seed(7)
        assert torch.equal(model.run(session(model.kernel, mode)), plain)
        assert torch.equal(torch.rand(1), after), "a seed of the run was touched"


# What is rare


@pytest.mark.parametrize(("row_share", "call_share", "checks"), [(0.02, 1.0, 1), (0.05, 0.3, 2), (0.005, 0.5, 5)])
def test_the_measured_rate_is_the_stated_one(row_share: float, call_share: float, checks: int) -> None:
    source, runs = random.Random(3), 1500
    call = AttentionCall(*(torch.randn(1, 2, 100, 16) for _ in range(3)))
    right = sdpa(call)

    def kernel(call: AttentionCall) -> torch.Tensor:
        if source.random() >= call_share:
            return right
        output = right.clone()
        output[:, :, [row for row in range(100) if source.random() < row_share]] += 3
        return output

    seen = 0
    guard = Guard("watch", RunReport(), everything=False, seed=5)
    for _ in range(runs):
        watch, row = watch_of(guard, kernel)
        for number in range(checks):
            guard.check(watch, call, number)
        seen += row.guard.alarms > 0
    stated = chance(row_share, checks, call_share=call_share)
    assert 0.1 < stated < 0.6
    assert abs(seen / runs - stated) < 4 * (stated * (1 - stated) / runs) ** 0.5


def test_chance_at_its_ends() -> None:
    assert chance(0, 5) == 0
    assert chance(1, 1) == 1
    assert chance(0.01, 1) == pytest.approx(1 - 0.99**ROWS)


# Where it looks


@pytest.mark.parametrize("length", [1, 15, 16, 17, 18, 64, 1000])
def test_rows_are_different_spread_and_hold_the_last(length: int) -> None:
    met = set()
    for seed in range(300):
        rows = guard_rows.spread(length, random.Random(seed))
        assert rows == sorted(set(rows))
        assert len(rows) == min(length, ROWS)
        assert {length - 1, max(length - 2, 0)} <= set(rows)
        met.update(rows)
        if length == 1000:
            assert max(after - before for before, after in itertools.pairwise([0, *rows])) < 2 * 1000 / 14 + 1
    assert length > 64 or met == set(range(length))


def test_a_large_batch_is_looked_at_in_eight_samples() -> None:
    call = AttentionCall(*(torch.randn(50, 1, 20, 8) for _ in range(3)))
    met = set()
    for seed in range(50):
        sampled = guard_rows.SampledRows.draw(call, random.Random(seed))
        met.update(range(50)[sampled.samples])
        assert 7 <= len(range(50)[sampled.samples]) <= 8
    assert met == set(range(50))


@pytest.mark.parametrize("workspace", [guard_rows.WORKSPACE, 4096])
@pytest.mark.parametrize("grouped", [0, 2])
@pytest.mark.parametrize("mask", ["none", "key_padding", "bool", "bias", "causal"])
def test_the_rows_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, mask: str, grouped: int, workspace: int
) -> None:
    monkeypatch.setattr(guard_rows, "WORKSPACE", workspace)
    request = AttentionRequest(2, 4, 300, 300, 32, "bfloat16", grouped, 16, "none" if mask == "causal" else mask)
    call = call_for(request._replace(is_causal=mask == "causal"))
    if mask == "bool":
        call.attn_mask[:, :, -1] = False  # a row without a key
    sampled = guard_rows.SampledRows.draw(call, random.Random(0))
    expected, unmasked_rows = guard_rows.exact_rows(call, sampled)
    wide = cast(call, torch.float64)
    assert (expected - guard_rows.take(reference_attention(wide), sampled.rows)).abs().max() < 1e-5
    assert (unmasked_rows is None) == (mask == "none")
    if unmasked_rows is not None:
        plain = reference_attention(AttentionCall(wide.query, wide.key, wide.value, enable_gqa=True))
        assert (unmasked_rows - guard_rows.take(plain, sampled.rows)).abs().max() < 1e-5


def test_memory_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 16,384 tokens in bfloat16 no tensor of the check is larger than the workspace."""
    call = AttentionCall(*(torch.randn(1, 4, 16384, 64, dtype=torch.bfloat16) for _ in range(3)))
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output._base is None:
                largest = max(largest, output.untyped_storage().nbytes() if output.dtype == torch.float32 else 0)
            return output

    with Sizes():
        guard_rows.exact_rows(call, guard_rows.SampledRows.draw(call, random.Random(0)))
    assert 0 < largest <= guard_rows.WORKSPACE


# When it looks


def test_a_call_that_is_checked_was_announced() -> None:
    guard, output = Guard("watch", RunReport(), everything=False), torch.zeros(1, 1, 4, 4)
    call = AttentionCall(*(torch.zeros(1, 1, 4, 4) for _ in range(3)))
    watch, row = watch_of(guard, lambda call: output)
    announced = []
    for _ in range(100):
        before, may = (row.guard.checked if row.guard else 0), watch.may_check
        watch(call)
        announced += [may] if row.guard.checked > before else []
    assert announced
    assert all(announced)


def test_checks_become_rare_and_blocks_take_turns() -> None:
    guard, output = Guard("watch", RunReport(), everything=False), torch.zeros(1, 1, 4, 4)
    call = AttentionCall(*(torch.zeros(1, 1, 4, 4) for _ in range(3)))
    seconds = []
    for _ in range(16):
        watch, row = watch_of(guard, lambda call: output)
        checked = []
        for number in range(200):
            before = row.guard.checked if row.guard else 0
            watch(call)
            checked += [number] if row.guard.checked > before else []
        assert checked[0] == 0
        assert len([number for number in checked if number < 20]) == 2
        assert len(checked) <= 5
        gaps = [later - earlier for earlier, later in itertools.pairwise(checked)]
        assert gaps == [min(gaps[0] << doubled, 128) for doubled in range(len(gaps))]
        seconds.append(checked[1])
    assert sorted(set(seconds)) == list(range(8, 16))


@pytest.mark.parametrize(("everything", "watched"), [(False, {LOSSY}), (True, {LOSSY, "torch_sdpa"})])
def test_exact_kernels_are_watched_only_on_demand(
    monkeypatch: pytest.MonkeyPatch, everything: bool, watched: set[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "all" if everything else "")
    config = AttentionConfig(
        AttentionSpec("torch_sdpa"), per_role={"cross": AttentionSpec("emulated_int8")}, guard="watch"
    )
    guard = observe(Session(Router(Platform("cpu", torch="2.11.0")), (config,))).registered(Guard)
    assert guard.covers("exact") is everything
    assert guard.covers("quantized")
    kernels = session(int8, "watch")
    kernels.observers[:] = [Guard("watch", kernels.run_report)]
    run_once(kernels, some_call(random.Random(0)))
    kernels.layers = (AttentionConfig(AttentionSpec("torch_sdpa"), guard="watch"),)
    run_once(kernels, some_call(random.Random(0)), "1")
    assert {entry["backend"] for entry in kernels.run_report.as_dict()["guard"]} == watched


def test_off_watches_nothing() -> None:
    made = session(int8, "off")
    assert made.registered(Guard) is None
    run_once(made, some_call(random.Random(0)))
    assert made.run_report.as_dict()["guard"] == []


def test_figures_that_wait_on_a_device_are_read_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card: no figure is read inside a step. Here the CPU plays the card."""
    guard = Guard("watch", RunReport(), everything=False)
    monkeypatch.setattr(guard, "_later", lambda read, figures: guard._pending.append((read, figures)))
    watch, row = watch_of(guard, int8)
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(len(tensor)) or tolist(tensor))
    step = object()

    def model() -> torch.Tensor:
        guard.check(watch, some_call(random.Random(0)), 0)
        guard.check(watch, some_call(random.Random(1)), 1)
        return torch.zeros(3)

    for which in (step, step, object()):
        guard.model_call(which, model, model)
    figures = len(guard_rows.Figures._fields)
    assert reads == [2 * (2 * figures + 1)], "two model calls of one step, read when the next one began"
    guard.flush()
    assert row.guard.checked == 6


# What it says


def test_a_refused_block_stays_refused_for_another_kind_of_call() -> None:
    kernel, call = SABOTAGES["tail rows zeroed"](random.Random(0))
    made = session(kernel, "enforce")
    run_once(made, call)
    other = some_call(random.Random(5))
    assert torch.equal(run_once(made, other), sdpa(other))
    plan = made.plan(CallKind(other.request(), "self", "self", "1")).plan
    assert plan.decision.backend == LOSSY, "another block has not been caught yet"


def test_an_alarm_is_an_error_only_inside_enforce(snapshot: SnapshotAssertion) -> None:
    kernel, call = SABOTAGES["tail rows zeroed"](random.Random(0))
    guard = Guard("enforce", RunReport(), everything=False)
    watch, _ = watch_of(guard, kernel)
    with pytest.raises(GuardAlarm) as caught:
        watch(call)
    assert str(caught.value).partition(" > ")[2] == snapshot


def test_the_report_lists_the_worst_blocks_first(snapshot: SnapshotAssertion) -> None:
    run_report = RunReport()
    for block, (error, alarms) in enumerate([(0.01, 0), (0.5, 1), (0.03, 0)]):
        row = run_report.row("self", str(block), LOSSY, "test", "none", None, LOSSY)
        row.calls, row.guard = 20, Findings(checked=2, alarms=alarms, first_alarm="relative L2 0.5" if alarms else "")
        row.guard.relative_l2 = error
    found = run_report.as_dict()["guard"]
    assert [entry["block"] for entry in found] == ["1", "2", "0"]
    json.dumps(found)
    text = lines(found)
    assert text[:2] == snapshot
    seen = [f"{chance(1 / one_in, 2):.0%} if 1 row in {one_in:,} is bad" for one_in in (100, 1000)]
    assert text[-1].endswith(", ".join(seen))
    assert lines([]) == []


def test_an_output_of_nan_is_plain_data() -> None:
    made = session(lambda call: sdpa(call) * float("nan"), "watch")
    run_once(made, some_call(random.Random(0)))
    (found,) = worst_first(made.run_report.rows.values())
    assert found["relative_l2"] is None
    assert found["alarms"] == 1
    assert "not finite" in lines([found])[1]
    json.loads(json.dumps(found, allow_nan=False))


def test_budgets_grow_with_the_class() -> None:
    exact, quantized, sparse = (BUDGETS[name] for name in ("exact", "quantized", "sparse"))
    assert exact < quantized < sparse


def test_the_page_says_what_was_measured() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "guard-budget-cpu.json").read_text())
    page = (ROOT / "docs" / "guard.md").read_text(encoding="utf-8")
    assert results["budgets"] == {name: budget._asdict() for name, budget in BUDGETS.items()}
    for name, budget in TOLERANCES.items():
        said = f"| `{name}` | `{accuracy(name)}` | {budget.relative_l2:g} | {budget.row_error:g} |"
        assert said in page
    assert f"| any, skipping work | `sparse` | {SPARSE.relative_l2:g} | {SPARSE.row_error:g} |" in page
    for line in results["errors"]:
        assert f"| {line['relative_l2']:g} | {line['psnr']:.1f} | {line['worst_psnr']:.1f} |" in page
    for name, found in results["kernels"].items():
        assert f"| {name} | {found['relative_l2']:.2g} | {found['row_error']:.2g} |" in page
        if "FP4" not in name:
            assert found["relative_l2"] < BUDGETS[found["accuracy"]].relative_l2
            assert found["row_error"] < BUDGETS[found["accuracy"]].row_error
    sight = json.loads((ROOT / "benchmarks" / "results" / "guard-sight-cpu.json").read_text())
    for name, limits in sight["limits"].items():
        assert limits == pytest.approx({**TOLERANCES[name]._asdict(), "call_l2": TOLERANCES[name].call_l2})
    int8_seen, fp8_seen = (sight["sizes"][f"INT8 scores{more}"] for more in ("", ", FP8 weights and values"))
    for off, seen in int8_seen.items():
        shares = [of[off][where] for of in (int8_seen, fp8_seen) for where in ("one head", "all heads")]
        assert f"| {off} | {' | '.join(f'{share:.0%}' for share in shares)} |" in page
        assert seen["all heads"] >= seen["one head"]
    for steps, run in sight["runs"].items():
        assert f"| {steps} | {run['checks_of_a_block']:.3g} | step {run['all_blocks_worst']} |" in page
        assert run["one_block_worst"] <= run["stated_steps"] == period(int(steps))
    for kind, by_arithmetic in sight["honest"].items():
        for name, found in by_arithmetic.items():
            figures = (found["head_median"], found["head_worst"], found["call_worst"])
            said = f"{' | '.join(f'{figure:.2g}' for figure in figures)} | {found['alarms']:.0%}"
            assert f"| {kind} | {name} | {said} |" in page
            assert found["alarms"] == 0 or kind == "outlier channels"
    for share in (0.2, 0.1, 0.01, 0.001):
        assert f"| {share:.1%} | {chance(share, 1):.0%} | {chance(share, 2):.0%} | {chance(share, 3):.0%} |" in page
    assert results["cost"]["share_of_attention"] < 0.005
