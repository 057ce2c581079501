"""The timeline of a run: nothing is lost in it, it stays short, and it costs next to nothing."""

from __future__ import annotations

from time import perf_counter

import pytest
from attention_backends.backends.timeline import MOST
from attention_backends.backends.trace import Trace


def run(device: str, model_calls: int, rows: int = 4) -> Trace:
    """Each model call runs each row once, and takes 1 ms in it; the first row falls silent after half of them."""
    trace = Trace(device=device)
    made = [trace.row("self", str(block), "torch_sdpa", "default", "none", None, None) for block in range(rows)]
    for call in range(model_calls):
        for number, row in enumerate(made):
            if number or call < model_calls // 2:
                row.calls += 1
                row.nanoseconds += 1_000_000
        trace.end_of_model_call()
    return trace


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("model_calls", [1, 7, MOST, MOST + 1, 1000])
def test_the_windows_add_up_and_follow_one_another(device: str, model_calls: int) -> None:
    trace = run(device, model_calls)
    windows = trace.windows()
    assert len(windows) <= MOST
    edges = [edge for window in windows for edge in (window["first"], window["last"])]
    assert edges[0] == 1
    assert edges[-1] == model_calls
    assert all(second == first + 1 for first, second in zip(edges[1::2], edges[2::2], strict=False))
    rows = trace.as_dict()["rows"]
    counted = [[0, 0.0] for _ in rows]
    for row, calls, milliseconds in (cell for window in windows for cell in window["cells"]):
        counted[row][0] += calls
        counted[row][1] += milliseconds or 0.0
    assert [calls for calls, _ in counted] == [row["calls"] for row in rows]
    if device == "cpu":
        assert [total for _, total in counted] == pytest.approx([row["ms"] for row in rows])


def test_where_times_mean_nothing_equal_model_calls_share_a_window() -> None:
    windows = run("cuda", 1000).windows()
    assert [(window["first"], window["last"]) for window in windows] == [(1, 500), (501, 1000)]
    assert windows[0]["cells"][0] == [0, 500, None]


def test_a_row_that_never_ran_is_counted_by_nobody() -> None:
    trace = Trace(device="cpu")
    trace.row("self", "0", "sage_attn", "default", "none", None, None)  # planned, then its kernel failed
    ran = trace.row("self", "0", "torch_sdpa", "default", "none", "failed", None)
    ran.calls += 1
    trace.end_of_model_call()
    assert trace.as_dict()["rows"][0]["backend"] == "torch_sdpa"
    assert trace.windows()[0]["cells"] == [[0, 1, 0.0]]


def test_it_costs_less_than_a_thousandth_of_a_model_call_of_half_a_second() -> None:
    trace = run("cpu", 1, rows=200)
    best = min(_seconds(trace) for _ in range(20))
    assert best < 0.5e-3


def _seconds(trace: Trace) -> float:
    for row in trace.rows.values():
        row.calls += 1
    start = perf_counter()
    trace.end_of_model_call()
    return perf_counter() - start
