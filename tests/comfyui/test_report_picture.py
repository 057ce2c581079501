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

from attention_backends.devtools.server import Server  # noqa: E402
from hook_side import nodes_module  # noqa: E402
from panel_pictures import keep  # noqa: E402
from picture_texts import LABEL, check_readable, says  # noqa: E402
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


def texts(report: dict[str, Any], remarks: list[str]) -> list[str]:
    """Every text of the picture, with its lines joined."""
    return [" ".join(text.get_text().split()) for text in picture.draw_figure(report, remarks).texts]


def test_blocks_of_one_path_are_one_row(snapshot: SnapshotAssertion) -> None:
    rows = [row(block=f"blocks.{number}", calls=2) for number in range(3)]
    rows += [row(role="cross", reason="sage_attn: not installed", ms=None, calls=9)]
    assert picture.table(rows) == [
        ["cross", "blocks.0", "torch_sdpa", "none", "9", "-", "sage_attn: not installed"],
        ["self", "3 blocks", "torch_sdpa", "none", "6", "4.5", ""],
    ]
    assert picture.subject(report(rows)) == snapshot


def test_what_does_not_fit_is_counted(snapshot: SnapshotAssertion) -> None:
    rows = [row(role=f"role {number}", calls=number) for number in range(picture.MOST_ROWS + 7)]
    remarks = [f"note {number}: costs $1 or $2" for number in range(picture.MOST_REMARKS + 3)]
    found = texts(report(rows), remarks)
    assert [text for text in found if text.startswith("...")] == snapshot
    assert remarks[0] in found
    assert "role 36" in found
    assert "role 6" not in found  # the fewest calls
    tall = picture.draw(report(rows), remarks)
    longer = picture.draw(report(rows * 2 + [row(role=f"more {number}") for number in range(300)]), remarks * 9)
    assert tall.shape == (1, longer.shape[1], 1120, 3)


def test_without_an_account_the_picture_says_why() -> None:
    nothing = {"run": None, "versions": {}}
    assert texts(nothing, ["no account: because"]) == ["Attention Report", "no account: because"]
    drawn = picture.draw(nothing, ["no account: because"])
    assert float(drawn.min()) < 0.5 < float(drawn.max())


def test_it_is_readable_in_a_node() -> None:
    rows = [
        row(role="ltx2.audio_to_video", backend="sage_attn", member="sage_fp8_cuda", mask="key_padding, trimmed"),
        row(role="self", block="single_blocks.37", calls=123456, ms=1234567.8),
        row(role=LABEL, calls=7, reason=f"{LABEL}: package sageattention is not installed, so another one ran " * 2),
        row(role="cross", mask="key_padding", calls=640),
    ]
    found = check_readable(picture.draw_figure(report(rows), ["note: " + "a long remark " * 30, LABEL]))
    assert sum(says([text], LABEL) for text in found) == 3
    assert any(
        text.startswith("torch_sdpa 124103 calls, sage_fp8_cuda 1 call; ") and " did not run as asked" in text
        for text in found
    )


def test_it_is_drawn_where_a_node_takes_it() -> None:
    taken = {"1": {"class_type": "AttentionReport", "inputs": {}}, "2": {"inputs": {"images": ["1", 3]}}}
    assert graph.is_taken(taken, "1", 3)
    assert not graph.is_taken(taken, "1", 2)
    assert not graph.is_taken({**taken, "2": {"inputs": {"images": ["3", 3], "text": "1"}}}, "1", 3)
    assert graph.is_taken(taken, "1.0.0.7", 3)  # made while the graph ran: nobody can know


@pytest.mark.comfy
def test_a_saved_picture_is_that_of_the_report(server: Server, tmp_path: Path) -> None:
    """Also where the node ran before without it: its answer from the cache has no picture."""
    from PIL import Image

    nodes = Graph("")
    model, settings = embedded(nodes)
    model = nodes.selector(model, "cudnn_attn")
    sampled = ksampler(nodes, model, **settings, **{**EMBEDDED, "steps": 3})
    told = nodes.add("AttentionReport", samples=sampled)
    text, data = (nodes.add("PreviewAny", source=output(told, number))[0] for number in (1, 2))
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
