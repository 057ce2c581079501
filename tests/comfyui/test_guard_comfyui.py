"""In a real ComfyUI: a kernel that goes wrong in one block during a run, and what watch and enforce make of it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from attention_backends.backends.config.timetable import ALWAYS  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.observe.guard import Guard  # noqa: E402
from guarded_runs import LOSSY, Lossy, sdpa  # noqa: E402
from hook_side import (  # noqa: E402
    counts,
    last_run,
    marks_left,
    nodes_module,
    plain_comfyui,
    sampling,
    selected,
    sites,
    wrappers,
)

STEPS = 5
comfy_only = pytest.mark.comfy
Wrong = Callable[[Any, str, int], torch.Tensor]


@pytest.fixture
def wan(monkeypatch: pytest.MonkeyPatch) -> Any:
    plain_comfyui(monkeypatch)
    return tiny_sampling.build("wan")


def sampled(model: Any) -> torch.Tensor:
    return tiny_sampling.sample(model, "wan", steps=STEPS)


def with_kernel(monkeypatch: pytest.MonkeyPatch, wrong: Wrong) -> None:
    """LOSSY computes `wrong(call, block, step)`."""

    def kernel(call: Any) -> torch.Tensor:
        model_call = sites.current_model_call()
        return wrong(call, f"{model_call.role(0, 1, 2).name} {model_call.attention_module.block}", model_call.step)

    router = Router(detect(torch.device("cpu")), {**BACKENDS, LOSSY: Lossy(kernel)})
    monkeypatch.setattr(sampling, "router_for", lambda device: router)


def guarded(model: Any, mode: str) -> Any:
    return nodes_module("hook.patch").set_default(model, LOSSY, accuracy="exact", strict=True, guard=mode)


def nan_from_step_2(call: Any, place: str, step: int) -> torch.Tensor:
    output = sdpa(call)
    if step >= 2 and place == "self blocks.0":  # whose turn is in steps 0 and 4
        output = output.clone()
        output[:, :, 0] = float("nan")
    return output


def zeroed_tail(call: Any, place: str, step: int) -> torch.Tensor:
    output = sdpa(call)
    if place == "self blocks.1":
        output = output.clone()
        output[:, :, -3:] = 0
    return output


@comfy_only
def test_nan_in_one_block_from_step_2_on(
    wan: Any, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    exact = sampled(selected(wan, "torch_sdpa"))
    with_kernel(monkeypatch, nan_from_step_2)
    assert sampled(guarded(wan, "off")).isnan().any()
    assert not any(note.startswith("guard") for note in last_run()["notes"])
    assert sampled(guarded(wan, "watch")).isnan().any()
    (note,) = (note for note in last_run()["notes"] if note.startswith("guard"))
    assert note == snapshot
    assert torch.equal(sampled(guarded(wan, "enforce")), exact)
    run = last_run()
    assert [note for note in run["notes"] if note.startswith("guard")] == snapshot
    ran = counts(run)
    assert ran["self", LOSSY] == 2 * 3
    assert ran["self", "torch_sdpa"] == 2 * (STEPS - 2), "the rerun of one step, and the steps after it"
    assert {finding["verdict"] for finding in run["audit"]} == {"explained"}, "strict does not forbid it"
    assert marks_left(wan.model.diffusion_model) == []


@comfy_only
def test_a_bad_block_is_replaced_and_reported(
    wan: Any, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    with_kernel(monkeypatch, lambda call, place, step: zeroed_tail(call, place if step < 2 else "", step))
    exact_from_step_2 = sampled(guarded(wan, "off"))
    with_kernel(monkeypatch, zeroed_tail)
    assert not torch.equal(sampled(guarded(wan, "watch")), exact_from_step_2)
    watched = last_run()["guard"]
    assert torch.equal(sampled(guarded(wan, "enforce")), exact_from_step_2), "its turn is in step 2"
    run = last_run()
    ran = {(row["role"], row["block"], row["backend"]): row["calls"] for row in run["rows"]}
    assert ran == {
        ("self", "blocks.0", LOSSY): STEPS, ("cross", "blocks.0", LOSSY): STEPS, ("cross", "blocks.1", LOSSY): STEPS,
        ("self", "blocks.1", LOSSY): 2, ("self", "blocks.1", "torch_sdpa"): STEPS - 2,
    }  # fmt: skip
    for found in (watched, run["guard"]):
        assert (found[0]["role"], found[0]["block"], found[0]["alarms"]) == ("self", "blocks.1", 1)
        assert [entry["alarms"] for entry in found] == [1, 0, 0, 0]
    # Four take turns in five steps; under enforce the three others are checked once more after the alarm.
    assert sorted(entry["checked"] for entry in watched) == [1, 1, 1, 2]
    assert sorted(entry["checked"] for entry in run["guard"]) == [1, 2, 2, 3]
    text = nodes_module("report.report").as_text({"run": run})
    lines = [line for line in text.splitlines() if line.startswith("guard: ")]
    assert lines[0] == snapshot
    assert f"guard: self blocks.1, {LOSSY}: relative L2" in text
    assert text.index("guard: self blocks.1") < text.index("guard: self blocks.0")
    assert lines[-1] == snapshot
    limit = watched[0]["relative_l2_limit"]
    assert limit
    assert f" (limit {limit:g}), 1 checked" in text


@comfy_only
def test_exact_kernels_cost_no_check(wan: Any) -> None:
    model = nodes_module("hook.patch").set_default(wan, "torch_sdpa", accuracy="exact", strict=False, guard="enforce")
    plain = sampled(selected(wan, "torch_sdpa"))
    assert torch.equal(sampled(model), plain)
    assert last_run()["guard"] == []


@comfy_only
def test_the_widget(wan: Any) -> None:
    schema = nodes_module("configure.selector").AttentionBackendSelector.define_schema()
    (widget,) = (one for one in schema.inputs if one.id == "guard")
    assert widget.options == ["off", "watch", "enforce"]
    assert widget.default == "watch"
    assert "Not active" not in widget.tooltip


def test_what_a_model_takes_out_of_its_control_is_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's UNet pops the outputs of a ControlNet while it runs; the second run needs them too."""
    guard = Guard("enforce", SimpleNamespace(note=lambda text: False))  # type: ignore[arg-type]
    guard._watched = 1
    taken = []

    def executor(x: Any, t: Any, concat: Any, context: Any, control: Any, options: Any) -> torch.Tensor:
        taken.append(control["output"].pop())
        return torch.full((2,), float("nan") if len(taken) == 1 else 1.0)

    begun: list[Any] = []
    model_call = SimpleNamespace(
        window=ALWAYS, session=SimpleNamespace(guard=guard), begin=lambda options, **_: begun.append(options)
    )
    control = {"output": ["first", "last"], "middle": None}
    output = wrappers._guarded(model_call, {"sigmas": 1}, executor, (0, 0, None, None, control, {}), {})
    assert output.tolist() == [1.0, 1.0]
    assert taken == ["last", "last"]
    assert begun == [{"sigmas": 1}], "the calls of the model are numbered anew"


def test_the_guard_knows_nothing_of_comfyui() -> None:
    for name in ("observe.guard", "observe.guard.rows", "report.findings"):
        module = importlib.import_module(f"attention_backends.backends.{name}")
        assert "import comfy" not in inspect.getsource(module)


@comfy_only
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("sampler", "steps"), [("euler", 2), ("euler", 8), ("heun", 4), ("uni_pc", 4), ("lcm", 20)])
def test_each_step_of_a_real_run_has_checks(
    wan: Any, monkeypatch: pytest.MonkeyPatch, sampler: str, steps: int
) -> None:
    """The sampler's own steps, told without reading a sigma from the device."""
    seen: list[tuple[int, str, str]] = []
    check = Guard.check

    def counted(self: Guard, watch: Any, call: Any, number: int) -> torch.Tensor:
        seen.append((sites.current_model_call().step, *watch.role_and_block))
        return check(self, watch, call, number)

    monkeypatch.setattr(Guard, "check", counted)
    with_kernel(monkeypatch, lambda call, place, step: sdpa(call))
    tiny_sampling.sample(guarded(wan, "watch"), "wan", steps=steps, sampler=sampler)
    assert {step for step, *_ in seen} == set(range(steps))
    places = {(role, f"blocks.{block}") for role in ("self", "cross") for block in (0, 1)}
    assert {tuple(place) for _, *place in seen} == places
    if sampler == "euler":
        assert len(seen) == max(steps, 4)


@comfy_only
@pytest.mark.parametrize("begin", [1, 5, 19])
def test_an_error_that_begins_late_in_a_real_run_is_seen_in_that_step(
    wan: Any, monkeypatch: pytest.MonkeyPatch, begin: int
) -> None:
    exact = tiny_sampling.sample(selected(wan, "torch_sdpa"), "wan", steps=20)
    outputs: list[bool] = []

    def late(call: Any, place: str, step: int) -> torch.Tensor:
        outputs.append(step >= begin)
        return sdpa(call) * (1.5 if step >= begin else 1)

    with_kernel(monkeypatch, late)
    tiny_sampling.sample(guarded(wan, "watch"), "wan", steps=20)
    assert sum(entry["alarms"] for entry in last_run()["guard"]) >= 20 - begin, "one in each step from there on"
    outputs.clear()
    tiny_sampling.sample(guarded(wan, "enforce"), "wan", steps=20)
    assert sum(outputs) <= 4 * 4, "each of four is caught within four steps"
    assert exact.isfinite().all()
