"""The suite of benchmarks: what it makes of its parts' figures, and what it calls slower."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from syrupy.assertion import SnapshotAssertion

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


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


def cells(page: str, figure: str) -> list[str]:
    """What stands before the figure, in the rows of a table that end with it."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    return [name for name, *rest in rows if rest == [figure]]


def test_the_page_and_the_chart_show_every_figure(tmp_path: Path) -> None:
    page = suite.page(RESULTS, [])
    assert cells(page, "2.00 (1.90-2.10)") == ["masks, masks, suffix"]
    assert cells(page, "5.00 (4.00-6.00)") == ["overhead, tiny_wan, ours_minus_stock"]
    assert "Nothing is worse" in page
    assert "- it is slower" in suite.page(RESULTS, ["it is slower"])
    suite.chart(RESULTS, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 3000


MEMORY = {
    "calls": {"no mask": {"ours_bytes": figure(2048, 2048, 2048), "stock_bytes": 1024}},
    "owned": {"no mask": {"owned_bytes": figure(3072, 3072, 3072), "kept_bytes": 4096}},
}


def test_memory_is_compared_too(snapshot: SnapshotAssertion) -> None:
    page = suite.page({**RESULTS, "memory": MEMORY}, [])
    assert [line for line in page.splitlines() if "no mask" in line] == snapshot
    assert page.count("no mask") == 2  # not among the times
    now = {"memory, calls, no mask, ours_bytes": figure(2049, 2049, 2049)}
    assert suite.worse(now, suite.figures({"memory": MEMORY})) == snapshot


def test_figures_are_compared_with_the_committed_ones(tmp_path: Path) -> None:
    """What an earlier try left on disk is no yardstick; without git or a commit it is all there is."""
    path = tmp_path / "suite.json"
    assert suite.committed(path) == {}
    path.write_text('{"machine": "first"}')
    assert suite.committed(path) == {"machine": "first"}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert suite.committed(path) == {"machine": "first"}
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    path.write_text('{"machine": "second"}')
    assert suite.committed(path) == {"machine": "first"}


def test_worse_results_do_not_take_the_place_of_better_ones(tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    path.write_text("old")
    assert suite.write(RESULTS, ["it is slower"], accept=False, path=path).name == "suite.new.json"
    assert path.read_text() == "old"
    assert {found.name for found in tmp_path.iterdir()} == {
        "suite.json", "suite.new.json", "suite.new.md", "suite.new.png",
    }  # fmt: skip
    assert suite.write(RESULTS, ["it is slower"], accept=True, path=path) == path
    assert {found.name for found in tmp_path.iterdir()} == {"suite.json", "suite.md", "suite.png"}
    assert "it is slower" in (tmp_path / "suite.md").read_text()


def test_the_end_says_what_became_of_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suite, "RESULTS", tmp_path / "suite.json")
    monkeypatch.setattr(suite, "run", lambda part: {"machine": "a", "torch": "b", "x": {"faster": figure(1, 1, 1)}})
    monkeypatch.setattr(suite, "committed", lambda: {"masks": {"x": {"faster": figure(2, 2, 2)}}})
    written: list[bool] = []
    monkeypatch.setattr(suite, "write", lambda *args: written.append(args[2]) or tmp_path)
    assert (suite.main([]), suite.main(["--accept"])) == (1, 0)
    assert written == [False, True]


def test_the_memory_of_our_path_is_that_of_the_kernel() -> None:
    """At a small size: nothing on top where no key is copied, and two kept halves of keys and values where some are."""
    memory = script("memory")
    found = memory.measure(256)
    for name, figures in found["calls"].items():
        copied = 2 * 128 * 8 * 64 * 4 if name.startswith("gap") else 0
        assert abs(figures["ours_bytes"]["median"] - figures["stock_bytes"] - copied) < 40_000, name
    assert found["declared"]["sdpa_math"]["measured_bytes"]["median"] > 2 * 8 * 512 * 512 * 4
    owned = found["owned"]["no mask"]
    assert owned["kept_bytes"] - owned["owned_bytes"]["median"] > 256 * 8 * 64 * 4  # more than one of the tensors


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
