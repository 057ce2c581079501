"""The timeline of a run: nothing is lost in it, it stays short, nothing waits for it, and it costs next to nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_backends.backends.measure.device_clock import DeviceClock
from attention_backends.backends.report import Row, RunReport
from attention_backends.backends.report.kept import of_rows
from attention_backends.backends.report.outcome import RUNNING, Outcome
from attention_backends.backends.report.steps import Steps
from attention_backends.backends.report.timeline import MOST
from attention_backends.backends.values.grid import Kept
from test_device_clock import Gpu

SIGMAS = torch.linspace(1.0, 0.0, 11)
"""Of ten steps."""


def rows_of(run_report: RunReport, rows: int = 4) -> list[Row]:
    return [run_report.row("self", str(block), "torch_sdpa", "default", "none", None, None) for block in range(rows)]


def run(clock: DeviceClock | None, model_calls: int) -> RunReport:
    """Each model call runs each row once, and takes 1 ms in it; the first row falls silent after half of them."""
    run_report = RunReport(mode="full")
    rows = rows_of(run_report)
    for call in range(model_calls):
        for number, row in enumerate(rows):
            if number or call < model_calls // 2:
                row.calls += 1
                row.launches += 1
                if clock is not None:
                    row.add_time(1.0)
        run_report.end_of_model_call(clock)
    run_report.end_of_run()
    return run_report


@pytest.mark.parametrize("kind", ["cpu", "no clock"])
@pytest.mark.parametrize("model_calls", [1, 7, MOST, MOST + 1, 1000])
def test_the_windows_add_up_and_follow_one_another(kind: str, model_calls: int) -> None:
    run_report = run(DeviceClock("cpu") if kind == "cpu" else None, model_calls)
    windows = run_report.windows()
    assert len(windows) <= MOST
    edges = [edge for window in windows for edge in (window["first"], window["last"])]
    assert edges[0] == 1
    assert edges[-1] == model_calls
    assert all(second == first + 1 for first, second in zip(edges[1::2], edges[2::2], strict=False))
    rows = run_report.as_dict()["rows"]
    counted = [[0, 0.0] for _ in rows]
    for row, calls, milliseconds in (cell for window in windows for cell in window["cells"]):
        counted[row][0] += calls
        counted[row][1] += milliseconds or 0.0
    assert [calls for calls, _ in counted] == [row["calls"] for row in rows]
    if kind == "cpu":
        assert [total for _, total in counted] == pytest.approx([row["ms"] for row in rows])
        assert all(row["timed"] == row["calls"] for row in rows)
    else:
        assert all(row["ms"] is None and row["timed"] == 0 for row in rows)


def test_without_times_equal_model_calls_share_a_window() -> None:
    windows = run(None, 60).windows()
    assert [(window["first"], window["last"]) for window in windows] == [(1, 30), (31, 60)]
    assert windows[0]["cells"][0] == [0, 30, None]


def test_a_row_that_never_ran_is_counted_by_nobody() -> None:
    run_report = RunReport(mode="full")
    run_report.row("self", "0", "sage_attn", "default", "none", None, None)  # planned, then its kernel failed
    ran = run_report.row("self", "0", "torch_sdpa", "default", "none", "failed", None)
    ran.calls = ran.launches = 1
    ran.add_time(2.0)
    run_report.end_of_model_call(DeviceClock("cpu"))
    assert run_report.as_dict()["rows"][0]["backend"] == "torch_sdpa"
    assert run_report.windows()[0]["cells"] == [[0, 1, 2.0]]


class Meanwhile:
    """Stands in for a row; whenever it is read, the thread of another device makes a new one."""

    launches = timed = nanoseconds = 0
    kept = None

    def __init__(self, run_report: RunReport) -> None:
        self.run_report = run_report

    @property
    def calls(self) -> int:
        self.run_report.row(
            "self", f"of another device, {len(self.run_report.rows)}", "torch_sdpa", "", "none", None, None
        )
        return 0


def test_another_device_may_make_rows_while_a_model_call_ends() -> None:
    """ComfyUI runs several GPUs in a thread each, and they share the account of the run."""
    run_report = RunReport(mode="full")
    run_report.rows["self", "0", "torch_sdpa", "none", None, ""] = Meanwhile(run_report)
    rows_of(run_report)
    run_report.end_of_model_call(DeviceClock("cpu"))
    assert len(run_report.rows) == 6
    assert run_report.timeline.model_calls == 1


def test_a_sparse_row_says_by_step_what_was_kept_and_gains_against_its_own_dense_steps() -> None:
    """Two dense steps, the first of them cold; then a quarter and an eighth of the pairs. Sums are tensors on a GPU."""
    run_report = RunReport(mode="full")
    row = run_report.row("self", "0", "video_sparse_attn", "default", "none", None, None)
    row.kept = Kept()
    for milliseconds, share in ((900.0, None), (8.0, None), (2.0, 0.25), (2.0, 0.125), (3.0, 0.125)):
        row.calls += 2
        row.launches += 2
        for _ in range(2):
            row.add_time(milliseconds)
            if share is None:
                row.kept.add_dense("the first 2 of 5 steps")
            else:
                row.kept.add(torch.tensor(share), "gather")
        run_report.end_of_model_call(DeviceClock("cpu"))
    assert [window["cells"][0][3] for window in run_report.windows()] == [1.0, 1.0, 0.25, 0.125, 0.125]
    (plain,) = run_report.as_dict()["rows"]
    assert plain["kept"] == pytest.approx(1 / 6, abs=1e-4)
    assert (plain["expected_gain"], plain["measured_gain"]) == (6.0, 4.0)
    (both,) = of_rows([plain, {**plain, "block": "1", "kept": 0.5, "measured_gain": 2.0}])
    assert (both["calls"], both["kept"]) == (20, pytest.approx(1 / 3, abs=1e-4))
    assert (both["expected_gain"], both["measured_gain"]) == (3.0, 2.67)
    assert both["dense"] == {"the first 2 of 5 steps": 8}
    (whole,) = of_rows([{**plain, "kept": None, "measured_gain": None, "dense": {"the first 10 steps": 10}}])
    assert (whole["kept"], whole["expected_gain"], whole["measured_gain"]) == (None, None, None)


def test_while_a_run_goes_on_nobody_waits_for_what_its_device_kept() -> None:
    """A tensor without values stands for one that the GPU has not computed: reading it fails."""
    run_report = RunReport(mode="full")
    row = run_report.row("self", "0", "sparge_attn", "default", "none", None, None)
    row.kept, row.calls, row.launches = Kept(), 1, 1
    row.kept.add(torch.empty((), device="meta"), "gather")
    run_report.end_of_model_call(DeviceClock("cpu"))
    live = replace(run_report, stopped=Outcome(RUNNING))
    (plain,) = live.as_dict()["rows"]
    assert (plain["kept"], plain["expected_gain"], plain["measured_gain"]) == (None, None, None)
    assert live.windows()[0]["cells"] == [[0, 1, None]]
    with pytest.raises((RuntimeError, NotImplementedError)):
        run_report.as_dict()


def test_times_that_come_late_belong_to_the_model_call_whose_work_they_are_of() -> None:
    """Each model call takes 1 ms more than the one before; the device is two of them behind, then comes to rest."""
    gpu, run_report = Gpu(), RunReport(mode="full")
    clock = gpu.clock()
    run_report.clocks.append(clock)
    row = rows_of(run_report, 1)[0]
    for number in range(1, 6):
        token = clock.start()
        gpu.work(number)
        clock.stop(token, row.add_time)
        row.calls += 1
        row.launches += 1
        gpu.done = sum(range(number - 1))
        run_report.end_of_model_call(clock)
    assert gpu.synchronised == 0
    assert [window["cells"][0][2] for window in run_report.windows()] == [1.0, 2.0, 3.0, None]
    assert run_report.windows()[-1]["cells"] == [[0, 2, None]], "two whose times are under way"
    assert run_report.as_dict()["rows"][0]["timed"] == 3
    run_report.end_of_run()
    assert [window["cells"] for window in run_report.windows()] == [[[0, 1, float(number)]] for number in range(1, 6)]
    assert run_report.as_dict()["rows"][0]["ms"] == 15.0


def test_a_row_of_which_some_calls_were_timed_says_how_many() -> None:
    run_report = RunReport(mode="full")
    row = rows_of(run_report, 1)[0]
    row.calls, row.launches = 30, 60  # a mask divides each call into two
    for _ in range(20):
        row.add_time(1.5)
    told = run_report.as_dict()["rows"][0]
    assert (told["timed"], told["ms"]) == (10, 90.0)


def test_each_window_has_its_steps() -> None:
    """A sampler that calls the model twice per step, the second time between two sigmas."""
    run_report = RunReport(mode="full")
    row = rows_of(run_report, 1)[0]
    for step in range(10):
        for sigma in (SIGMAS[step], (SIGMAS[step] + SIGMAS[step + 1]) / 2):
            row.calls += 1
            row.launches += 1
            row.add_time(1.0)
            run_report.end_of_model_call(DeviceClock("cpu"), None, sigma.repeat(2), SIGMAS)
    windows = run_report.windows()
    assert [window["steps"] for window in windows] == [[step, step] for step in range(10) for _ in range(2)]
    run_report.end_of_model_call(DeviceClock("cpu"))  # and a model call outside any sampler
    assert run_report.windows()[-1]["steps"] is None


def test_long_windows_have_more_than_one_step() -> None:
    run_report = RunReport(mode="full")
    row = rows_of(run_report, 1)[0]
    schedule = torch.linspace(1.0, 0.0, 201)
    for sigma in schedule[:-1]:
        row.calls += 1
        row.launches += 1
        row.add_time(1.0)  # else they would become one window
        run_report.end_of_model_call(DeviceClock("cpu"), None, sigma[None], schedule)
    steps = [step for window in run_report.windows() for step in window["steps"]]
    assert (steps[0], steps[-1]) == (0, 199)
    assert steps[2::2] == [step + 1 for step in steps[1:-1:2]]


@pytest.mark.parametrize("sigma", [[1.0], SIGMAS[:1]])
def test_a_step_that_cannot_be_told_costs_no_run(sigma: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(values: torch.Tensor) -> list[float]:
        raise RuntimeError("pinned memory" if isinstance(values, torch.Tensor) else "not a tensor")

    if isinstance(sigma, torch.Tensor):
        monkeypatch.setitem(Steps.add.__globals__, "on_host", no_memory)
    run_report = RunReport()
    run_report.end_of_model_call(None, None, sigma, SIGMAS)
    assert run_report.timeline.model_calls == 1
    assert run_report.timeline.steps.between(1, 1) is None


def test_a_sigma_that_cannot_be_copied_ahead_is_not_read_inside_a_run() -> None:
    steps, elsewhere = Steps(), SIGMAS.to("meta")  # reading it raises, as waiting would be wrong
    steps.add(1, elsewhere[:1], elsewhere)
    steps.settle(1)
    assert steps.between(1, 1) is None
    assert len(steps._waiting) == 1


@pytest.mark.gpu
def test_on_a_card_sigmas_are_read_without_waiting() -> None:
    """The last sigma is given while much work waits before it; its step is known when the work is done."""
    run_report = RunReport(mode="full")
    clock = run_report.new_clock("cuda")
    schedule, matrix = SIGMAS.to(device="cuda"), torch.randn(4096, 4096, device="cuda")
    row = rows_of(run_report, 1)[0]
    torch.cuda.synchronize()
    with torch.inference_mode():
        for step in range(10):
            token = clock.start(matrix.device)
            for _ in range(20):
                matrix @ matrix
            clock.stop(token, row.add_time)
            row.calls += 1
            row.launches += 1
            run_report.end_of_model_call(clock, matrix.device, schedule[step] * torch.ones(2, device="cuda"), schedule)
        assert run_report.windows()[-1]["steps"] != [9, 9], "it waited"
        torch.cuda.synchronize()
    run_report.end_of_run()
    assert [window["steps"] for window in run_report.windows()] == [[step, step] for step in range(10)]
    assert all(window["cells"][0][2] > 0 for window in run_report.windows())


def test_the_end_of_a_model_call_makes_no_call_for_each_row() -> None:
    """Calls and not seconds; what they take is in benchmarks/."""
    run_report = RunReport(mode="full")
    rows, clock = rows_of(run_report, 200), DeviceClock("cpu")
    for row in rows:
        row.calls += 1
        row.launches += 1
        row.add_time(1.0)
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        run_report.end_of_model_call(clock, None, SIGMAS[:2], SIGMAS)
    finally:
        sys.setprofile(None)
    assert calls < len(rows) / 4
