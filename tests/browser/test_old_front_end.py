"""The pack in front ends older and newer than the tests' ComfyUI brings: all works there, and no error is ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attention_backends.devtools.server import Server
from browser import alerts, load_workflow, missing_nodes, open_comfyui, ours, why_no_browser
from front_ends import front_end_or_skip
from panel_pictures import keep
from server_harness import ROOT, start_server
from test_panel import SAVED, open_tab, run_workflow, table, told_run, workflow
from test_settings_panel import ADD, EXPERTS, choose

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.browser,
    pytest.mark.skipif(why_no_browser() is not None, reason=f"browser: {why_no_browser()}"),
]
CASES = [
    pytest.param("1.42.10", False, id="1.42.10-canvas"),  # of ComfyUI 0.18.1, the oldest line that the pack is for
    pytest.param("1.42.10", True, id="1.42.10-nodes_2.0", marks=pytest.mark.slow),
    pytest.param("1.58.1", False, id="1.58.1-canvas", marks=pytest.mark.slow),  # the newest on the package index
    pytest.param("1.58.1", True, id="1.58.1-nodes_2.0", marks=pytest.mark.slow),
    pytest.param("1.28.9", False, id="1.28.9", marks=pytest.mark.slow),
    # Much older ones write widgets that are not to be saved into a workflow: ours too, after the node's own (1.15.13).
    pytest.param("1.17.11", False, id="1.17.11", marks=pytest.mark.slow),
]
BACKEND = "AttentionBackends.NewNodes.Backend"
SHOW_SETTINGS = "async () => { await window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog') }"
TITLES = """(types) => types.map((type) => {
  const node = window.LiteGraph.createNode(type)
  window.app.graph.add(node)
  return node.title
})"""


@pytest.fixture(scope="module")
def old(request: pytest.FixtureRequest) -> Iterator[tuple[str, Server]]:
    folder = front_end_or_skip(request.param)
    with start_server(extra_nodes=(), flags=["--front-end-root", str(folder)]) as server:
        yield request.param, server


def told(page: Any) -> list[str]:
    """What the front end tells the person, but that it is older than its server wants."""
    return [text for text in alerts(page) if "Version Compatibility Warning" not in text]


@pytest.mark.parametrize(("old", "nodes_2"), CASES, indirect=["old"], scope="module")
def test_everything_works_in_it(old: tuple[str, Server], nodes_2: bool, tmp_path: Path) -> None:
    version, server = old
    steps = 5 + nodes_2  # the second time nothing may come from the cache
    nodes = {
        kind: described["display_name"]
        for kind, described in server.get("/object_info").items()
        if described["python_module"].endswith(ROOT.name)
    }
    defaults = {
        kind: [
            rest[0]["default"]
            for group in described["input"].values()
            for _, *rest in group.values()
            if rest and "default" in rest[0]
        ]
        for kind, described in server.get("/object_info").items()
        if kind in nodes
    }
    with open_comfyui(server.url, {"Comfy.VueNodes.Enabled": nodes_2}) as page:
        assert page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__") == version
        assert page.evaluate(TITLES, list(nodes)) == list(nodes.values())

        saved = workflow(steps=steps)
        load_workflow(page, saved)
        assert missing_nodes(page) == []
        kept = [[kind, values or []] for kind, values in json.loads(page.evaluate(SAVED))]
        own = [(node["type"], node.get("widgets_values", [])) for node in saved["nodes"] if "Attention" in node["type"]]
        assert kept == [[kind, [*values, *defaults[kind][len(values) :]]] for kind, values in own]
        calls = 4 * steps
        assert sum(row["calls"] for row in run_workflow(page, server)["rows"]) == 2 * calls
        told_run(page, calls).wait_for(timeout=20_000)
        panel = open_tab(page)
        panel.locator("tbody tr").first.wait_for()
        assert {(row[0], row[2], row[3]) for row in table(panel)} == {
            ("self", "torch_sdpa", str(calls)),
            ("cross", "sdpa_math", str(calls)),
        }
        assert told(page) == []
        page.screenshot(path=keep(tmp_path, f"old_{version}_{nodes_2}.png"))

        page.evaluate(SHOW_SETTINGS)
        dialog = page.get_by_role("dialog")
        dialog.get_by_text("Attention Backends", exact=True).first.click()
        dialog.get_by_text("Backend for role cross").first.wait_for(timeout=10_000)
        assert dialog.get_by_label("Log of this pack").last.input_value() == ""
        page.screenshot(path=keep(tmp_path, f"old_{version}_{nodes_2}_settings.png"))
        choose(page, {BACKEND: "sdpa_math"})
        assert page.evaluate(ADD, "AttentionBackendSelector")[1] == "sdpa_math"
        choose(page, {BACKEND: "auto"})
        found, wanted = page.evaluate(EXPERTS)
        assert found == wanted
        assert ours(page) == []
