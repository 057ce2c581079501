"""What our widgets on nodes leave alone: sizes of nodes, and values of the widgets of others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attention_backends.devtools.server import Server
from browser import load_workflow, open_comfyui, why_no_browser
from panel_pictures import keep
from server_harness import ROOT, start_server
from test_panel import CANVAS_IS_SLOW, LINE, RENDERERS, SAID, open_tab, ours, run_workflow, workflow
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
  const { clientWidth, clientHeight } = line
  return clientWidth && (line.scrollHeight > clientHeight + 1 || line.scrollWidth > clientWidth + 1)
}).map((line) => line.textContent)"""
"""Lines whose text is larger than the line."""


WAN = "Wan 2.2 14B, faster (4 steps)"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    files = ROOT / "tests" / "server_nodes" / "wan_template_files.py"
    with start_server(extra_nodes=[files], environ={"ATTENTION_BACKENDS_TESTS": str(ROOT / "tests")}) as running:
        yield running


def template() -> dict[str, Any]:
    """The shipped template of Wan 2.2 14B as it is opened, but for a smaller video."""
    (file,) = (ROOT / "workflows").glob(f"*{WAN}.json")
    saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    (latent,) = (node for node in saved["nodes"] if node["type"] == "EmptyHunyuanLatentVideo")
    latent["widgets_values"][:3] = [64, 64, 5]
    return saved


@RENDERERS
def test_a_run_changes_no_size(server: Server, tmp_path: Path, nodes_2: bool) -> None:
    """Not of a node that was saved without room for the line, made small by hand, collapsed, or new."""
    with open_comfyui(server.url, {"Comfy.VueNodes.Enabled": nodes_2}) as page:
        load_workflow(page, workflow())
        changes = (("saved", 1), ("small", 2), ("collapsed", 1))
        for number, (change, lines) in enumerate(changes):
            page.evaluate(CHANGE, [change, 5 + 2 * number + nodes_2])
            before = ["", *(settled(page) for _ in range(2))]
            while before[-1] != before[-2]:  # Nodes 2.0 are measured after they are drawn
                before.append(settled(page))
            assert run_workflow(page, server)["state"] == "done"
            page.screenshot(path=keep(tmp_path, f"line_{change}_{nodes_2}.png"))
            assert page.locator(LINE).locator("visible=true").count() == lines
            assert page.evaluate(OUTSIDE, SAID) == []
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


def test_a_widget_of_another_pack_keeps_its_value(server: Server) -> None:
    """Behind ours, which are not saved: the front end saves a gap for each and does not expect it when it loads."""
    own = next(node for node in workflow()["nodes"] if node["type"] == "AttentionBackendSelector")["widgets_values"]
    own = [*own, ""][:6]  # a graph from before there were options has five
    with open_comfyui(server.url) as page:
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


def test_a_warning_goes_when_the_backend_can_run(server: Server) -> None:
    """After a restart of the server, after "Ask again", and after a setting of the server: without a reload."""
    able = [False]

    def answer(route: Any) -> None:
        foreseen = route.fetch().json()
        if able[0]:
            foreseen.update(takes=foreseen["backend"], reasons=[])
        route.fulfill(json=foreseen)

    with open_comfyui(server.url) as page:
        page.route("**/attention_backends/forecast?*", answer)
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


def test_a_line_can_be_read_in_both_themes(server: Server) -> None:
    with open_comfyui(server.url) as page:
        load_workflow(page, workflow(steps=15))
        page.get_by_text("torch_sdpa runs here").wait_for(timeout=20_000)
        will = {palette: page.evaluate(CONTRASTS, [SAID, palette]) for palette in ("dark", "light")}
        run_workflow(page, server)
        page.locator(LINE).wait_for(timeout=20_000)
        ran = {palette: page.evaluate(CONTRASTS, [LINE, palette]) for palette in ("dark", "light")}
        load_workflow(page, workflow(backend="cudnn_attn"))
        page.get_by_text("cudnn_attn cannot run here").wait_for(timeout=20_000)
        warned = {palette: page.evaluate(CONTRASTS, [SAID, palette]) for palette in ("dark", "light")}
        page.evaluate(CONTRASTS, [SAID, "dark"])  # which the server keeps
        assert min(*will.values(), *ran.values(), *warned.values()) >= 4.5, (will, ran, warned)


TEXT_OF = "(id) => window.app.graph.getNodeById(id).widgets.at(-1).element.textContent"


NODES_2 = "Comfy.VueNodes.Enabled"
MODELS = """async (address) => {
  const { modelOf } = await import(address)
  const root = window.app.rootGraph ?? window.app.graph
  const all = [root, ...root.subgraphs.values()].flatMap((graph) => graph.nodes)
  return all.filter(({ type }) => /KSampler|Attention(Back|Sch)|PerRole/.test(type)).map((one) => modelOf(one, root))
}"""

OFFERED = """() => JSON.stringify([...document.querySelectorAll('#attention_backends_roles option')]
  .map(({ value }) => value)) === '["self","cross"]'"""


def test_a_role_that_brings_another_backend_brings_its_warning(server: Server) -> None:
    """The settings have a backend for each role: a new node takes it as soon as its role is chosen.

    And only roles of the connected model are offered, which is found through two models on one selector, LoRAs, a
    shift, and a subgraph.
    """
    setting, address = "AttentionBackends.NewNodes.Self", f"/extensions/{ROOT.name}/model_of.js"
    with open_comfyui(server.url, {setting: "cudnn_attn", NODES_2: True}) as page:
        load_workflow(page, template())
        high, low = (f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled.safetensors" for noise in ("high", "low"))
        assert page.evaluate(MODELS, address) == [high, high, low]
        load_workflow(page, workflow())
        embedded = ["tiny_shapes_wan_fp16.safetensors"] * 3
        assert page.evaluate(MODELS, address) == embedded
        page.get_by_label("role", exact=True).first.focus()
        page.wait_for_function(OFFERED, timeout=20_000)
        (node, *_) = page.evaluate(ADD, "PerRoleAttentionConfig")
        said = f"({TEXT_OF})({node})"
        for role, backend in (("self", "cudnn_attn"), ("cross", "auto")):
            page.evaluate(SET_ROLE, [node, role])
            page.wait_for_timeout(700)
            assert page.evaluate(VALUES, node)[1] == backend
            warned = "cudnn_attn cannot run here" in page.evaluate(said)
            assert warned is (backend == "cudnn_attn"), role
        page.evaluate("async (id) => { await window.app.extensionManager.setting.set(id, 'auto') }", setting)
        load_workflow(page, workflow())
        page.evaluate(PACKED)
        assert page.evaluate(MODELS, address) == embedded
        assert ours(page) == []


# What the line says, from the opened graph on

EN = words()["line"]
SET = """([type, name, value]) => {
  const node = window.app.graph.nodes.find((one) => one.type === type)
  node.widgets.find((one) => one.name === name).value = value
}"""
MODE = "(mode) => { window.app.graph.nodes.find((one) => one.type === 'AttentionBackendSelector').mode = mode }"
PLACE = """(name) => {
  const node = window.app.graph.nodes.find((one) => one.type === 'AttentionBackendSelector')
  const widget = node.widgets.find((one) => one.name === name)
  const { canvas } = window.app
  const { left, top } = canvas.canvas.getBoundingClientRect()
  const [x, y] = [node.pos[0] + node.size[0] / 2, node.pos[1] + (widget.last_y ?? widget.y) + 8]
  return [(x + canvas.ds.offset[0]) * canvas.ds.scale + left, (y + canvas.ds.offset[1]) * canvas.ds.scale + top]
}"""
"""Where a widget of the selector stands on the screen."""
COUNT = "() => addEventListener('pointerdown', () => { window.clicks = (window.clicks ?? 0) + 1 }, true)"
KEEP = """() => {
  const { changeTracker } = window.app.extensionManager.workflow.activeWorkflow
  const keep = changeTracker.captureCanvasState ?? changeTracker.checkState
  keep.call(changeTracker)
}"""
SELECTOR = "AttentionBackendSelector"
SAMPLER = "KSamplerAdvanced"


def says(page: Any, of: str, part: str) -> Any:
    """The selector's line, as soon as it tells `of` the forecast or a run, with this in its tooltip."""
    line = page.locator(f'{SAID}[data-of={of}][title*="{part}"]').first
    line.wait_for(timeout=20_000)
    return line


def three_clicks_and_one_queue(page: Any, nodes_2: bool) -> str:
    """Opens the Wan template, takes the kernel from the menu and queues; the line's text after the run."""
    load_workflow(page, template())
    says(page, "forecast", "auto: ")
    page.evaluate(COUNT)
    if nodes_2:
        page.get_by_label("backend", exact=True).first.click()
        page.get_by_role("option", name="emulated_int8", exact=True).click()
    else:
        page.mouse.click(*page.evaluate(PLACE, "backend"))
        page.locator(".litemenu-entry[data-value=emulated_int8]").click()
    says(page, "forecast", "emulated_int8 runs here")
    page.get_by_test_id("queue-button").click()
    ran = says(page, "run", "self emulated_int8 8 calls").inner_text()  # 2 blocks, 2 steps with each model
    assert page.evaluate("() => window.clicks") == 3
    assert page.evaluate(OUTSIDE, SAID) == []
    assert ran.startswith("emulated_int8 \u00b7 ")
    page.evaluate(SET, [SAMPLER, "control_after_generate", "fixed"])
    return str(ran)


@CANVAS_IS_SLOW
def test_three_clicks_and_one_queue(server: Server, tmp_path: Path, nodes_2: bool) -> None:
    """From the opened Wan template: open the menu, take the kernel, queue. Then the line says what ran, and the time.

    The kernel is the emulation of INT8 attention, as SageAttention runs on no CPU. After that what holds no more goes,
    and what holds again comes back.
    """
    with open_comfyui(server.url, {"Comfy.VueNodes.Enabled": nodes_2}) as page:
        ran = three_clicks_and_one_queue(page, nodes_2)
        page.screenshot(path=keep(tmp_path, f"line_three_clicks_{nodes_2}.png"))
        for change, back in (
            ((SET, [SELECTOR, "backend", "auto"]), (SET, [SELECTOR, "backend", "emulated_int8"])),
            ((SET, ["UNETLoader", "weight_dtype", "fp8_e5m2"]), (SET, ["UNETLoader", "weight_dtype", "default"])),
        ):
            page.evaluate(*change)
            says(page, "forecast", "here")
            page.evaluate(*back)
            assert says(page, "run", " calls").inner_text() == ran
        assert ours(page) == []


@pytest.mark.slow
@RENDERERS
def test_a_line_after_a_reload_and_while_a_run_goes_on(server: Server, nodes_2: bool) -> None:
    """A run that came from ComfyUI's cache, bypassed, of thousands of steps, and cancelled."""
    with open_comfyui(server.url, {"Comfy.VueNodes.Enabled": nodes_2}) as page:
        three_clicks_and_one_queue(page, nodes_2)
        for _ in range(2):  # the opened template draws a new seed after each run, which is one more run
            page.evaluate("async () => { await window.app.queuePrompt(0) }")
        says(page, "run", EN["cached"])
        page.evaluate(KEEP)  # what a script has changed is not in what the front end opens again
        page.wait_for_timeout(1500)
        page.reload()
        page.wait_for_function("() => window.app?.graph?.nodes?.length > 3", timeout=60_000)
        assert says(page, "run", EN["cached"]).inner_text().startswith("emulated_int8")

        page.evaluate(MODE, 4)  # bypassed, and queued so
        page.locator(f"{SAID}[data-of=nothing]").wait_for(timeout=20_000)
        before = server.get("/history")
        page.evaluate("async () => { await window.app.queuePrompt(0) }")
        while not (new := server.get("/history").keys() - before):
            page.wait_for_timeout(100)
        assert server.get("/history")[new.pop()]["status"]["status_str"] == "success"
        page.evaluate(MODE, 0)
        says(page, "forecast", "emulated_int8 runs here")

        page.evaluate(SET, [SAMPLER, "steps", 10000])
        page.evaluate(SET, [SAMPLER, "end_at_step", 10000])
        page.evaluate("async () => { await window.app.queuePrompt(0) }")
        for _ in range(100):  # in short looks: a waiting locator holds up a page that gets many events
            page.wait_for_timeout(200)
            going = page.locator(SAID).first.get_attribute("title") or ""
            if "of 10000" in going:
                break
        assert "of 10000" in going
        server.post("/interrupt", {})
        cancelled = says(page, "run", EN["cancelled"].partition("{")[0])
        assert "of 10000" in cancelled.inner_text()
        assert cancelled.inner_text().startswith("\u26a0")
        assert page.evaluate(OUTSIDE, SAID) == []
        open_tab(page).get_by_text("Low noise #").first.wait_for()  # runs have the titles of the graph's nodes
        assert ours(page) == []


LANGUAGES = """async ([base, foreseen, line]) => {
  const { nodeLines } = await import(`${base}/node_line.js`)
  const { loadWords } = await import(`${base}/words.js`)
  const { app } = window
  let shown = 0
  for (const language of ['en', 'zh', 'ja', 'ko']) {
    for (const [index, one] of [...foreseen, ...line].entries()) {
      const node = window.LiteGraph.createNode('AttentionBackendSelector')
      const row = Math.floor(shown / (foreseen.length + line.length))
      node.pos = [280 + 460 * index, 120 + 380 * row]
      const own = node.widgets.find((widget) => widget.name === 'attention_backends_line')
      node.removeWidget(own)
      own.element.removeAttribute('data-testid')
      own.element.style.display = 'none'
      app.graph.add(node)
      const isRun = 'state' in one
      const server = {
        forecast: async () => (isRun ? undefined : one), forget() {}, onForget() {},
        nodeLines: async (of) => ({ prompt_id: 'p', mark: node.queued, nodes: { [node.id]: one } })
      }
      const events = new EventTarget()
      nodeLines(app, events, server, await loadWords(window.app.api, language)).watch(node)
      const carrier = node.widgets.filter((widget) => widget.name === 'attention_backends_mark').at(-1)
      carrier.beforeQueued()
      node.queued = await carrier.serializeValue()
      node.setSize(node.computeSize())
      if (isRun) events.dispatchEvent(new CustomEvent('execution_success', { detail: { prompt_id: 'p' } }))
      shown += 1
    }
  }
  app.canvas.ds.scale = 0.5
  app.canvas.ds.offset[0] = app.canvas.ds.offset[1] = 0
  app.canvas.setDirty(true, true)
}"""
FORESEEN = {
    "backend": "auto", "kind": "auto", "takes": "torch_sdpa", "accuracy": "exact", "source": "", "same": True,
    "without": "torch_sdpa", "flag": "", "without_accuracy": "exact", "tries": [], "reasons": [], "package": "",
    "faster": {"backend": "sage_attn", "why": "not_allowed", "accuracy": "quantized"},
}  # fmt: skip
"""What the server foresees for `auto` on an RTX 4090 with SageAttention."""
RAN = {
    "class_type": SELECTOR, "state": "done", "outcome": {"kind": "done", "cause": "", "text": ""}, "step": 20,
    "of_steps": 20, "steps": 40, "calls": 3200, "fallbacks": 0, "offers": [], "tuning": False, "ms_per_step": 8123.4,
    "attention_share": 0.61, "saved": {"seconds": 42.3, "of": 200.0, "than": ["torch_sdpa"]}, "inputs": {},
    "models": {}, "cached": False,
    "totals": [{"role": role, "backend": backend, "calls": 1600} for role, backend in
               (("self", "sage_attn"), ("cross", "torch_sdpa"))],
}  # fmt: skip
LONG = "a_planted_name_of_a_backend_of_sixty_letters_without_a_space_"


@RENDERERS
def test_no_text_leaves_its_line(server: Server, tmp_path: Path, nodes_2: bool) -> None:
    """In four languages, on nodes of the smallest width, and where a name is too long for any line."""
    refused = {"kind": "not_used", "cause": f"{LONG} after this node took over attention", "text": ""}
    foreseen = [
        FORESEEN,
        {**FORESEEN, "same": False, "without": "sage_attn", "flag": "--use-sage-attention",
         "without_accuracy": "quantized", "exceptions": ["calls with masked text exact"]},
        {**FORESEEN, "kind": "named", "backend": LONG, "takes": None, "reasons": [LONG, LONG]},
    ]  # fmt: skip
    ran = [RAN, {**RAN, "fallbacks": 1600}, {**RAN, "outcome": refused}]
    with open_comfyui(server.url, {"Comfy.VueNodes.Enabled": nodes_2}, width=1800) as page:
        page.evaluate("() => window.app.graph.clear()")
        page.evaluate(LANGUAGES, [f"/extensions/{ROOT.name}", foreseen, ran])
        page.wait_for_timeout(1500)
        page.screenshot(path=keep(tmp_path, f"line_languages_{nodes_2}.png"))
        texts = page.locator(f"{SAID}[data-of]").all_inner_texts()
        assert "" not in texts
        assert any("masked text" in text for text in texts)
        assert len(texts) == 4 * (len(foreseen) + len(ran))
        assert page.evaluate(OUTSIDE, SAID) == []
        assert len(set(texts)) > 4 * len(foreseen)
