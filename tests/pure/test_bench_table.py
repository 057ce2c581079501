"""README's table of kernel times: it is what benchmarks/results/ says, and nothing is in it that was not measured."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_table", ROOT / "benchmarks" / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = load()


def result(device: str = "cuda", **changed: Any) -> dict[str, Any]:
    rows = [
        {"backend": "torch_sdpa", "status": "ok", "ms": 12.345, "rank": 2},
        {"backend": "cudnn_attn", "status": "ok", "ms": 4.7212, "rank": 1},
        {"backend": "sage_attn", "status": "package sageattention is not installed", "ms": None, "rank": None},
    ]
    return {
        "kind": "attention-backends kernel benchmark", "device": device, "card": "A card sm_90", "dtype": "bfloat16",
        "versions": {"torch": "2.11.0", "cudnn": "91900", "python": "3.12"}, "tokens": 0, "ended": None,
        "protocol": {"timed": 10},
        "cases": [{"name": "hv15, no mask", "rows": rows}, {"name": "hv15, masked", "rows": rows[:1]}], **changed,
    }  # fmt: skip


def test_the_table_in_the_readme_is_not_stale() -> None:
    assert table.main(["--check"]) == 0, "run python benchmarks/table.py"


def test_the_presets_of_a_card_are_in_the_table(tmp_path: Path) -> None:
    one, other = result(), result(cases=[{"name": "flux2, no mask", "rows": result()["cases"][0]["rows"]}])
    results = {"presets": {"results": {"hv15": one, "flux2": other}}}
    for name, parts in (("a-card", results), ("another", {"presets": {"status": "failed"}}), ("third", {})):
        (tmp_path / name).mkdir()
        card = {"kind": "attention-backends card", "parts": parts}
        (tmp_path / name / "card.json").write_text(json.dumps(card), encoding="utf-8")
    (found,) = table.read(tmp_path).items()
    assert found[0] == "a-card/card.json"
    assert [case["name"] for case in found[1]["cases"]] == ["hv15, no mask", "hv15, masked", "flux2, no mask"]
    assert "(benchmarks/results/a-card/card.json)" in table.table(dict([found]))


def test_a_stale_table_is_told_and_then_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    page, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n", encoding="utf-8")
    (results / "bench-card.json").write_text(json.dumps(result()), encoding="utf-8")
    (results / "overhead-cpu.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(table, "README", page)
    monkeypatch.setattr(table, "RESULTS", results)
    assert table.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert "old" in page.read_text(encoding="utf-8")
    assert table.main([]) == 0
    assert table.main(["--check"]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert [line for line in text.splitlines() if line.startswith("|")] == snapshot
    assert "sage_attn" not in text, "what did not run has no column"


def test_without_a_card_the_table_says_so() -> None:
    assert table.table({}) == table.NONE
    with_cpu = table.table({"bench-cpu.json": result("cpu")})
    assert with_cpu.startswith(table.NONE)
    assert "[bench-cpu.json](benchmarks/results/bench-cpu.json)" in with_cpu
    assert "12.3" not in with_cpu


def test_an_early_end_and_scaled_lengths_are_said(snapshot: SnapshotAssertion) -> None:
    text = table.table({"bench-x.json": result(tokens=1024, ended="sage_attn left the GPU unusable")})
    assert [line for line in text.splitlines() if "1024" in line or "sage_attn" in line] == snapshot


def test_missing_markers_and_foreign_files_are_refused(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    for text in ("nothing", table.END + table.BEGIN, f"{table.BEGIN}{table.END}{table.BEGIN}{table.END}"):
        with pytest.raises(ValueError, match="once each"):
            table.filled(text, {})
    (tmp_path / "bench-x.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        table.read(tmp_path)
    assert str(caught.value) == snapshot


def test_every_result_names_its_machine_versions_and_command() -> None:
    for name, data in table.read(table.RESULTS).items():
        assert data["machine"], name
        assert data["versions"]["torch"], name
        assert re.search(r"\bbench\b", data["command"]), name
