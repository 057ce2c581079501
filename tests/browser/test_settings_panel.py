"""The settings panel in the real front end: a person's defaults seed new nodes, and only those."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attention_backends.devtools.server import Server
from browser import load_workflow, open_comfyui, why_no_browser
from make_workflows import ui_file
from panel_pictures import keep
from server_harness import start_server
from test_panel import CANVAS_IS_SLOW, open_tab, ours, run_workflow, workflow
from test_routes_http import changed

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.browser,
    pytest.mark.skipif(why_no_browser() is not None, reason=f"browser: {why_no_browser()}"),
]
CHOSEN = {
    "AttentionBackends.NewNodes.Backend": "torch_sdpa",
    "AttentionBackends.NewNodes.Self": "sdpa_flash",
    "AttentionBackends.NewNodes.Cross": "sdpa_math",
    "AttentionBackends.NewNodes.Accuracy": "quantized",
    "AttentionBackends.NewNodes.Strict": True,
    "AttentionBackends.NewNodes.Guard": "enforce",
    "AttentionBackends.NewNodes.Recommended": False,
}
BACKEND = "AttentionBackends.NewNodes.Backend"
ADD = """(type) => {
  const node = window.LiteGraph.createNode(type)
  window.app.graph.add(node)
  return [node.id, ...node.widgets.filter((widget) => widget.serialize !== false).map((widget) => widget.value)]
}"""
VALUES = "(id) => window.app.graph.getNodeById(id).widgets.filter((w) => w.serialize !== false).map((w) => w.value)"
SHOWN = """(id) => window.app.graph.getNodeById(id).widgets.filter((w) => w.serialize !== false)
  .map((w) => !w.options.advanced)"""
SET_ROLE = """([id, role]) => {
  const widget = window.app.graph.getNodeById(id).widgets[0]
  widget.value = role
  widget.callback?.(role)
}"""
COPY = "(id) => window.app.graph.getNodeById(id).clone().widgets.map((widget) => widget.value)"

SEARCHED = {
    **dict.fromkeys(("sage", "flash", "sdpa", "xformers", "cudnn", "sage attention", "attention backend"), 3),
    "attention": 12,  # what the list shows without scrolling
}
"""What people type into the node search, and among how many answers the selector has to be."""
TOGGLE_SEARCH = "() => window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')"
FORMER_NODES = """async () => {
  const [caption, image] = ['AttentionDemoCaption', 'AttentionDemoImage'].map((type) => {
    const node = window.LiteGraph.createNode(type)
    window.app.graph.add(node)
    return node
  })
  return [caption.widgets[0].value, image.widgets[0].value]
}"""
EXPERTS = """async () => {
  const { app, LiteGraph } = window
  const make = (type) => { const node = LiteGraph.createNode(type); app.graph.add(node); return node }
  const [high, low, first, second] = ['UNETLoader', 'UNETLoader', 'KSampler', 'KSampler'].map(make)
  const type = 'AttentionBackendSelector'
  const ours = app.graph.nodes.find((node) => node.type === type) ?? make(type)
  const slot = (name) => ours.inputs.findIndex((input) => input.name === name)
  high.connect(0, ours, slot('model'))
  low.connect(0, ours, slot('model_2'))
  ours.connect(0, first, 0)
  ours.connect(1, second, 0)
  const taken = async () => {
    const { output } = await app.graphToPrompt()
    return [first, second].map((node) => output[node.id].inputs.model)
  }
  const links = (one, other) => [one, other].map(([node, number]) => [String(node.id), number])
  const on = await taken()
  ours.mode = 4
  const bypassed = await taken()
  ours.mode = 0
  return [[on, bypassed], [links([ours, 0], [ours, 1]), links([high, 0], [low, 0])]]
}"""
"""Two loaders through one selector to two samplers: what each sampler takes, and what it should, also bypassed."""

PLACE_OF_WIDGET = """([id, number]) => {
  const { canvas, graph } = window.app
  const node = graph.getNodeById(id)
  canvas.centerOnNode(node)
  canvas.draw(true, true)
  const [x, y] = canvas.ds.convertOffsetToCanvas([node.pos[0] + 120, node.pos[1] + node.widgets[number].y + 10])
  const { left, top } = canvas.canvas.getBoundingClientRect()
  return [x + left, y + top]
}"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    variables = {"DIFFUSION_ATTENTION_BACKEND": "torch_sdpa"}
    with start_server(extra_nodes=(), environ=variables) as running:
        yield running


def searched(page: Any, words: str) -> list[str]:
    """The answers of the node search, best first."""
    page.evaluate(TOGGLE_SEARCH)
    page.get_by_role("combobox").last.wait_for()
    page.keyboard.type(words)
    answers = page.get_by_role("option")
    answers.filter(has_text=re.compile("attention", re.IGNORECASE)).first.wait_for()
    page.wait_for_timeout(300)
    found: list[str] = answers.all_inner_texts()
    page.keyboard.press("Escape")
    answers.first.wait_for(state="detached")
    return found


def test_the_selector_is_found_and_serves_two_models(server: Server) -> None:
    saved = json.loads(ui_file("per_role").read_text(encoding="utf-8"))
    with open_comfyui(server.url) as page:
        for words, most in SEARCHED.items():
            found = searched(page, words)[:most]
            assert [text for text in found if "Attention Backend Selector" in text], (words, found)
            assert not [text for text in found if text.startswith("Demo")], (words, found)
        assert page.evaluate(FORMER_NODES) == ["a large red circle on the left", 16]  # graphs that have them open
        for workflow_of_ours in (None, saved):  # a new node, and one from before it had a second model
            load_workflow(page, workflow_of_ours or {**saved, "nodes": [], "links": [], "groups": []})
            found, wanted = page.evaluate(EXPERTS)
            assert found == wanted
        number = page.evaluate("() => window.app.graph.nodes.find((n) => n.type === 'AttentionBackendSelector').id")
        page.mouse.click(*page.evaluate(PLACE_OF_WIDGET, [number, 1]))
        page.get_by_text("+ sparse", exact=True).click()  # a choice in words, whose value is that of graphs
        kept = page.evaluate(
            "() => window.app.graph.nodes.find((n) => n.type === 'AttentionBackendSelector').serialize()"
        )
        assert kept["widgets_values"][1] == "sparse"
        assert ours(page) == []


def choose(page: Any, values: dict[str, Any]) -> None:
    page.evaluate(
        "async (values) => { for (const [id, value] of Object.entries(values))"
        " await window.app.extensionManager.setting.set(id, value) }",
        values,
    )


@CANVAS_IS_SLOW
def test_settings_seed_new_nodes_and_no_others(server: Server, nodes_2: bool) -> None:
    saved = json.loads(ui_file("per_role").read_text(encoding="utf-8"))
    groups = server.get("/object_info/AttentionBackendSelector")["AttentionBackendSelector"]["input"]
    inputs = {**groups["required"], **groups["optional"]}
    names = ("backend", "accuracy", "strict", "guard", "recommended")
    backend, *defaults = [inputs[name][1]["default"] for name in names]
    with open_comfyui(server.url, {"Comfy.VueNodes.Enabled": nodes_2}) as page:
        load_workflow(page, saved)
        before, *values = page.evaluate(ADD, "AttentionBackendSelector")
        # Nothing was chosen yet. Exceptions are on in a new node; a graph that says nothing of them has them off.
        assert (defaults[-1], values) == (False, [backend, *defaults[:-1], True, ""])
        assert page.evaluate(SHOWN, before) == [True, *[False] * 5]  # the plain one first
        choose(page, CHOSEN)
        assert page.evaluate(VALUES, before) == values  # it exists: it stays
        _, *values = page.evaluate(ADD, "AttentionBackendSelector")
        assert values == ["torch_sdpa", "quantized", True, "enforce", False, ""]
        choose(page, {BACKEND: "measured"})  # as an older version stored it
        assert page.evaluate(ADD, "AttentionBackendSelector")[1] == "autotune"

        number, *values = page.evaluate(ADD, "PerRoleAttentionConfig")
        assert values == ["self", "sdpa_flash", ""]
        x, y = page.evaluate(PLACE_OF_WIDGET, [number, 0])
        if nodes_2:
            page.wait_for_timeout(500)
            page.locator(f"[data-node-id='{number}'] input[aria-label=role]").click()
        else:
            page.mouse.click(x, y)
        page.wait_for_function("() => document.activeElement?.list?.options.length", timeout=5000)
        offered = page.evaluate("() => [...document.activeElement.list.options].map((one) => one.value)")
        assert offered[:3] == ["self", "cross", "joint"]
        assert "flux.single" in offered
        page.keyboard.press("Escape")
        page.evaluate(SET_ROLE, [number, "cross"])
        assert page.evaluate(VALUES, number) == ["cross", "sdpa_math", ""]
        page.evaluate("(id) => { window.app.graph.getNodeById(id).widgets[1].value = 'xformers' }", number)
        page.evaluate(SET_ROLE, [number, "self"])
        assert page.evaluate(VALUES, number) == ["self", "xformers", ""]  # the person's own choice stays

        load_workflow(page, saved)
        loaded = {node["type"]: node.get("widgets_values") for node in saved["nodes"]}
        for kind in ("AttentionBackendSelector", "PerRoleAttentionConfig"):
            found = page.evaluate(f"() => window.app.graph.nodes.find((n) => n.type === '{kind}').id")
            assert page.evaluate(VALUES, found) == loaded[kind]
        # A graph from before an input was added: that input gets the node's own default.
        old = json.loads(json.dumps(saved))
        next(node for node in old["nodes"] if node["type"] == "AttentionBackendSelector")["widgets_values"] = ["comfy"]
        load_workflow(page, old)
        found = page.evaluate("() => window.app.graph.nodes.find((n) => n.type === 'AttentionBackendSelector').id")
        assert page.evaluate(VALUES, found) == ["comfy", *defaults, ""]
        assert page.evaluate(COPY, found)[:5] == ["comfy", *defaults]
        choose(page, dict(zip(CHOSEN, (backend, "auto", "auto", *defaults[:3], True), strict=True)))
        # A graph in API form makes new nodes: what it does not say is the person's.
        for said, recommended in (({}, True), ({"recommended": False}, False)):
            graph = {"1": {"class_type": "AttentionBackendSelector", "inputs": {"backend": "comfy", **said}}}
            page.evaluate("async (graph) => { await window.app.loadApiJson(graph, 'graph') }", graph)
            assert page.evaluate(VALUES, 1) == ["comfy", *defaults[:-1], recommended, ""]
        assert ours(page) == []


def test_the_panel_shows_the_settings_and_changes_the_machine(server: Server, tmp_path: Path) -> None:
    kept = server.folder / "user" / "attention_backends.json"
    with open_comfyui(server.url) as page:
        page.evaluate("async () => { await window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog') }")
        dialog = page.get_by_role("dialog")
        dialog.wait_for()
        dialog.get_by_text("Attention Backends", exact=True).first.click()
        hub = dialog.get_by_label("Download missing kernels from Hugging Face").last
        hub.wait_for()
        page.wait_for_timeout(500)
        # As large as ComfyUI's own switch, and at the same edge.
        own = dialog.locator("[id='AttentionBackends.NewNodes.Recommended']").bounding_box()
        switch = hub.bounding_box()
        assert abs(own["x"] + own["width"] - switch["x"] - switch["width"]) <= 4
        assert abs(own["width"] - switch["width"]) + abs(own["height"] - switch["height"]) <= 8
        page.screenshot(path=keep(tmp_path, "settings.png"))
        words = dialog.inner_text()
        wanted = ("Backend for role cross", "Strict", "Guard", "Exceptions for this model", "What auto may use")
        for text in (*wanted, "lossless only", "DIFFUSION_ATTENTION_BACKEND=torch_sdpa"):
            assert text in words
        hub.check()
        level = dialog.get_by_label("Log of this pack").last
        level.select_option("DEBUG")
        page.wait_for_timeout(500)
        assert json.loads(kept.read_text(encoding="utf-8")) == {"hub": True, "log_level": "DEBUG", "trace": "full"}
        assert server.get("/attention_backends/machine?backend=torch_sdpa")["platform"]["hub"] is True
        hub.uncheck()
        page.wait_for_timeout(500)
        assert server.get("/attention_backends/machine?backend=torch_sdpa")["platform"]["hub"] is False
        assert ours(page) == []


@CANVAS_IS_SLOW
def test_a_changed_setting_holds_for_the_next_run(server: Server, nodes_2: bool) -> None:
    steps = 5 + nodes_2  # the second time nothing may come from the cache
    with open_comfyui(server.url, {"Comfy.VueNodes.Enabled": nodes_2}) as page:
        load_workflow(page, workflow(steps=steps))
        assert len(run_workflow(page, server)["windows"]) == steps
        panel = open_tab(page)
        panel.locator("canvas").wait_for()
        page.evaluate("async () => { await window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog') }")
        dialog = page.get_by_role("dialog")
        dialog.get_by_text("Attention Backends", exact=True).first.click()
        times = dialog.get_by_label("Timing detail in run reports").last
        times.locator("option").first.wait_for(state="attached")
        assert times.evaluate("(list) => [...list.options].map((one) => one.value)") == ["full", "sampled", "off"]
        times.select_option("off")
        page.wait_for_timeout(500)
        assert server.get("/attention_backends/settings")["machine"]["trace"] == {"value": "off", "variable": None}
        page.keyboard.press("Escape")
        load_workflow(page, workflow(steps=steps + 2))
        account = run_workflow(page, server)
        assert (account["windows"], account["rows"][0]["ms"]) == ([], None)
        assert sum(row["calls"] for row in account["rows"]) == 8 * (steps + 2)
        panel.locator("canvas").wait_for(state="detached")  # no times, no picture of them; the table stays
        calls = 0
        for _ in range(100):  # the panel may still show the run as it was a moment before its end
            calls = sum(int(text) for text in panel.locator("tbody .ab-number").all_inner_texts())
            if calls == 8 * (steps + 2):
                break
            page.wait_for_timeout(100)
        assert calls == 8 * (steps + 2)
        assert changed(server, {"trace": "full"})[0] == 200
        assert ours(page) == []


def test_a_variable_that_holds_a_setting_is_said() -> None:
    held = {"ATTENTION_BACKENDS_HUB": "1", "ATTENTION_BACKENDS_TRACE": "sampled"}
    with (
        start_server(extra_nodes=(), environ=held) as server,
        open_comfyui(server.url) as page,
    ):
        page.evaluate("async () => { await window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog') }")
        dialog = page.get_by_role("dialog")
        dialog.get_by_text("Attention Backends", exact=True).first.click()
        dialog.get_by_text("set by ATTENTION_BACKENDS_HUB").wait_for()
        hub = dialog.get_by_label("Download missing kernels from Hugging Face").last
        assert hub.is_checked()
        assert hub.is_disabled()
        dialog.get_by_text("set by ATTENTION_BACKENDS_TRACE").wait_for()
        times = dialog.get_by_label("Timing detail in run reports").last
        assert times.is_disabled()
        assert times.input_value() == "sampled"
        for change, variable in (({"hub": False}, "HUB"), ({"trace": "off", "log_level": "DEBUG"}, "TRACE")):
            status, answer = changed(server, change)
            assert status == 409
            assert f"environment variable ATTENTION_BACKENDS_{variable}" in answer["error"]
        settings = server.get("/attention_backends/settings")["machine"]
        assert [settings[name]["value"] for name in ("hub", "trace", "log_level")] == [True, "sampled", ""]


def test_command_key_menu_and_badge(server: Server) -> None:
    with open_comfyui(server.url) as page:
        page.keyboard.press("Alt+Shift+A")
        page.locator(".attention-backends").wait_for(timeout=10_000)
        page.evaluate("async () => { await window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog') }")
        dialog = page.get_by_role("dialog")
        dialog.get_by_text("About", exact=True).first.click()
        badge = dialog.get_by_role("link", name="Attention Backends: report for a bug")
        badge.wait_for()
        assert badge.get_attribute("href").endswith("/attention_backends/bug_report")
        assert ours(page) == []
