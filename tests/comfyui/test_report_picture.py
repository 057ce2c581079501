"""The Attention Report's table as an image: what is in it, what is left out, and when it is drawn at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from hook_side import nodes_module  # noqa: E402
from panel_pictures import keep  # noqa: E402
from server_harness import start_server  # noqa: E402
from workflow_graphs import EMBEDDED, Graph, embedded, ksampler, output  # noqa: E402

picture, graph = nodes_module("report.report_picture"), nodes_module("history.graph")


def row(**changes: Any) -> dict[str, Any]:
    return {
        "role": "self", "block": "blocks.0", "backend": "torch_sdpa", "member": None, "calls": 1, "ms": 1.5,
        "mask": "none", "asked": None, "source": "default", "reason": None, **changes,
    }  # fmt: skip


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    run = {"rows": rows, "model": "WAN21", "steps": 4, "seconds": 1.25, "audit": [], "notes": []}
    return {"run": run, "versions": {"device": "a card", "torch": "2.9"}}


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is drawn from now on."""
    from matplotlib.figure import Figure

    found: list[str] = []
    text = Figure.text

    def noting(self: Any, x: float, y: float, s: str, **more: Any) -> Any:
        found.append(s)
        return text(self, x, y, s, **more)

    monkeypatch.setattr(Figure, "text", noting)
    return found


def test_blocks_of_one_path_are_one_row(snapshot: SnapshotAssertion) -> None:
    rows = [row(block=f"blocks.{number}", calls=2) for number in range(3)]
    rows += [row(role="cross", reason="sage_attn: not installed", ms=None, calls=9)]
    assert picture.table(rows) == [
        ["cross", "blocks.0", "torch_sdpa", "none", "9", "-", "sage_attn: not installed"],
        ["self", "3 blocks", "torch_sdpa", "none", "6", "4.5", ""],
    ]
    assert picture.subject(report(rows)) == snapshot


def test_what_does_not_fit_is_counted(monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion) -> None:
    texts = written(monkeypatch)
    rows = [row(role=f"role {number}", calls=number) for number in range(picture.MOST_ROWS + 7)]
    remarks = [f"note {number}: costs $1 or $2" for number in range(picture.MOST_REMARKS + 3)]
    tall = picture.draw(report(rows), remarks)
    assert [text for text in texts if text.startswith("...")] == snapshot
    assert remarks[0] in texts
    assert "role 36" in texts
    assert "role 6" not in texts  # the fewest calls
    longer = picture.draw(report(rows * 2 + [row(role=f"more {number}") for number in range(300)]), remarks * 9)
    assert longer.shape == tall.shape
    assert tall.shape[0] == 1
    assert tall.shape[-1] == 3
    assert tall.shape[2] > 1000


def test_without_an_account_the_picture_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = written(monkeypatch)
    drawn = picture.draw({"run": None, "versions": {}}, ["no account: because"])
    assert texts == ["Attention Report", "", "no account: because"]
    assert float(drawn.min()) < 0.5 < float(drawn.max())


def test_it_is_drawn_where_a_node_takes_it() -> None:
    taken = {"1": {"class_type": "AttentionReport", "inputs": {}}, "2": {"inputs": {"images": ["1", 3]}}}
    assert graph.is_taken(taken, "1", 3)
    assert not graph.is_taken(taken, "1", 2)
    assert not graph.is_taken({**taken, "2": {"inputs": {"images": ["3", 3], "text": "1"}}}, "1", 3)
    assert graph.is_taken(taken, "1.0.0.7", 3)  # made while the graph ran: nobody can know


@pytest.mark.comfy
def test_a_saved_picture_is_that_of_the_report(tmp_path: Path) -> None:
    """Also where the node ran before without it: its answer from the cache has no picture."""
    from PIL import Image

    nodes = Graph("")
    model, settings = embedded(nodes)
    model = nodes.selector(model, "cudnn_attn")
    sampled = ksampler(nodes, model, **settings, **{**EMBEDDED, "steps": 3})
    told = nodes.add("AttentionReport", samples=sampled)
    text, data = (nodes.add("PreviewAny", source=output(told, number))[0] for number in (1, 2))
    with start_server(extra_nodes=()) as server:
        before = server.run(nodes.nodes)["outputs"][data]["text"][0]
        number = server.get("/attention_backends/runs")["runs"][0]["number"]
        nodes.add("SaveImage", images=output(told, 3), filename_prefix="report")
        outputs = server.run(nodes.nodes)["outputs"]
        assert server.get("/attention_backends/runs")["runs"][0]["number"] == number  # the sampler came from the cache
        saved = keep(tmp_path, "report_picture.png")
        shutil.copy(next((server.folder / "output").glob("report*.png")), saved)
    after = json.loads(outputs[data]["text"][0])
    assert after == json.loads(before)
    remarks = [line for line in outputs[text]["text"][0].splitlines() if ":" in line]
    assert len(remarks) > 2
    drawn = (picture.draw(after, remarks)[0] * 255).to(torch.uint8)
    shown = torch.frombuffer(bytearray(Image.open(saved).convert("RGB").tobytes()), dtype=torch.uint8)
    assert float((shown.view(drawn.shape).float() - drawn).abs().mean()) < 1  # levels; other versions may smooth apart
