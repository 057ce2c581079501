"""What is recommended by model family, through a real server: graphs without the input, the route, and the line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attention_backends.backends.observe.advisories import ADVISORIES
from attention_backends.devtools.server import Server
from browser import open_comfyui, why_no_browser
from server_harness import start_server
from syrupy.assertion import SnapshotAssertion
from test_server_families import NODES, branch
from test_web import words

pytestmark = pytest.mark.comfy
OFFER = "recommended for LTX: cross-attention exact ("
LINE = "[data-testid=attention_backends_line]"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with start_server(
        extra_nodes=[NODES], environ={"ATTENTION_BACKENDS_TESTS": str(Path(__file__).parents[1])}
    ) as running:
        yield running


def graph(path: Path, **more: Any) -> dict[str, Any]:
    """A tiny LTX through a selector; without `more` as a graph from before the input was there."""
    said = {"backend": "emulated_int8", "accuracy": "exact", "strict": False, "guard": "off", **more}
    return {
        "tiny": {"class_type": "TinyModel", "inputs": {"family": "ltxv"}},
        "ours": {"class_type": "AttentionBackendSelector", "inputs": {"model": ["tiny", 0], **said}},
        **branch(("ours", 0), "ltxv", path),
    }


def ran(server: Server) -> dict[str, tuple[str, str]]:
    rows = server.get("/attention_backends/last_run")["runs"][0]["rows"]
    return {row["role"]: (row["backend"], row["source"].partition(":")[0]) for row in rows}


def test_a_graph_without_the_input_runs_as_before(server: Server, tmp_path: Path) -> None:
    server.run(graph(tmp_path / "old.pt"))
    assert set(ran(server).values()) == {("emulated_int8", "node.default")}
    (offer,) = server.get("/attention_backends/runs")["runs"][0]["offers"]
    assert offer.startswith(OFFER)
    assert offer in server.get("/attention_backends/last_run")["runs"][0]["notes"]

    server.run(graph(tmp_path / "on.pt", recommended=True))
    assert ran(server) == {
        "self": ("emulated_int8", "node.default"),
        "cross": ("torch_sdpa", "recommended for LTX"),
    }
    assert server.get("/attention_backends/runs")["runs"][0]["offers"] == []


def test_the_input_and_the_route(server: Server) -> None:
    node = server.get("/object_info/AttentionBackendSelector")["AttentionBackendSelector"]
    assert list(node["input"]["required"]) == ["model", "backend", "accuracy", "strict", "guard"]
    assert list(node["input"]["optional"]) == ["recommended", "model_2", "extra"]
    rows = server.get("/attention_backends/recommended")["recommended"]
    assert [row["families"] for row in rows] == [list(row.families) for row in ADVISORIES]
    wan = next(row for row in rows if row["families"] == ["wan"])
    assert (wan["where"], wan["backends"], wan["evidence"]) == (
        {"steps": "first 1,last 1"},
        ["sage_attn_3"],
        "reported",
    )
    assert all(row["reason"] and row["source"] for row in rows)
    assert server.get("/attention_backends/settings")["defaults"]["recommended"] is False


@pytest.mark.browser
@pytest.mark.skipif(why_no_browser() is not None, reason=f"browser: {why_no_browser()}")
def test_the_line_on_the_node_offers_it(server: Server, tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    with open_comfyui(server.url) as page:
        off = graph(tmp_path / "line.pt", guard="watch", recommended=False)  # new nodes have it on
        page.evaluate("(graph) => window.app.loadApiJson(graph, 'tiny')", off)
        page.wait_for_timeout(500)
        widgets = (
            "() => window.app.graph.nodes.find((n) => n.type === 'AttentionBackendSelector').widgets"
            ".filter((w) => w.serialize !== false).map((w) => [w.name, w.value])"
        )
        assert page.evaluate(widgets)[-3:] == [["guard", "watch"], ["recommended", False], ["extra", ""]]
        page.evaluate("async () => { await window.app.queuePrompt(0) }")
        line = page.locator(f"{LINE}[title*='{OFFER}']")
        line.wait_for(timeout=20_000)
        assert line.get_attribute("title").split("\n")[0] == snapshot
        assert words()["line"]["recommended"] in line.inner_text()
        page.evaluate(
            "() => { const node = window.app.graph.nodes.find((n) => n.type === 'AttentionBackendSelector');"
            " node.widgets.find((w) => w.name === 'recommended').value = true }"
        )
        page.evaluate("async () => { await window.app.queuePrompt(0) }")
        page.locator(f"{LINE}[title^='self emulated_int8 4 calls, cross torch_sdpa 4']").wait_for(timeout=20_000)
