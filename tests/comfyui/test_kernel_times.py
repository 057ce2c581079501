"""The times in the account are the kernel's own and of every call of it, whatever stands around it or changes it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.engine import call_checks, plan  # noqa: E402
from attention_backends.backends.engine.plan import CallKind  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.measure import device_clock  # noqa: E402
from attention_backends.backends.observe import observe  # noqa: E402
from attention_backends.backends.observe.autotune.store import Store  # noqa: E402
from attention_backends.backends.observe.guard import Guard  # noqa: E402
from attention_backends.backends.report import VARIABLE, RunReport, timed_kernel  # noqa: E402
from attention_calls import as_comfyui_runs  # noqa: E402
from hook_side import Kernel  # noqa: E402
from measured_machines import Machine, noisy, sdpa, small_call  # noqa: E402

SLOW = 10**12
"""Nanoseconds, on a clock that only what is slow here moves."""


def session_with(kernel: Any, guard: str = "off", checks: bool = False) -> Session:
    backends = {**BACKENDS, "emulated_int8": Kernel("emulated_int8", kernel, "quantized")}
    config = AttentionConfig(AttentionSpec("emulated_int8"), accuracy="quantized", guard=guard, source="node")
    router = Router(detect(torch.device("cpu")), backends)
    return observe(Session(router, (config,), RunReport(mode="full"), checks))


def counts(session: Session) -> list[tuple[str, int, int, int]]:
    return [(row.backend, row.calls, row.launches, row.timed) for row in session.run_report.rows.values()]


def run(session: Session, calls: int = 3) -> None:
    with as_comfyui_runs():
        slot = session.plan(CallKind(small_call().request(), "self", "self", "blocks.0"))
        for _ in range(calls):
            session.attention(slot, small_call())


@pytest.mark.parametrize("around", ["guard", "checks"])
def test_what_stands_around_a_kernel_is_not_in_its_time(around: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name = (Guard, "check") if around == "guard" else (call_checks, "check")
    before = getattr(where, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        now[0] += SLOW
        return before(*args, **kwargs)

    now = [0]
    monkeypatch.setattr(where, name, slow)
    for module in (plan, timed_kernel, device_clock):
        monkeypatch.setattr(module, "perf_counter_ns", lambda: now[0])
    session = session_with(sdpa, "watch" if around == "guard" else "off", around == "checks")
    run(session)
    assert now[0] >= SLOW, "the test is about something that was slow"
    assert counts(session) == [("emulated_int8", 3, 3, 3)]
    (row,) = session.run_report.rows.values()
    assert row.nanoseconds == 0


@pytest.mark.parametrize("change", ["the guard", "a failure"])
def test_what_runs_instead_is_timed_too(change: str) -> None:
    def kernel(call: Any) -> torch.Tensor:
        if change == "a failure":
            raise ValueError("as it should")
        return sdpa(call) * 5

    session = session_with(kernel, "enforce" if change == "the guard" else "off")
    run(session)
    assert counts(session)[-1] == ("torch_sdpa", 3, 3, 3)


def test_calls_of_a_race_and_those_after_it_are_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    source = random.Random(0)
    costs = {"torch_sdpa": noisy(10, source), "sdpa_math": noisy(5, source), "sdpa_flash": noisy(30, source)}
    machine = Machine(Store(tmp_path / "measured.json"), costs)
    with as_comfyui_runs():
        session = machine.run(small_call())
    assert machine.plans[0].plan.decision.backend == "sdpa_math", "the race was decided"
    rows = [row for row in session.run_report.rows.values() if row.calls]
    assert sum(row.calls for row in rows) == 8 * 30
    assert [(row.launches, row.timed) for row in rows] == [(row.calls, row.calls) for row in rows]
