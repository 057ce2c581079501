"""The mark by which a page knows its own runs: on its way from a node to the list of runs, and nowhere else."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from attention_backends.devtools.server import Server
from browser import load_workflow, open_comfyui, why_no_browser
from hook_side import nodes_module
from panel_pictures import keep
from server_harness import ROOT
from test_panel import CANVAS_IS_SLOW, LINE, SAVED, ours, workflow
from workflow_graphs import Graph, embedded, ksampler

queued_by = nodes_module("history.queued_by")
NAME = queued_by.INPUT
MARK = "0f" * 16
SELECTOR = "AttentionBackendSelector"
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def posted(*marks: object, **rest: Any) -> dict[str, Any]:
    """A prompt with a node for each mark, and one without inputs of ours."""
    nodes = {str(i): {"class_type": SELECTOR, "inputs": {"a": 1, NAME: mark}} for i, mark in enumerate(marks)}
    return {"prompt": {**nodes, "x": {"class_type": "KSampler", "inputs": {"seed": 1}}}, **rest}


def test_the_mark_goes_from_the_nodes_to_the_extra_data() -> None:
    data = queued_by.take_mark(posted(MARK, MARK, extra_data={"extra_pnginfo": {}}, client_id="c"))
    assert data == {
        "prompt": {
            "0": {"class_type": SELECTOR, "inputs": {"a": 1}},
            "1": {"class_type": SELECTOR, "inputs": {"a": 1}},
            "x": {"class_type": "KSampler", "inputs": {"seed": 1}},
        },
        "extra_data": {"extra_pnginfo": {}, queued_by.KEY: MARK},
        "client_id": "c",
    }
    assert queued_by.mark_of(data["extra_data"]) == MARK
    assert queued_by.take_mark(posted(None, MARK))["extra_data"] == {queued_by.KEY: MARK}


@pytest.mark.parametrize("mark", [None, 7, True, ["0", 0], {}, "", "a" * 65, "A", "a b", "\u0664", "a\n", "<b>"])
def test_another_text_is_dropped(mark: object) -> None:
    data = queued_by.take_mark(posted(mark))
    assert data == {"prompt": {"0": {"class_type": SELECTOR, "inputs": {"a": 1}}, "x": posted()["prompt"]["x"]}}
    assert queued_by.mark_of({queued_by.KEY: mark}) is None  # a script may write there too


@pytest.mark.parametrize(
    "data",
    [
        None, 5, "prompt", [], {}, {"prompt": None}, {"prompt": [1]}, {"prompt": {"1": None, "2": [], "3": {}}},
        {"prompt": {"1": {"inputs": None}, "2": {"inputs": [NAME]}, "3": {"inputs": "x"}}}, posted(),
        posted(extra_data=None), posted(extra_data=[]),
    ],
)  # fmt: skip
def test_what_is_no_prompt_passes_as_it_is(data: Any) -> None:
    before = copy.deepcopy(data)
    assert queued_by.take_mark(data) is data
    assert data == before
    assert queued_by.mark_of(data) is None


def test_extra_data_of_another_form_stays() -> None:
    assert queued_by.take_mark(posted(MARK, extra_data=[]))["extra_data"] == []


MARKS = """
import assert from 'node:assert'
import { workflowRuns } from './workflow_runs.js'
const workflow = {}
const rootGraph = { nodes: [], subgraphs: new Map() }
rootGraph.rootGraph = rootGraph
const runs = workflowRuns({ extensionManager: { workflow } }, () => {})
const carrier = (graph) => {
  const widgets = []
  const node = { graph, mode: 0, addCustomWidget: (widget) => widgets.push(widget) }
  runs.carry(node, () => {})
  return [node, widgets[0]]
}
const node = () => carrier(rootGraph)[1]
const queue = async (widget) => {
  widget.beforeQueued()
  return widget.serializeValue()
}
const said = (text) => [['5', { class_type: 'A', prompt: text, text }]]
const [one, other] = [{}, {}]
const [first, copy] = [node(), node()]
assert.equal(first.computeSize()[1] + 4, 0) // what front ends that lay out hidden widgets add to the node's height
workflow.activeWorkflow = one
assert.equal(await first.serializeValue(), undefined) // an export
const mark = await queue(first)
assert.match(mark, /^[0-9a-f]{32}$/)
assert.equal(await first.serializeValue(), undefined) // an export after it
assert.equal(await queue(copy), mark)
first.beforeQueued() // while it is bypassed
first.afterQueued()
assert.equal(await first.serializeValue(), undefined)
first.beforeQueued()
workflow.activeWorkflow = other // the person goes on while the prompt is made
assert.equal(await first.serializeValue(), mark)
runs.keep(mark, said('one'), 2)
runs.keep(mark, said('an answer that came late'), 1)
runs.keep('0f', said('of another page'), 3)
runs.keep(null, said('of a script'), 3)
assert.equal(runs.shown().size, 0)
assert.notEqual(await queue(first), mark)
workflow.activeWorkflow = one
assert.equal(runs.shown().get('5').text, 'one')
for (let i = 0; i < 1000; i++) {
  workflow.activeWorkflow = {}
  runs.keep(await queue(first), said(`${i}`), 4)
  assert.equal(runs.shown().get('5').text, `${i}`)
}
workflow.activeWorkflow = one
assert.equal(runs.shown().size, 0) // forgotten, as it is the one that queued longest ago
assert.equal(await queue(first), mark)
runs.keep(mark, [...Array(1000).keys()].map((i) => [`${i}`, { class_type: 'A', prompt: 'p' }]), 5)
assert.equal(runs.shown().size, 200)
runs.keep(mark, said('p'), 6) // a prompt's lines take the place of those before
assert.equal(runs.shown().size, 1)
runs.drop('5') // a later prompt has not got the node
assert.equal(runs.shown().size, 0)
runs.keep(mark, said('p'), 7)
assert.equal(runs.shown().size, 0)
runs.keep(mark, said('q'), 8)
assert.equal(runs.shown().get('5').prompt, 'q')
for (let i = 0; i < 20; i++) runs.keep(mark, [['5', { prompt: `${i}`, state: 'done', inputs: { backend: `${i}` } }]], 9)
assert.equal(runs.shown().get('5').earlier.length, 8)

// A page that is loaded again has its marks, each for one workflow of that path and graph.
const storage = {}
const tab = { getItem: (key) => storage[key] ?? null, setItem: (key, value) => void (storage[key] = value) }
Object.defineProperty(globalThis, 'sessionStorage', { value: tab })
globalThis.addEventListener = (name, then) => name === 'pagehide' && (globalThis.leave = then)
const file = () => ({ path: 'a.json', activeState: { id: 'g' } })
const load = (...openWorkflows) => {
  const store = { openWorkflows, activeWorkflow: openWorkflows[0] }
  return [workflowRuns({ extensionManager: { workflow: store } }, () => {}), store]
}
const [page] = load(file())
assert.equal(page.mark(), undefined)
let widget
page.carry({ graph: rootGraph, mode: 0, addCustomWidget: (one) => (widget = one) }, () => {})
const stays = await queue(widget)
page.keep(stays, said('p'), 1)
page.drop('5')
globalThis.leave()
const [again, store] = load(file(), file(), { path: 'b.json', activeState: { id: 'g' } })
store.activeWorkflow = store.openWorkflows[2]
assert.equal(again.mark(), undefined)
store.activeWorkflow = store.openWorkflows[0]
assert.equal(again.mark(), stays)
store.activeWorkflow = store.openWorkflows[1]
assert.equal(again.mark(), undefined)
store.activeWorkflow = store.openWorkflows[0]
again.keep(stays, said('p'), 1)
assert.equal(again.shown().size, 0) // dropped before
again.keep(stays, said('q'), 2)
assert.equal(again.shown().size, 1)

// Nodes that the prompt has not got are never asked, and nothing is called after a request that failed.
const inner = { rootGraph, nodes: [] }
const outer = { rootGraph, nodes: [{ mode: 0, graph: null, subgraph: inner }] }
const [place, twin] = [0, 0].map((mode) => ({ mode, graph: rootGraph, subgraph: outer }))
outer.nodes[0].graph = outer
rootGraph.nodes.push(place, twin)
rootGraph.subgraphs.set('outer', outer).set('inner', inner)
for (const graph of [rootGraph, inner]) {
  const [node, widget] = carrier(graph)
  assert.equal(await queue(widget), mark)
  for (const mode of [2, 4]) {
    node.mode = mode
    widget.beforeQueued()
    node.mode = 0
    assert.equal(await widget.serializeValue(), undefined)
  }
}
const [, held] = carrier(inner)
place.mode = 4
assert.equal(await queue(held), mark) // the other one has it in the prompt
twin.mode = 2
held.beforeQueued()
place.mode = 0
assert.equal(await held.serializeValue(), undefined)
console.log('works')
"""

LOST = """
import assert from 'node:assert'
import { nodeLines } from './node_line.js'
globalThis.document = { createElement: () => ({ style: {}, dataset: {}, setAttribute() {}, append() {} }) }
const widgets = []
const add = (widget) => widgets.push(widget) && widget
const node = {
  type: 'AttentionBackendSelector', widgets, size: [1, 1], computeSize: () => [1, 1], setSize() {}, setDirtyCanvas() {},
  addCustomWidget: add, addDOMWidget: (name, type, element) => add({ name, element })
}
const app = { rootGraph: { nodes: [node], getNodeById: (id) => (id === '5' ? node : undefined) } }
const events = new EventTarget()
const answers = { 'of another page': { mark: 'ff', nodes: {} } }
const asked = []
const server = {
  nodeLines: async (of) => asked.push(of) && answers[of.prompt_id ?? of.mark], forecast: async () => undefined,
  forget() {}, onForget() {}
}
nodeLines(app, events, server, (key, { calls } = {}) => `${calls ?? key}`).watch(node)
const mark = widgets[0]
const backend = { name: 'backend', type: 'combo', value: 'x' }
widgets.push(backend)
const queue = async () => {
  mark.beforeQueued()
  return mark.serializeValue()
}
const run = (prompt_id, mark, calls, state = 'done', inputs = { backend: 'x' }) => ({
  prompt_id, mark, nodes: { 5: {
    class_type: node.type, state, outcome: { kind: state, cause: '' }, step: 1, of_steps: 2, steps: 2, fallbacks: 0,
    totals: [{ role: 'self', backend: 'b', calls }], calls, offers: [], tuning: false, ms_per_step: null,
    attention_share: null, saved: null, inputs, models: {}, cached: false
  } }
})
const line = () => widgets[1]?.element.title
const told = () => new Promise((resolve) => setTimeout(resolve, 5))
const end = async (prompt_id, name = 'execution_success') => {
  events.dispatchEvent(new CustomEvent(name, { detail: { prompt_id } }))
  await told()
}
const lost = async () => {
  events.dispatchEvent(new CustomEvent('reconnected'))
  await told()
}
const ours = await queue()
answers[1] = run('1', ours, 10)
await end('1')
assert.equal(line(), 'self b 10')
// More prompts end while the connection is lost; another page and a script have runs as well.
answers[2] = run('2', 'f0', 20)
answers[3] = run('3', null, 30)
await end('2')
await end('3')
assert.equal(line(), 'self b 10')
answers[ours] = run('4', ours, 40)
await lost()
assert.equal(line(), 'self b 40')
// The next one: it waits, it runs, and the node of one that stopped before its sampler says nothing of a run.
answers[5] = { prompt_id: '5', mark: ours, nodes: { 5: { class_type: node.type, state: 'waiting' } } }
await end('5', 'execution_start')
assert.equal(line(), 'line.waiting')
answers[5] = run('5', ours, 50, 'running')
await end('5', 'execution_start')
assert.equal(line(), 'line.step · b')
answers[5] = { prompt_id: '5', mark: ours, nodes: {} }
await end('5', 'execution_error')
assert.equal(line(), '')
assert.deepEqual(asked.at(-1), { prompt_id: '5', ended: 'stopped' })
answers[6] = run('6', ours, 60)
await end('6')
assert.equal(line(), 'self b 60')
assert.deepEqual(asked.at(-1), { prompt_id: '6', ended: 'success' })
// An answer that comes after that of a later question changes nothing.
let late
server.nodeLines = () => new Promise((resolve) => (late = resolve))
await end('6')
server.nodeLines = async (of) => answers[of.prompt_id]
answers[7] = run('7', ours, 70)
await end('7')
late(answers[6])
await told()
assert.equal(line(), 'self b 70')
// A line is of the last run with the values that the node has now.
for (const [number, name] of [[8, 'x'], [9, 'y'], [10, 'x']]) {
  answers[number] = run(`${number}`, ours, 10 * number, 'done', { backend: name })
  await end(`${number}`)
}
for (const [name, words] of [['y', 'self b 90'], ['z', ''], ['x', 'self b 100']]) {
  backend.value = name
  await end('of another page') // lines are looked at again
  assert.equal(line(), words)
}
server.nodeLines = async () => { throw new TypeError('no connection') }
await lost()
assert.equal(line(), 'self b 100')
server.nodeLines = async () => ({ prompt_id: null, mark: ours, nodes: {} }) // it was started again
await lost()
assert.equal(line(), '')
console.log('works')
"""


@pytest.mark.parametrize("script", [MARKS, LOST], ids=["marks", "lost"])
def test_a_page_knows_its_own_runs(tmp_path: Path, script: str) -> None:
    """A workflow has one mark, and only in the queue; and a run that ended without a connection is told afterwards."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is missing")
    for file in (ROOT / "web").glob("*.js"):  # none of them needs the front end until it is called
        shutil.copy(file, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "start.js").write_text(script)
    result = subprocess.run([node, "start.js"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "works\n"), result.stderr


# On a server


def small(steps: int) -> dict[str, Any]:
    graph = Graph("")
    model, settings = embedded(graph)
    sampler = {**settings, "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    sampled = ksampler(graph, graph.selector(model, "torch_sdpa"), **sampler)
    graph.add("PreviewImage", images=graph.add("TinyShapesImage", samples=sampled, scale=1))
    return graph.nodes


def marked(prompt: dict[str, Any], mark: object) -> dict[str, Any]:
    """As a page sends it."""
    found = copy.deepcopy(prompt)
    for node in found.values():
        if node["class_type"] == SELECTOR:
            node["inputs"][NAME] = mark
    return found


def newest(server: Server) -> dict[str, Any]:
    run: dict[str, Any] = server.get("/attention_backends/runs")["runs"][0]
    return run


def cached(record: dict[str, Any]) -> set[str]:
    return set(next(said for kind, said in record["status"]["messages"] if kind == "execution_cached")["nodes"])


def picture(server: Server, record: dict[str, Any]) -> bytes:
    (image,) = next(out["images"] for out in record["outputs"].values() if "images" in out)
    query = "&".join(f"{key}={image[key]}" for key in ("filename", "subfolder", "type"))
    with _open(f"{server.url}/view?{query}", timeout=60) as answer:
        return bytes(answer.read())


@pytest.mark.comfy
def test_the_list_of_runs_has_the_mark_and_the_prompt_has_not(server: Server) -> None:
    prompt = small(2)
    record = server.run(marked(prompt, MARK))
    run = newest(server)
    assert run["queued_by"] == MARK
    assert record["prompt"][2] == prompt  # what was validated, and what pictures hold
    assert MARK not in json.dumps(record["prompt"][2:3])
    full = server.get(f"/attention_backends/runs/{run['number']}")["run"]
    assert MARK not in json.dumps(full)  # reports are written from this
    file = picture(server, record)
    assert b"KSampler" in file
    assert MARK.encode() not in file
    assert NAME.encode() not in file

    for again in (marked(prompt, "another"), prompt):  # another page, and a script: nothing runs anew
        assert cached(server.run(again)) == set(prompt)
    assert newest(server)["number"] == run["number"]
    server.run(small(3))
    assert newest(server)["queued_by"] is None
    server.run(marked(small(4), "no mark!"))
    assert newest(server)["queued_by"] is None
    assert "on_prompt_handler" not in server.log


# In a page

browser = pytest.mark.skipif(why_no_browser() is not None, reason=f"browser: {why_no_browser()}")
EXPORTED = "async () => JSON.stringify((await window.app.graphToPrompt()).output)"
MODIFIED = """() => {
  const { activeWorkflow } = window.app.extensionManager.workflow
  activeWorkflow.changeTracker.captureCanvasState()
  return activeWorkflow.isModified
}"""
OWN = """() => [
  ...['queuePrompt', 'fetchApi', 'dispatchCustomEvent'].filter((name) => Object.hasOwn(window.app.api, name)),
  ...['queuePrompt', 'graphToPrompt', 'loadGraphData'].filter((name) => Object.hasOwn(window.app, name))
]"""
"""Functions of the page that are not those of its classes any more."""
HEIGHTS = """(mark) => {
  const node = window.app.graph.nodes.find((one) => one.type === 'AttentionBackendSelector')
  const widgets = [...node.widgets]
  const heights = [node.computeSize()[1]]
  node.widgets = widgets.filter((one) => one.name !== mark)
  heights.push(node.computeSize()[1])
  node.widgets = widgets
  return heights
}"""
"""Of the selector, with the widget that brings the mark and without it."""
QUEUE = "async (count) => { await window.app.queuePrompt(0, count) }"


def sent(page: Any) -> list[dict[str, Any]]:
    """The prompts that the page posts from now on, in a list that grows."""
    prompts: list[dict[str, Any]] = []
    page.on(
        "request",
        lambda one: one.method == "POST" and one.url.endswith("/prompt") and prompts.append(one.post_data_json),
    )
    return prompts


def marks(prompt: dict[str, Any]) -> dict[str, str]:
    """The marks in a posted prompt, by node."""
    return {name: node["inputs"][NAME] for name, node in prompt["prompt"].items() if NAME in node["inputs"]}


@pytest.mark.comfy
@pytest.mark.browser
@browser
@CANVAS_IS_SLOW
def test_a_page_leaves_the_mark_nowhere(server: Server, tmp_path: Path, nodes_2: bool) -> None:
    with open_comfyui(server.url, {"Comfy.VueNodes.Enabled": nodes_2}) as page:
        prompts = sent(page)
        load_workflow(page, workflow(steps=12 + nodes_2))
        before = [page.evaluate(script) for script in (EXPORTED, SAVED, MODIFIED)]
        assert NAME not in json.dumps(before)
        tall, without = page.evaluate(HEIGHTS, NAME)
        assert tall == without
        page.screenshot(path=keep(tmp_path, f"mark_{nodes_2}.png"))
        if nodes_2:
            assert page.get_by_text(NAME).count() == 0
        page.evaluate(QUEUE, 1)
        assert page.evaluate(MODIFIED) == before[2]  # by queueing; what a run shows changes sizes, also of other nodes
        page.locator(f"{LINE}[title*=' calls']").wait_for(timeout=20_000)
        assert [page.evaluate(script) for script in (EXPORTED, SAVED)] == before[:2]
        (mark,) = marks(prompts[0]).values()
        assert mark not in json.dumps([prompts[0]["extra_data"], before])

        run = newest(server)
        assert run["queued_by"] == mark
        record = server.get(f"/history/{run['prompt_id']}")[run["prompt_id"]]
        assert mark not in json.dumps([record["prompt"][2], record["prompt"][3]["extra_pnginfo"], record["outputs"]])
        assert mark.encode() not in picture(server, record)
        exported = json.loads(before[0])
        assert cached(server.run(exported)) == set(exported)  # by a script: nothing runs anew
        assert newest(server)["number"] == run["number"]
        assert page.evaluate(OWN) == []
        assert ours(page) == []


COPIED = """() => {
  const { graph } = window.app
  const node = graph.nodes.find((one) => one.type === 'AttentionBackendSelector')
  graph.add(node.clone())
  window.app.canvas.selectItems([node])
  window.app.canvas.copyToClipboard()
  window.app.canvas.pasteFromClipboard()
}"""
PACKED = """() => {
  const { graph } = window.app
  const ours = ['AttentionBackendSelector', 'PerRoleAttentionConfig']
  graph.convertToSubgraph(new Set(graph.nodes.filter((one) => ours.includes(one.type))))
}"""
INSIDE = """() => window.app.graph.nodes.find((one) => one.subgraph).subgraph.nodes
  .find((one) => one.type === 'AttentionBackendSelector').widgets
  .filter((one) => one.name === 'attention_backends_line' && one.element.dataset.of === 'run')
  .map((one) => one.element.title).find((title) => title.startsWith('self'))"""
COMMAND = "async (id) => { await window.app.extensionManager.command.execute(id) }"
MUTE = """(mode) => {
  window.app.graph.nodes.find((one) => one.type === 'AttentionBackendSelector').mode = mode
}"""


@pytest.mark.comfy
@pytest.mark.browser
@browser
def test_every_node_of_a_workflow_brings_one_mark(server: Server) -> None:
    """A batch, copies, undo, a bypassed node, and a node in a subgraph."""
    with open_comfyui(server.url, {"Comfy.VueNodes.Enabled": True}) as page:
        prompts = sent(page)
        load_workflow(page, workflow(steps=8))
        page.evaluate(QUEUE, 2)
        page.locator(LINE).wait_for(timeout=20_000)
        page.evaluate(MODIFIED)  # notes a step, as a picture was shown
        page.evaluate(COPIED)
        page.evaluate(MODIFIED)
        page.evaluate(QUEUE, 1)
        page.evaluate(COMMAND, "Comfy.Undo")
        page.wait_for_timeout(500)
        page.evaluate(QUEUE, 1)
        assert [len(marks(prompt)) for prompt in prompts] == [1, 1, 3, 1]
        assert len({mark for prompt in prompts for mark in marks(prompt).values()}) == 1

        page.evaluate(MUTE, 4)
        page.evaluate(QUEUE, 1)
        assert marks(prompts[-1]) == {}
        page.evaluate(MUTE, 0)
        assert NAME not in page.evaluate(EXPORTED)

        page.evaluate(PACKED)
        load_workflow(
            page, page.evaluate("() => window.app.graph.serialize()")
        )  # as a file has it, in a tab of its own
        page.evaluate("() => { window.app.graph.nodes.find((n) => n.type === 'KSampler').widgets[2].value = 10 }")
        page.evaluate(QUEUE, 1)
        page.wait_for_function(INSIDE, timeout=20_000)
        assert page.evaluate(INSIDE).startswith("self torch_sdpa")
        ((inner, mark),) = marks(prompts[-1]).items()
        assert ":" in inner
        assert mark not in marks(prompts[0]).values()
        assert NAME not in page.evaluate(EXPORTED)
        assert ours(page) == []


@pytest.mark.comfy
@pytest.mark.browser
@browser
def test_a_request_that_failed_leaves_no_mark(server: Server) -> None:
    """In a node that was bypassed, or in a subgraph that was, and is in the next export."""
    bypassed = """([found, mode]) => { window.app.graph.nodes.find((node) => eval(found)).mode = mode }"""
    with open_comfyui(server.url) as page:
        prompts = sent(page)
        load_workflow(page, workflow(steps=8))
        page.route("**/prompt", lambda route: route.fulfill(status=500, body="{}"))
        for found in ("node.type === 'AttentionBackendSelector'", "node.subgraph"):
            if "subgraph" in found:
                page.evaluate(PACKED)
            page.evaluate(bypassed, [found, 4])
            page.evaluate(QUEUE, 1)
            assert marks(prompts[-1]) == {}
            page.evaluate(bypassed, [found, 0])
            assert NAME not in page.evaluate(EXPORTED)
            page.evaluate(QUEUE, 1)
            assert len(marks(prompts[-1])) == 1
            assert NAME not in page.evaluate(EXPORTED)
        assert len(prompts) == 4
