"""How much of times a run keeps: the setting, the variable that holds it, what each choice leaves in the account."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from attention_backends.backends import report as trace_module  # noqa: E402
from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.engine.plan import CallKind  # noqa: E402
from attention_backends.backends.report import SAMPLED_EACH, VARIABLE, RunReport, trace_mode  # noqa: E402
from hook_side import (  # noqa: E402
    ENVIRONMENT,
    PLACES,
    comfyui,
    last_run,
    model_call,
    nodes_module,
    selected,
    stand_in,
)
from test_device_clock import Event, Gpu  # noqa: E402

pytestmark = pytest.mark.comfy


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    comfyui()
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that what a test leaves there is taken away again
        monkeypatch.delenv(name)


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Any]:
    made = nodes_module("http.machine_settings").MachineSettings(tmp_path)
    made.apply()
    yield made
    made.change({"trace": "full"})


def sampled_run(steps: int = 4, **options: Any) -> dict[str, Any]:
    """The account, with its timeline, of a tiny Wan that has just been sampled."""
    with torch.inference_mode():
        tiny_sampling.sample(selected(tiny_sampling.build("wan"), "torch_sdpa"), "wan", steps, **options)
    return nodes_module("history.runs").find(last_run()["number"])


def facts(run: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in ("role", "block", "backend", "calls", "mask", "source")) for row in run["rows"]]


def test_the_next_run_obeys_the_setting_and_counts_stay_exact(settings: Any) -> None:
    full = sampled_run(9)
    assert full["trace"] == "full"
    assert all(row["ms"] > 0 and row["timed"] == row["calls"] for row in full["rows"])
    model_calls = full["windows"][-1]["last"]
    assert [window["last"] for window in full["windows"]] == list(range(1, model_calls + 1))

    settings.change({"trace": "sampled"})
    some = sampled_run(9)
    assert facts(some) == facts(full)
    timed = [window["first"] for window in some["windows"] if any(ms is not None for *_, ms in window["cells"])]
    assert timed == list(range(2, model_calls + 1, SAMPLED_EACH))
    assert len(timed) > 1
    for row in some["rows"]:
        assert row["timed"] == row["calls"] * len(timed) // model_calls
        assert row["ms"] > 0

    settings.change({"trace": "off"})
    none = sampled_run(9)
    assert facts(none) == facts(full)
    assert none["windows"] == []
    assert all(row["ms"] is None and row["timed"] == 0 for row in none["rows"])


def test_off_costs_nothing_nothing_stands_before_the_kernel(settings: Any) -> None:
    from attention_backends.backends.values.request import AttentionRequest

    sampling, override = nodes_module("hook.run"), nodes_module("hook.override").Override
    request = AttentionRequest(1, 8, 64, 64, 64, "float32")
    for mode in ("off", "full"):
        settings.change({"trace": mode})
        session = sampling.Run(override(())).model_call(torch.device("cpu")).session
        slot = session.plan(CallKind(request, "self", "self"))
        bare = session.router.kernel("torch_sdpa")
        assert slot.plan.kernel is bare
        assert (slot.plan.clock is None) == (mode == "off")


def test_each_model_call_has_its_step() -> None:
    one_each = sampled_run(6, sampler="euler")["windows"]
    model_calls = len(one_each)
    assert [window["steps"] for window in one_each] == [[call * 6 // model_calls] * 2 for call in range(model_calls)]
    twice = sampled_run(6, sampler="heun")["windows"]  # its last step has one model call, the others two
    assert len(twice) == model_calls // 6 * 11
    steps = [window["steps"][0] for window in twice][:: model_calls // 6]
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]


class Busy(Event):
    """Every piece of work takes 1.5 ms, and the device does none of it before it is waited for."""

    def record(self, stream: object) -> None:
        super().record(stream)
        self.gpu.now += 1.5


def test_device_times_come_without_waiting_inside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, sampling = Gpu(), nodes_module("hook.run")
    options = {"new_event": lambda: Busy(gpu), "current_stream": lambda device: device}
    clock = trace_module.DeviceClock
    monkeypatch.setattr(trace_module, "DeviceClock", lambda kind: clock(kind, **options))
    live: list[Any] = []

    def wait(device: Any) -> None:
        assert gpu.synchronised == 0, "something waited in the run"
        live.extend(nodes_module("history.runs").find(nodes_module("history.runs").summaries()[0]["number"])["rows"])
        gpu.finish()

    monkeypatch.setattr(sampling, "synchronise", wait)
    run = sampled_run(4)
    assert all(row["ms"] is None and row["calls"] for row in live), "and what was not read yet is not made up"
    assert [row["ms"] for row in run["rows"]] == [1.5 * row["calls"] for row in run["rows"]]
    assert all(row["timed"] == row["calls"] for row in run["rows"])
    assert all(ms == 1.5 * calls for window in run["windows"] for _, calls, ms in window["cells"])
    assert nodes_module("report.report").about_times(run) == ""


@pytest.mark.gpu
def test_on_a_card_every_row_has_its_time() -> None:
    sampling, host = nodes_module("hook.run"), nodes_module("hook.override")
    ours = host.Override((AttentionConfig(default=AttentionSpec("sdpa_math"), source="node"),))
    run = sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    model, tokens = stand_in(["WanModel"], PLACES), torch.randn(1, 512, 32, device="cuda")
    calls = [((tokens, tokens, tokens, 2), {"transformer_options": options})] * 5
    for _ in range(3):
        model_call(model, options, lambda: model.get_submodule("blocks.0.self_attn")(calls), "cuda")
    run.stop_clock()
    run.close()
    (row,) = run.run_report.as_dict()["rows"]
    assert (row["calls"], row["timed"]) == (15, 15)
    assert row["ms"] > 0
    assert sum(ms for window in run.run_report.windows() for *_, ms in window["cells"]) == pytest.approx(
        row["ms"], abs=0.01
    )


def test_a_cancelled_run_keeps_the_times_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, seen = Gpu(), []
    options = {"new_event": lambda: Busy(gpu), "current_stream": lambda device: device}
    clock = trace_module.DeviceClock
    monkeypatch.setattr(trace_module, "DeviceClock", lambda kind: clock(kind, **options))
    ended = RunReport.end_of_model_call

    def cancelled(self: RunReport, *args: Any) -> None:
        ended(self, *args)
        seen.append(self)
        if len(seen) == 2:
            raise InterruptedError
        gpu.finish()

    monkeypatch.setattr(RunReport, "end_of_model_call", cancelled)
    with pytest.raises(InterruptedError):
        sampled_run(4)
    run = nodes_module("history.runs").find(last_run()["number"])
    assert run["state"] == "stopped"
    assert gpu.synchronised == 0
    assert all(row["timed"] < row["calls"] for row in run["rows"])
    assert all(row["ms"] == pytest.approx(1.5 * row["calls"]) for row in run["rows"])
    assert "calls were timed" in nodes_module("report.report").about_times(run)


def test_the_report_says_what_its_times_rest_on(settings: Any, snapshot: SnapshotAssertion) -> None:
    about = nodes_module("report.report").about_times
    assert about(sampled_run(2)) == ""
    settings.change({"trace": "off"})
    assert about(sampled_run(2)) == snapshot
    settings.change({"trace": "sampled"})
    run = sampled_run(9)
    calls, timed = (sum(row[name] for row in run["rows"]) for name in ("calls", "timed"))
    assert about(run).startswith(f"ms: {timed} of {calls} calls were timed")
    assert about({**run, "rows": [{**row, "timed": 0} for row in run["rows"]]}) == snapshot


def test_a_variable_holds_it_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, snapshot: SnapshotAssertion
) -> None:
    MachineSettings = nodes_module("http.machine_settings").MachineSettings

    environ = {VARIABLE: "Sampled"}
    settings = MachineSettings(tmp_path, environ)
    settings.apply()
    assert settings.as_dict()["trace"] == {"value": "sampled", "variable": VARIABLE}
    with pytest.raises(PermissionError) as caught:
        settings.change({"trace": "off"})
    assert str(caught.value) == snapshot
    settings.change({"log_level": ""})
    assert environ == {VARIABLE: "Sampled"}
    assert trace_mode({VARIABLE: "a bit"}) == "full"
    assert next(text for text in caplog.messages if f"{VARIABLE}=" in text) == snapshot

    free: dict[str, str] = {}
    settings = MachineSettings(tmp_path, free)
    settings.change({"trace": "off"})
    assert free[VARIABLE] == "off"
    again: dict[str, str] = {}
    MachineSettings(tmp_path, again).apply()
    assert again[VARIABLE] == "off", "over a restart"
    settings.change({"trace": "full"})
    assert VARIABLE not in free


def test_outside_comfyui_calls_are_timed_in_an_account_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from attention_backends.backends import account, attention

    assert VARIABLE not in os.environ
    tensor = torch.randn(1, 2, 16, 8)
    with account() as kept:
        attention(tensor, tensor, tensor)
    row = kept.as_dict()["rows"][0]
    assert (row["calls"], row["timed"]) == (1, 1)
    assert row["ms"] > 0
