"""What our widgets on nodes leave alone: sizes of nodes, and values of the widgets of others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attention_backends.devtools.server import Server
from browser import load_workflow, open_comfyui, why_no_browser
from panel_pictures import keep
from server_harness import start_server
from test_panel import LINE, RENDERERS, open_tab, ours, run_workflow, workflow
from test_queued_by import PACKED
from test_settings_panel import ADD, SET_ROLE, VALUES
from test_web import words

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.browser,
    pytest.mark.skipif(why_no_browser() is not None, reason=f"browser: {why_no_browser()}"),
]
STATE = """() => {
  const { graph, extensionManager } = window.app
  const { changeTracker } = extensionManager.workflow.activeWorkflow
  changeTracker.captureCanvasState()
  return JSON.stringify([changeTracker.undoQueue.length, ...graph.nodes.map((node) => [node.type, ...node.size])])
}"""
"""How often the workflow was changed, and every node's size."""
CHANGE = """([change, steps]) => {
  const { graph, canvas } = window.app
  const first = (type) => graph.nodes.find((one) => one.type === type)
  const selector = first('AttentionBackendSelector')
  first('KSampler').widgets[2].value = steps
  if (change === 'saved') graph.remove(first('PreviewAny')) // its value is what it shows, and is saved
  if (change === 'small') {
    selector.setSize([...selector.computeSize()])
    selector.widgets[0].value = 'cudnn_attn' // which cannot run here, so there is a warning too
    selector.widgets[0].callback('cudnn_attn')
    const node = window.LiteGraph.createNode('AttentionConfigText')
    graph.add(node)
    node.pos = [395, 340]
    node.widgets[0].value = '{"default": "torch_sdpa"}'
    selector.connect(0, node, 0)
    node.connect(0, first('PerRoleAttentionConfig'), 0)
    graph.updateExecutionOrder() // which queueing does too, and is saved
  }
  if (change === 'collapsed') selector.collapse()
  canvas.ds.scale = 1
  canvas.ds.offset[0] = -300
  canvas.ds.offset[1] = 60
  canvas.setDirty(true, true)
}"""
OUTSIDE = """(place) => [...document.querySelectorAll(place)].filter((line) => {
  const { width, height } = line.getBoundingClientRect()
  return width && (line.scrollHeight > height + 1 || line.scrollWidth > width + 1)
}).map((line) => line.textContent)"""
"""Lines whose text is larger than the line."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with start_server(extra_nodes=()) as running:
        yield running


@RENDERERS
def test_a_run_changes_no_size(server: Server, tmp_path: Path, nodes_2: bool) -> None:
    """Not of a node that was saved without room for the line, made small by hand, collapsed, or new."""
    with open_comfyui(server.url, tmp_path / "profile", {"Comfy.VueNodes.Enabled": nodes_2}) as page:
        load_workflow(page, workflow())
        changes = (("saved", 1), ("small", 2), ("collapsed", 1))
        for number, (change, lines) in enumerate(changes):
            page.evaluate(CHANGE, [change, 20 + 2 * number + nodes_2])
            before = ["", *(settled(page) for _ in range(2))]
            while before[-1] != before[-2]:  # Nodes 2.0 are measured after they are drawn
                before.append(settled(page))
            assert run_workflow(page, server)["state"] == "done"
            page.screenshot(path=keep(tmp_path, f"line_{change}_{nodes_2}.png"))
            assert page.locator(LINE).locator("visible=true").count() == lines
            assert page.evaluate(OUTSIDE, LINE) == []
            assert settled(page) == before[-1]
        assert ours(page) == []


def settled(page: Any) -> str:
    page.wait_for_timeout(400)
    return str(page.evaluate(STATE))


OTHER_PACK = """() => window.app.registerExtension({
  name: 'Test.WidgetBehindOurs',
  nodeCreated(node) {
    if (node.comfyClass?.startsWith('Attention')) node.addWidget('text', 'theirs', 'as it was', () => {})
  }
})"""
WIDGETS = """() => window.app.graph.nodes.filter((node) => node.type === 'AttentionBackendSelector')
  .map((node) => node.widgets.map(({ name, value }) => [name, value]))"""
TYPED = """() => {
  const node = window.app.graph.nodes.find((one) => one.type === 'AttentionBackendSelector')
  node.widgets.find((one) => one.name === 'theirs').value = 'typed'
  window.app.graph.add(node.clone())
  return window.app.graph.serialize()
}"""


def test_a_widget_of_another_pack_keeps_its_value(server: Server, tmp_path: Path) -> None:
    """Behind ours, which are not saved: the front end saves a gap for each and does not expect it when it loads."""
    own = next(node for node in workflow()["nodes"] if node["type"] == "AttentionBackendSelector")["widgets_values"]
    with open_comfyui(server.url, tmp_path / "profile") as page:
        page.evaluate(OTHER_PACK)
        load_workflow(page, workflow())
        saved = page.evaluate(TYPED)
        nodes = [node for node in saved["nodes"] if node["type"] == "AttentionBackendSelector"]
        assert [node["widgets_values"] for node in nodes] == [[*own, "typed"]] * 2
        load_workflow(page, saved)
        for widgets in page.evaluate(WIDGETS):
            assert [name for name, _ in widgets].index("theirs") > len(own)  # there are some of ours between
            assert widgets[-1] == ["theirs", "typed"]
            assert [value for _, value in widgets][: len(own)] == own
        assert ours(page) == []


SETTINGS = "async () => { await window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog') }"
WARNS = """[...window.app.graph.subgraphs.values()][0].nodes
  .find((one) => one.type === 'AttentionBackendSelector').widgets
  .find((one) => one.name === 'attention_backends_line').element.textContent.includes('cannot run here')"""


def test_a_warning_goes_when_the_backend_can_run(server: Server, tmp_path: Path) -> None:
    """After a restart of the server, after "Ask again", and after a setting of the server: without a reload."""
    able = [False]

    def answer(route: Any) -> None:
        described = route.fetch().json()
        if able[0]:
            described["backends"][0].update(available=True, reasons=[])
        route.fulfill(json=described)

    with open_comfyui(server.url, tmp_path / "profile") as page:
        page.route("**/attention_backends/machine?backend=*", answer)
        load_workflow(page, workflow(backend="cudnn_attn"))
        page.evaluate(PACKED)  # into a subgraph, whose nodes are not in the graph that is shown
        panel = open_tab(page)

        def restarted() -> None:
            page.evaluate("() => { window.app.api.dispatchCustomEvent('reconnected') }")

        def asked_again() -> None:
            panel.get_by_role("button", name=words()["machine"]["refresh"]).click()

        def allowed() -> None:
            page.evaluate(SETTINGS)
            dialog = page.get_by_role("dialog")
            dialog.get_by_text("Attention Backends", exact=True).first.click()
            dialog.get_by_label(words()["settings"]["hub"]).last.click()

        page.wait_for_function(f"{WARNS} === true", timeout=20_000)
        for change in (restarted, asked_again, allowed):
            able[0] = not able[0]
            change()
            page.wait_for_function(f"{WARNS} === {str(not able[0]).lower()}", timeout=20_000)
        assert server.get("/attention_backends/settings")["machine"]["hub"]["value"] is True
        server.post("/attention_backends/settings", {"hub": False})
        assert ours(page) == []


CONTRASTS = """async ([line, palette]) => {
  await window.app.extensionManager.setting.set('Comfy.ColorPalette', palette)
  const paint = document.createElement('canvas').getContext('2d')
  const light = (colour) => {
    paint.fillStyle = colour
    paint.fillRect(0, 0, 1, 1)
    const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05
  }
  const ground = light(window.LiteGraph.NODE_DEFAULT_BGCOLOR)
  const text = light(getComputedStyle(document.querySelector(line)).color)
  return Math.max(text, ground) / Math.min(text, ground)
}"""
"""Of a line's text to the ground of a node, as WCAG 2 has it: 4.5 is what small text needs."""


def test_a_line_can_be_read_in_both_themes(server: Server, tmp_path: Path) -> None:
    with open_comfyui(server.url, tmp_path / "profile") as page:
        load_workflow(page, workflow(steps=15))
        run_workflow(page, server)
        page.locator(LINE).wait_for(timeout=20_000)
        ran = {palette: page.evaluate(CONTRASTS, [LINE, palette]) for palette in ("dark", "light")}
        load_workflow(page, workflow(backend="cudnn_attn"))
        page.get_by_text("cudnn_attn cannot run here").wait_for(timeout=20_000)
        warned = {palette: page.evaluate(CONTRASTS, [LINE, palette]) for palette in ("dark", "light")}
        page.evaluate(CONTRASTS, [LINE, "dark"])  # which the server keeps
        assert min(*ran.values(), *warned.values()) >= 4.5, (ran, warned)


SAID = "(id) => window.app.graph.getNodeById(id).widgets.at(-1).element.textContent"


def test_a_role_that_brings_another_backend_brings_its_warning(server: Server, tmp_path: Path) -> None:
    """The settings have a backend for each role: a new node takes it as soon as its role is chosen."""
    setting = "AttentionBackends.NewNodes.Self"
    with open_comfyui(server.url, tmp_path / "profile", {setting: "cudnn_attn"}) as page:
        load_workflow(page, workflow())
        (node, *_) = page.evaluate(ADD, "PerRoleAttentionConfig")
        said = f"({SAID})({node})"
        for role, backend in (("self", "cudnn_attn"), ("cross", "auto")):
            page.evaluate(SET_ROLE, [node, role])
            page.wait_for_timeout(700)
            assert page.evaluate(VALUES, node)[1] == backend
            warned = "cudnn_attn cannot run here" in page.evaluate(said)
            assert warned is (backend == "cudnn_attn"), role
        page.evaluate("async (id) => { await window.app.extensionManager.setting.set(id, 'auto') }", setting)
        assert ours(page) == []
