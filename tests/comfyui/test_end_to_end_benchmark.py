"""The end-to-end benchmark against a real server: times where a backend computed every call, reasons elsewhere."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from attention_backends.devtools.server import Server
from make_workflows import API_FORM
from server_harness import ROOT
from syrupy.assertion import SnapshotAssertion

pytestmark = pytest.mark.comfy


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("end_to_end", ROOT / "benchmarks" / "end_to_end.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


end_to_end = _script()


def test_a_model_that_is_there_is_timed_and_a_fallback_is_not(
    server: Server, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    graph = json.loads((API_FORM / "compare_sdpa_cudnn_sage.json").read_text(encoding="utf-8"))
    for node in graph.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 2
    embedded = tmp_path / "compare_sdpa_cudnn_sage.json"
    embedded.write_text(json.dumps(graph), encoding="utf-8")
    arguments = ["--server", server.url, "--models", f"{embedded},qwen_image", "--repeat", "2",
                 "--output", str(tmp_path)]  # fmt: skip
    assert end_to_end.main(arguments) == 0
    results = json.loads((tmp_path / "end-to-end.json").read_text(encoding="utf-8"))["results"]
    cells = results["sdpa_cudnn_sage"]
    assert list(cells) == ["torch_sdpa", "cudnn_attn", "flashinfer_attn", "comfy"]
    for backend in ("torch_sdpa", "comfy"):
        assert cells[backend]["ran"] == [backend]
        assert cells[backend]["runs"] == 2
        assert 0 < cells[backend]["least"] <= cells[backend]["seconds"] <= cells[backend]["most"]
    assert cells["cudnn_attn"] == snapshot
    why, device, _ = cells["flashinfer_attn"]["why"].partition(" (this is a CPU)")  # it may not be installed either
    assert device
    assert why == snapshot
    missing = {cell["why"] for cell in results["qwen_image"].values()}
    assert missing == snapshot
    page = (tmp_path / "end-to-end.md").read_text(encoding="utf-8")
    assert "| sdpa_cudnn_sage |" in page
    assert why.rpartition(": ")[2] + device in page


@pytest.mark.parametrize("family", end_to_end.FAMILIES)
def test_one_branch_of_each_family_is_whole(family: str) -> None:
    graph = json.loads((end_to_end.GRAPHS / f"{family}.json").read_text(encoding="utf-8"))
    branch = end_to_end.one_branch(graph, "flashinfer_attn", 7)
    links = [link[0] for node in branch.values() for link in node["inputs"].values() if isinstance(link, list)]
    assert set(links) <= set(branch)
    selectors = [node for node in branch.values() if node["class_type"] == "AttentionBackendSelector"]
    assert {node["inputs"]["backend"] for node in selectors} == {"flashinfer_attn"}
    assert len(selectors) == (2 if family == "wan22_14b" else 1)
    seeds = {node["inputs"].get("seed", node["inputs"].get("noise_seed")) for node in branch.values()} - {None}
    assert seeds == {7}
