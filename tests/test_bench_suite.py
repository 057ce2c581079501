"""The suite of benchmarks: what it makes of its parts' figures, and what it calls slower."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


suite = script("suite")


def figure(low: float, median: float, high: float) -> dict[str, float]:
    return {"median": median, "low": low, "high": high}


RESULTS = {
    "machine": "a machine",
    "torch": "2.13.0",
    "masks": {"masks": {"suffix": {"stock_ms": 2.0, "ours_ms": 1.0, "faster": figure(1.9, 2.0, 2.1)}}},
    "overhead": {"tiny_wan": {"ours_minus_stock": figure(4.0, 5.0, 6.0)}},
}


def test_every_figure_is_found_by_its_path() -> None:
    assert suite.figures(RESULTS) == {
        "masks, masks, suffix, faster": figure(1.9, 2.0, 2.1),
        "overhead, tiny_wan, ours_minus_stock": figure(4.0, 5.0, 6.0),
    }


@pytest.mark.parametrize(
    ("name", "now", "before", "is_worse"),
    [
        ("x, faster", figure(1.0, 1.1, 1.2), figure(1.3, 1.4, 1.5), True),
        ("x, faster", figure(1.0, 1.1, 1.35), figure(1.3, 1.4, 1.5), False),
        ("x, faster", figure(1.6, 1.7, 1.8), figure(1.3, 1.4, 1.5), False),
        ("x_us", figure(6, 7, 8), figure(3, 4, 5), True),
        ("x_us", figure(4.5, 7, 8), figure(3, 4, 5), False),
        ("x_us", figure(1, 2, 2.5), figure(3, 4, 5), False),
    ],
)
def test_slower_is_what_lies_wholly_on_the_worse_side(name: str, now: dict, before: dict, is_worse: bool) -> None:
    assert bool(suite.worse({name: now}, {name: before})) is is_worse


def test_the_page_and_the_chart_show_every_figure(tmp_path: Path) -> None:
    page = suite.page(RESULTS, [])
    assert "| masks, masks, suffix | 2.00 (1.90-2.10) |" in page
    assert "| overhead, tiny_wan, ours_minus_stock | 5.00 (4.00-6.00) |" in page
    assert "Nothing is slower" in page
    assert "- it is slower" in suite.page(RESULTS, ["it is slower"])
    suite.chart(RESULTS, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 3000


def test_pairs_are_timed_against_each_other() -> None:
    """A function that does twice the work is about half as fast, whatever the machine does meanwhile."""
    paired = script("paired")
    work = list(range(20_000))
    found = paired.ratios(lambda: (sorted(work), sorted(work)), lambda: sorted(work), 41)
    assert found["faster"]["low"] <= found["faster"]["median"] <= found["faster"]["high"]
    assert 1.3 < found["faster"]["median"] < 3


def test_masks_are_measured_with_the_forms_that_the_readme_names() -> None:
    masks = script("masks")
    found = masks.measure((256,), 3)
    assert {figures["treatment"] for figures in found.values()} == {
        "nothing hidden", "trimmed", "gathered", "passed on", "per block", "causal",
    }  # fmt: skip
    assert all(figures["same"] is True or figures["same"] < 1e-5 for figures in found.values())
