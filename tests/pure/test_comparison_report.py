"""Reports: what may be combined, what a row says, and the files that are made of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from attention_backends.comparison.report import CallScore, FrameScore, Report, Row, Spread
from attention_backends.comparison.tables import console, markdown, speed, speed_in_words, spread
from syrupy.assertion import SnapshotAssertion


def spread_of(*values: float) -> Spread:
    made = Spread.of(values)
    assert made is not None
    return made


def report(*rows: Row, **changes: Any) -> Report:
    made = Report(
        "end_to_end", "model", "a red star", 1, 32, 32, 1, 20, 4.0, "euler, simple, shift 8", "float32", "a machine",
        {"torch": "2.13.0", "python": "3.11"}, "compare", list(rows),
    )  # fmt: skip
    return replace(made, **changes)


def reference() -> Row:
    return Row("torch_sdpa", "torch_sdpa", step_ms=spread_of(10, 8, 13), peak_memory=1000, identical=True,
               psnr=math.inf, ssim=1.0, max_difference=0.0)  # fmt: skip


def test_spread_is_median_least_and_most() -> None:
    assert spread_of(3, 1, 10, 2) == Spread(2.5, 1, 10, 4)
    assert Spread.of([]) is None
    assert spread(spread_of(10, 8, 13)) == "10 (8-13)"
    assert spread(spread_of(10)) == "10"
    assert spread(None) == "-"


def test_speed_and_memory_are_against_the_first_row() -> None:
    made = report(reference(), Row("sage_attn", "sage_attn", step_ms=spread_of(5), peak_memory=750))
    made.relate()
    assert [row.speedup for row in made.rows] == [1.0, 2.0]
    assert [row.memory_reduction for row in made.rows] == [None, 0.25]
    assert "0.0 (-25 %)" in console(made)


def test_a_speed_up_that_may_be_chance_is_marked() -> None:
    rows = [Row(name, name, step_ms=spread_of(2), total_ms=spread_of(*times)) for name, times in
            (("torch_sdpa", (9, 10)), ("a", (9.5, 12)), ("b", (6, 7)), ("c", (6,)))]  # fmt: skip
    made = report(*rows)
    made.relate()
    assert [speed(row, made) for row in made.rows] == ["1.00x", "~1.00x", "1.00x", "~1.00x"]
    assert "may be chance" in console(made)
    assert "may be chance" not in console(report(rows[0], rows[2]))


@pytest.mark.parametrize(
    ("steps", "totals", "words"),
    [
        ((5, 4, 6), (), "about 2x faster"),
        ((5, 4, 6), (5, 6), "2x faster"),
        ((7, 6, 9), (), "about 1.4x faster"),
        ((8.5, 7, 20), (), "no clear difference in speed"),  # half of its steps took longer than the other's least
        ((9.8, 9, 11), (), "as fast"),
        ((25, 20, 30), (24, 26), "2.5x slower"),
        ((12, 9, 14), (), "no clear difference in speed"),
    ],
)
def test_a_speed_is_put_into_words_only_where_it_shows(
    steps: tuple[float, ...], totals: tuple[float, ...], words: str
) -> None:
    first = Row("torch_sdpa", step_ms=Spread(10, 8, 13, 5), total_ms=spread_of(10, 11) if totals else None)
    row = Row("x", step_ms=Spread(*steps, 5), total_ms=Spread.of(totals))
    made = report(first, row)
    made.relate()
    assert [speed_in_words(each, made) for each in made.rows] == ["reference", words]


def test_the_name_says_what_really_ran() -> None:
    assert Row("flash_attn", "flash_attn_3").name == "flash_attn -> flash_attn_3"
    assert Row("sage_attn", "torch_sdpa", label="Sage").name == "Sage -> torch_sdpa"
    assert Row("sdpa_math", "sdpa_math").name == "sdpa_math"
    assert Row("cudnn_attn", failed="needs an NVIDIA GPU (this is a CPU)").name == "cudnn_attn"


@pytest.mark.parametrize(
    ("levels", "psnr", "verdict"),
    [(0.5, 60.0, "same to the eye"), (3.0, 50.0, "slightly different"), (200.0, 12.0, "a different picture")],
)
def test_the_verdict_follows_the_numbers(levels: float, psnr: float, verdict: str) -> None:
    assert Row("x", identical=False, max_difference=levels / 255, psnr=psnr).verdict == verdict


def test_json_has_neither_nan_nor_infinity(snapshot: SnapshotAssertion) -> None:
    broken = Row("sol_attn", "sol_attn", broken="NaN in all values", psnr=math.nan, max_difference=math.nan)
    text = report(reference(), broken).to_json()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["rows"][0]["psnr"] is None
    assert found["rows"][0]["identical"] is True
    assert found["rows"][1]["verdict"] == snapshot


def test_markdown_has_machine_versions_command_and_frames() -> None:
    row = reference()
    row.frame_scores = [FrameScore(math.inf, 1.0), FrameScore(31.5, 0.9)]
    text = markdown(report(row, Row("cudnn_attn", failed="device cpu | not in (cuda)"), frames=2, notes=["a note"]))
    for part in ("Machine: a machine", "torch 2.13.0", "    compare", "| 1 | identical, 1.00000 |", "31.5, 0.90000",
                 "device cpu / not in (cuda)", "- a note", "![", "2 frames"):  # fmt: skip
        assert part in text


def test_markdown_of_calls_has_each_call(snapshot: SnapshotAssertion) -> None:
    call = CallScore("cross", "3", "batch 1", spread_of(1.5), 3e-7, 1 - 4e-14)
    first = Row("torch_sdpa", "torch_sdpa", relative_l2=3e-7, cosine=1 - 4e-14, calls=[call])
    text = markdown(report(first, Row("x", "x", relative_l2=0.01, cosine=0.9), mode="attention"))
    assert next(line for line in text.splitlines() if line.startswith("| torch_sdpa | cross ")) == snapshot
    assert next(line for line in text.splitlines() if line.startswith("| x ")) == snapshot


def test_every_text_is_ascii() -> None:
    made = report(reference(), Row("sol_attn", "sol_attn", broken="NaN in all values", psnr=math.nan))
    assert (console(made) + markdown(made)).isascii()


@pytest.mark.parametrize("fallen", ["row", "reference"])
def test_a_row_that_fell_back_shows_no_speed_up_and_neither_does_one_against_such_a_reference(fallen: str) -> None:
    first, second, third = (
        Row(name, step_ms=Spread.of([ms]), total_ms=Spread.of([ms]), peak_memory=100, runs=1)
        for name, ms in (("torch_sdpa", 10.0), ("sage_attn", 5.0), ("sdpa_math", 20.0))
    )
    (second if fallen == "row" else first).fell_back = 1
    made = report(first, second, third)
    made.relate()
    assert second.speedup is None
    assert second.memory_reduction is None
    assert third.speedup == (0.5 if fallen == "row" else None)
    assert "2.00x" not in console(made)
