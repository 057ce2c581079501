"""The Attention tab and the lines on nodes, in the real front end on a real server."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attention_backends.devtools.server import Server, WorkflowError
from browser import load_workflow, open_comfyui, ours, why_no_browser
from panel_pictures import keep
from server_harness import ROOT
from syrupy.assertion import SnapshotAssertion
from test_web import words
from workflow_graphs import EMBEDDED, Graph, embedded, ksampler

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.browser,
    pytest.mark.skipif(why_no_browser() is not None, reason=f"browser: {why_no_browser()}"),
]
PANEL = ".attention-backends"
SAID = "[data-testid=attention_backends_line]"
LINE = f"{SAID}[data-of=run]:not(:empty)"
"""Of a node that says what it did, not what it will do."""
AXE = ROOT / "tests" / "web" / "node_modules" / "axe-core" / "axe.min.js"
SAVED = """() => JSON.stringify(window.app.graph.serialize().nodes
  .filter((node) => node.type.includes('Attention')).map((node) => [node.type, node.widgets_values]))"""
SLOW = pytest.mark.slow
RENDERERS = pytest.mark.parametrize("nodes_2", [False, True], ids=["canvas", "nodes_2.0"])
CANVAS_IS_SLOW = pytest.mark.parametrize(
    "nodes_2", [pytest.param(False, marks=SLOW), True], ids=["canvas", "nodes_2.0"]
)
"""Of what does not depend on how nodes are drawn."""


@pytest.fixture(scope="module")
def one_page(server: Server) -> Iterator[Any]:
    with open_comfyui(server.url) as opened:
        yield opened


@pytest.fixture
def page(one_page: Any) -> Any:
    """The page of tests that need no other settings, with an empty graph and the sidebar closed."""
    one_page.evaluate(EMPTY)
    one_page.locator(PANEL).wait_for(state="detached", timeout=10_000)
    one_page.problems.clear()
    return one_page


EMPTY = """() => {
  window.app.graph.clear()
  window.app.extensionManager.sidebarTab.activeSidebarTabId = null
}"""


def workflow(**changes: Any) -> dict[str, Any]:
    """A saved workflow: selector and per-role node before a sampler of the embedded model.

    `backend`, `guard` and `steps` can differ, so that nothing comes from a cache.
    """
    file = ROOT / "tests" / "fixtures" / "per_role_in_the_page.json"
    saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for node in saved["nodes"]:
        if node["type"] == "AttentionBackendSelector":
            values = node["widgets_values"]
            values[0], values[3] = changes.get("backend", values[0]), changes.get("guard", values[3])
        if node["type"] == "KSampler":
            node["widgets_values"][1:3] = ["fixed", changes.get("steps", node["widgets_values"][2])]
    return saved


def run_workflow(page: Any, server: Server) -> dict[str, Any]:
    """Queues what the page shows, waits, and returns the server's account of the run."""
    before = {run["number"] for run in server.get("/attention_backends/runs")["runs"]}
    page.evaluate("async () => { await window.app.queuePrompt(0) }")
    for _ in range(600):
        new = [run for run in server.get("/attention_backends/runs")["runs"] if run["number"] not in before]
        if new and new[0]["state"] != "running":
            page.wait_for_timeout(700)
            run: dict[str, Any] = server.get(f"/attention_backends/runs/{new[0]['number']}")["run"]
            return run
        page.wait_for_timeout(100)
    raise WorkflowError(server.tail())


@contextmanager
def waiting(server: Server) -> Iterator[None]:
    """What is queued in the block waits until its end, behind a run that is interrupted then."""
    graph = Graph("")
    model, settings = embedded(graph)
    sampled = ksampler(graph, graph.selector(model, "torch_sdpa"), **settings, **{**EMBEDDED, "steps": 10_000})
    graph.add("PreviewImage", images=graph.add("TinyShapesImage", samples=sampled, scale=1))
    before = server.queue(graph.nodes)
    while not any(run["state"] == "running" for run in server.get("/attention_backends/runs")["runs"]):
        time.sleep(0.1)
    try:
        yield
    finally:
        server.post("/interrupt", {"prompt_id": before})


def done(page: Any, server: Server, steps: int) -> dict[str, Any]:
    """The newest run, as soon as it is one of so many steps that has ended."""
    newest: dict[str, Any] = {}
    for _ in range(600):
        newest = server.get("/attention_backends/runs")["runs"][0]
        if newest["steps"] == steps and newest["state"] == "done":
            break
        page.wait_for_timeout(100)
    return newest


def told_run(page: Any, calls: int) -> Any:
    """The line of a node whose run of `workflow` had so many calls of each role."""
    return page.locator(f"{LINE}[title^='self torch_sdpa {calls} calls, cross sdpa_math {calls}']")


def open_tab(page: Any) -> Any:
    page.evaluate("async () => { await window.app.extensionManager.command.execute('AttentionBackends.ShowReport') }")
    panel = page.locator(PANEL)
    panel.wait_for(timeout=10_000)
    return panel


def table(panel: Any) -> list[list[str]]:
    return [row.locator("td").all_inner_texts() for row in panel.locator("tbody tr").all()]


def barriers(page: Any) -> list[str]:
    """What axe-core finds in the panel that keeps people out: names, roles, keyboard, contrast. Skips without it."""
    if not AXE.is_file():
        pytest.skip("all but axe-core's rules passed; those need npm: python3 dev.py test")
    page.add_script_tag(path=AXE)
    found = page.evaluate("panel => window.axe.run(panel).then((result) => result.violations)", PANEL)
    return [f"{rule['id']}: {node['html']}" for rule in found for node in rule["nodes"]]


@CANVAS_IS_SLOW
def test_a_run_is_shown_as_the_server_counted_it(server: Server, tmp_path: Path, nodes_2: bool) -> None:
    steps = 6 if nodes_2 else 5
    with open_comfyui(server.url, {"Comfy.VueNodes.Enabled": nodes_2}) as page:
        load_workflow(page, workflow(steps=steps))
        saved = page.evaluate(SAVED)
        prompt = page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)")
        account = run_workflow(page, server)
        panel = open_tab(page)
        panel.locator("tbody tr").first.wait_for()
        page.screenshot(path=keep(tmp_path, f"panel_{nodes_2}.png"))

        calls = 4 * steps
        assert sorted(row[:4] for row in table(panel)) == [
            ["cross", "4 blocks", "sdpa_math", str(calls)],
            ["self", "4 blocks", "torch_sdpa", str(calls)],
        ]
        panel.get_by_label("One row for each block").check()
        shown = {(row[0], row[1], row[2], int(row[3])): float(row[4]) for row in table(panel)}
        counted = {(row["role"], row["block"], row["backend"], row["calls"]): row["ms"] for row in account["rows"]}
        assert shown == pytest.approx(counted, abs=0.051)  # one digit after the point
        with page.expect_download() as download:
            panel.get_by_role("button", name="Save as JSON").click()
        exported = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
        assert exported == account
        with page.expect_download() as download:
            panel.get_by_role("button", name="Save as CSV").click()
        lines = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
        wanted = [{name: row[name] for name in lines[0]} for row in account["rows"]]
        assert [{**line, "calls": int(line["calls"]), "ms": float(line["ms"])} for line in lines] == [
            {name: "" if value is None else value for name, value in row.items()} for row in wanted
        ]
        named = panel.locator(".ab-toggle strong").first.inner_text()
        assert re.fullmatch(r"\d\d:\d\d · .+ · KSampler #\d+ · seed \d+", named), named
        assert panel.locator("p.ab-audit.ab-as_asked").count() == 1  # one line, as all ran as asked
        assert panel.locator(".ab-bypass").count() == 0  # nothing of this model goes past the hook

        # The line on the node, which is in no saved workflow and in no prompt.
        told_run(page, calls).wait_for(timeout=20_000)
        assert page.locator(LINE).inner_text().startswith("torch_sdpa (self), sdpa_math (cross) \u00b7 ")
        label = "() => window.app.graph.nodes.find((n) => n.type === 'AttentionBackendSelector').widgets.at(-1).label"
        assert page.evaluate(label) == words()["line"]["label"]  # else the front end's side panel shows its id
        after = page.evaluate(SAVED)
        assert after == saved
        assert page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)") == prompt
        assert ours(page) == []


def test_every_node_has_a_help_page(server: Server, tmp_path: Path) -> None:
    """ComfyUI asks for a page in the language that is set first: one that is missing would be an error of ours."""
    nodes = server.get("/object_info").items()
    types = [name for name, node in nodes if node["python_module"].endswith(ROOT.name) and not node.get("deprecated")]
    with open_comfyui(server.url) as page:
        asked: list[str] = []
        page.on("response", lambda answer: "/docs/" in answer.url and asked.append(f"{answer.status} {answer.url}"))
        for kind in types:
            page.evaluate(ADD_AND_SELECT, kind)
            page.get_by_test_id("info-button").click()
            page.locator(HELP).wait_for(timeout=10_000)
            page.wait_for_timeout(300)
        page.screenshot(path=keep(tmp_path, "help.png"))
        expected = [f"200 {server.url}/extensions/{ROOT.name}/docs/{kind}/en.md" for kind in types]
        assert set(asked) == set(expected)
        assert ours(page) == []
        # An address of ours that is missing would be seen.
        page.evaluate("(pack) => fetch(`/extensions/${pack}/docs/none.md`)", ROOT.name)
        page.wait_for_timeout(300)
        assert len(ours(page)) == 1


HELP = ".node-help-content"
ADD_AND_SELECT = """(type) => {
  const { graph, canvas } = window.app
  graph.clear()
  const node = window.LiteGraph.createNode(type)
  graph.add(node)
  node.pos = [400, 300]
  canvas.selectItems([node])
  canvas.setDirty(true, true)
}"""


CHOOSE = """(backend) => {
  const node = window.app.graph.nodes.find((one) => one.type === 'AttentionBackendSelector')
  const widget = node.widgets.find((one) => one.name === 'backend')
  widget.value = backend
  widget.callback?.(backend)
}"""


@CANVAS_IS_SLOW
def test_a_backend_that_cannot_run_is_said_before_queueing(server: Server, tmp_path: Path, nodes_2: bool) -> None:
    """No snapshots: that of a variant behind `slow` would be called unused, which ends a whole run as failed."""
    needs = "needs an NVIDIA GPU (this is a CPU)"
    with open_comfyui(server.url, {"Comfy.VueNodes.Enabled": nodes_2}) as page:
        steps = 4 + nodes_2  # the second time nothing may come from the cache
        load_workflow(page, workflow(backend="cudnn_attn", steps=steps))
        line = page.locator(f"{SAID}[title^=cudnn_attn]")
        line.wait_for(timeout=20_000)
        assert line.inner_text() == f"\u26a0 cudnn_attn cannot run here: {needs}"
        page.screenshot(path=keep(tmp_path, f"warning_{nodes_2}.png"))
        account = run_workflow(page, server)
        fallbacks = sum(row["calls"] for row in account["rows"] if row["reason"])
        assert fallbacks == 4 * steps
        page.locator(f"{LINE}[title*=fallbacks]").wait_for(timeout=20_000)
        title = line.get_attribute("title")
        ran = f"self torch_sdpa {fallbacks} calls, cross sdpa_math {fallbacks}; {fallbacks} fallbacks"
        cannot, after, _ = title.split("\n", 2)
        assert cannot == f"cudnn_attn cannot run here: {needs}"
        assert after == ran
        assert f"{fallbacks} of {2 * fallbacks}" in line.inner_text()
        assert line.inner_text().startswith("\u26a0 torch_sdpa (self)")
        page.screenshot(path=keep(tmp_path, f"fallbacks_{nodes_2}.png"))
        page.evaluate(CHOOSE, "sage_attn")  # another choice, of which that run says nothing
        page.get_by_text("sage_attn cannot run here").wait_for(timeout=20_000)
        panel = open_tab(page)
        panel.locator(".ab-reasons").wait_for()
        reasons = panel.locator(".ab-reasons").inner_text().splitlines()
        assert next(line for line in reasons if "self: cudnn_attn" in line) == f"self: cudnn_attn: {needs}"
        audit = panel.locator(".ab-audit").inner_text().splitlines()
        assert not [line for line in audit if "reasons" in line]
        assert ours(page) == []


@CANVAS_IS_SLOW
def test_a_line_stays_with_the_workflow_that_queued_it(server: Server, nodes_2: bool) -> None:
    """Two open workflows with the same node ids, and the same id of their graphs, as copies of a template have them."""
    switch = """async (step) => {
      const before = window.app.extensionManager.workflow.activeWorkflow.path
      await window.app.extensionManager.command.execute(`Workspace.${step}OpenedWorkflow`)
      return before !== window.app.extensionManager.workflow.activeWorkflow.path
    }"""
    steps = 17 + nodes_2
    with open_comfyui(server.url, {"Comfy.VueNodes.Enabled": nodes_2}) as page:
        with waiting(server):
            load_workflow(page, workflow(steps=steps))
            page.evaluate("async () => { await window.app.queuePrompt(0) }")
            load_workflow(page, workflow(steps=2))  # a second tab, before the first one's run
        done(page, server, steps)
        page.wait_for_timeout(1500)
        assert page.locator(LINE).all_inner_texts() == []
        assert page.evaluate(switch, "Previous")
        told_run(page, 4 * steps).wait_for(timeout=20_000)
        assert page.locator(LINE).count() == 1
        load_workflow(page, workflow(steps=steps + 2))  # a third tab, with a run of its own
        assert page.locator(LINE).all_inner_texts() == []
        run_workflow(page, server)
        told_run(page, 4 * steps + 8).wait_for(timeout=20_000)
        assert ours(page) == []


def test_a_strict_stop_is_not_called_nothing(page: Any, server: Server, snapshot: SnapshotAssertion) -> None:
    refusing = workflow(backend="cudnn_attn", steps=11)
    selector = next(node for node in refusing["nodes"] if node["type"] == "AttentionBackendSelector")
    selector["widgets_values"][2] = True  # strict
    load_workflow(page, refusing)
    account = run_workflow(page, server)
    assert (account["state"], account["rows"]) == ("stopped", [])
    stopped = account["outcome"]["text"]
    assert stopped == snapshot
    page.locator(f"{LINE}[title*='{stopped}']").wait_for(timeout=20_000)
    panel = open_tab(page)
    panel.locator(".ab-run .ab-line").wait_for()
    assert panel.locator(".ab-run .ab-line").inner_text() == stopped
    assert words()["line"]["nothing"] not in panel.inner_text()
    assert ours(page) == []


def test_every_value_can_be_read_at_300_px(page: Any, server: Server, tmp_path: Path) -> None:
    load_workflow(page, workflow(backend="cudnn_attn", steps=13))
    run_workflow(page, server)
    panel = open_tab(page)
    panel.locator("tbody tr").first.wait_for()
    for width in (300, 460, 900):
        panel.evaluate("(panel, width) => { panel.style.width = `${width}px` }", width)
        page.wait_for_timeout(200)
        panel.screenshot(path=keep(tmp_path, f"table_{width}.png"))
        cut = panel.evaluate(CUT_OFF)
        assert cut == [] or width == 900, (width, cut)
    assert "NVIDIA GPU" in panel.locator("tbody").inner_text()
    # A queue of this page without a run of ours: what is open is of an earlier one.
    page.evaluate("() => window.app.api.dispatchCustomEvent('execution_success', { prompt_id: 'another' })")
    panel.get_by_text(words()["runs"]["not_ours"]).wait_for(timeout=20_000)


CUT_OFF = """panel => {
  const place = panel.querySelector('.ab-scroll').getBoundingClientRect()
  return [...panel.querySelectorAll('tbody td, th button')]
    .filter((cell) => cell.textContent && cell.getBoundingClientRect().right > place.right)
    .map((cell) => cell.textContent)
}"""
"""Cells of the table that end outside of the part that is seen."""


def test_a_key_shows_the_tab(page: Any) -> None:
    page.keyboard.press("Alt+Shift+KeyA")
    page.locator(PANEL).wait_for(timeout=10_000)
    page.keyboard.press("Escape")
    page.evaluate("() => window.app.extensionManager.sidebarTab.activeSidebarTabId = null")
    page.locator(PANEL).wait_for(state="detached", timeout=10_000)
    # What the same keys type on a Mac.
    pressed = "{ key: '\u00c5', altKey: true, shiftKey: true, bubbles: true, composed: true }"
    page.evaluate(f"() => document.body.dispatchEvent(new KeyboardEvent('keydown', {pressed}))")
    page.locator(PANEL).wait_for(timeout=10_000)
    assert ours(page) == []


def test_the_table_sorts_and_works_by_keyboard(page: Any, server: Server) -> None:
    load_workflow(page, workflow(steps=3))
    run_workflow(page, server)
    panel = open_tab(page)
    panel.locator("tbody tr").first.wait_for()
    panel.get_by_label("One row for each block").check()
    button = panel.get_by_role("columnheader", name="Block").get_by_role("button")
    button.focus()
    page.keyboard.press("Enter")
    blocks = [row[1] for row in table(panel)]
    assert blocks == sorted(blocks)
    assert panel.get_by_role("columnheader", name="Block").get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")  # the focus has stayed on the button of the new table
    assert [row[1] for row in table(panel)] == blocks[::-1]
    strip = panel.get_by_role("img")
    strip.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert "step 1: torch_sdpa, 1" in panel.locator(".ab-heat .ab-caption").inner_text()
    roles = panel.evaluate(
        "panel => [...panel.querySelectorAll('button, input, canvas, code')]"
        ".filter(e => !(e.innerText || e.getAttribute('aria-label') || e.closest('label'))).length"
    )
    assert roles == 0  # everything that can be used has a name
    assert ours(page) == []


def test_the_strip_shows_a_schedule_step_by_step(
    page: Any, server: Server, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    """A sampler with two model calls in a step: the picture is over steps all the same."""
    graph = Graph("")
    model, settings = embedded(graph)
    model = graph.selector(model, "torch_sdpa")
    model = graph.add("AttentionSchedule", model=model, backend="sdpa_math", when="steps", window="1-2,last 1", role="")
    graph.nodes[model[0]]["inputs"]["blocks"] = ""
    settings |= {"steps": 6, "cfg": 1.0, "sampler_name": "dpmpp_2s_ancestral", "scheduler": "simple"}
    graph.add("PreviewImage", images=graph.add("TinyShapesImage", samples=ksampler(graph, model, **settings), scale=2))
    server.run(graph.nodes)
    panel = open_tab(page)
    strip = panel.get_by_role("img")
    strip.wait_for()
    assert strip.get_attribute("aria-label") == snapshot
    strip.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    seen = []
    for _ in range(6):
        seen.append(panel.locator(".ab-heat .ab-caption").inner_text())
        page.keyboard.press("ArrowRight")
    panel.screenshot(path=keep(tmp_path, "schedule.png"))
    backends = ["torch_sdpa", "sdpa_math", "sdpa_math", "torch_sdpa", "torch_sdpa", "sdpa_math"]
    places = [f"self, block blocks.0, step {step}: {backend}, " for step, backend in enumerate(backends)]
    assert [text[: len(place)] for text, place in zip(seen, places, strict=True)] == places
    assert ours(page) == []


def test_what_the_guard_found_is_listed(page: Any, server: Server) -> None:
    load_workflow(page, workflow(backend="emulated_int8", guard="watch", steps=9))
    found = run_workflow(page, server)["guard"]
    assert found
    panel = open_tab(page)
    items = panel.locator(".ab-guard li")
    items.first.wait_for()
    assert items.count() == min(8, len(found))
    checked = f"{found[0]['block']}, emulated_int8: calls checked: {found[0]['checked']}"
    assert checked in items.first.inner_text()
    limit = found[0]["relative_l2_limit"]
    assert limit == 0.1  # of kernels that quantise, as docs/guard.md has it
    assert f"relative L2 {found[0]['relative_l2']:g} (limit {limit:g})" in items.first.inner_text()
    errors = [float(text.split("relative L2 ")[1].split()[0]) for text in items.all_inner_texts()]
    assert errors == sorted(errors, reverse=True)
    assert ours(page) == []


def test_missing_backends_have_commands_for_this_interpreter(page: Any, server: Server, tmp_path: Path) -> None:
    machine = server.get("/attention_backends/machine")
    panel = open_tab(page)
    panel.get_by_text("Cannot run here (").wait_for(timeout=60_000)
    panel.get_by_text("Cannot run here (").click()
    commands = [
        row["install"]["text"] for row in machine["backends"] if (row["install"] or {}).get("kind") == "command"
    ]
    assert panel.locator("code").all_inner_texts() == commands
    entries = panel.locator(".ab-backends > li").all_inner_texts()
    assert len(entries) == len(machine["backends"])
    page.screenshot(path=keep(tmp_path, "machine.png"))
    for width in (300, 460):
        panel.evaluate("(panel, width) => { panel.style.width = `${width}px` }", width)
        page.screenshot(path=keep(tmp_path, f"machine_{width}.png"))
    assert panel.evaluate("panel => panel.scrollWidth <= panel.clientWidth")
    assert ours(page) == []


def synthetic(rows: int) -> dict[str, Any]:
    """A run with one call in each of many rows."""
    return {
        "number": 1, "prompt_id": None, "node_id": None, "model": "M", "device": "cuda", "steps": 20, "seconds": 1.0,
        "state": "done", "bypass": "", "notes": [],
        "rows": [
            {"role": "self", "block": f"blocks.{i % 100}", "backend": "torch_sdpa", "member": None, "calls": 1,
             "ms": None, "mask": f"mask {i}", "asked": None, "source": "default", "reason": None} for i in range(rows)
        ],
        "audit": [],
        "windows": [
            {"first": i + 1, "last": i + 1, "steps": [i, i], "cells": [[row, 1, None] for row in range(i, rows, 64)]}
            for i in range(64)
        ],
    }  # fmt: skip


def test_ten_thousand_calls_render_in_under_100_ms(page: Any, snapshot: SnapshotAssertion) -> None:
    """The worst form of it: every call in a row of its own."""
    script = """async ([base, run]) => {
      const { showRun, firstView } = await import(`${base}/run_view.js`)
      const place = document.body.appendChild(document.createElement('div'))
      place.className = 'attention-backends'
      const times = []
      for (let i = 0; i < 5; i++) {
        const start = performance.now()
        showRun(place, run, { ...firstView(), blocks: i % 2 === 1 }, (key) => key)
        place.getBoundingClientRect()
        times.push(performance.now() - start)
      }
      place.remove()
      return times
    }"""
    times = page.evaluate(script, [f"/extensions/{ROOT.name}", synthetic(10_000)])
    assert min(times) < 100, times
    for steps, known, shown in COLUMNS:
        windows = [{"first": i + 1, "last": i + 1, "steps": one, "cells": [[0, 1, None]]}
                   for i, one in enumerate(steps)]  # fmt: skip
        found = page.evaluate(PARTS, [f"/extensions/{ROOT.name}", windows])
        assert [found["steps"], found["parts"]] == [known, shown], steps
    alarm = {"role": "self", "block": "blocks.3", "backend": "sage_attn", "checked": 4, "relative_l2": 0.3,
             "relative_l2_limit": 0.1, "alarms": 1, "first_alarm": "relative L2 0.3 of a head > 0.1"}  # fmt: skip
    assert page.evaluate(GUARDED, [f"/extensions/{ROOT.name}", {**synthetic(1), "guard": [alarm]}]) == (
        f"run.guarded; {alarm['first_alarm']}"
    )
    summary = page.evaluate(TUNED, f"/extensions/{ROOT.name}")
    assert summary == snapshot
    assert page.evaluate(SPARSE, [f"/extensions/{ROOT.name}", synthetic(3)]) == SPARSE_SHOWN


PARTS = """async ([base, windows]) => {
  const strip = await import(`${base}/heat_strip.js`)
  const { steps, parts } = strip.parts(windows)
  return { steps, parts: parts.map(({ first, last, label, cells }) => [first, last, label, cells.length]) }
}"""
COLUMNS: list[tuple[list[Any], bool, list[Any]]] = [
    ([[0, 0], [1, 1], [2, 2]], True, [[0, 0, "0", 1], [1, 1, "1", 1], [2, 2, "2", 1]]),
    ([[0, 0], [0, 0], [1, 1]], True, [[0, 0, "0", 2], [1, 1, "1", 1]]),  # two model calls in a step
    ([[0, 1], [1, 2], [3, 3]], True, [[0, 1, "0-1", 1], [2, 2, "1-2", 1], [3, 3, "3", 1]]),  # windows end inside one
    ([[5, 5], [7, 9]], True, [[5, 5, "5", 1], [7, 9, "7-9", 1]]),  # a part of a schedule, and a step left out
    ([[0, 0], None], False, [[1, 1, "1", 1], [2, 2, "2", 1]]),  # not known: model calls
    ([[0, 0], [1, 1], [0, 0]], False, [[1, 1, "1", 1], [2, 2, "2", 1], [3, 3, "3", 1]]),  # two samplers
]
"""Steps of windows; whether the picture is over steps; its columns: from, to, label, cells."""

GUARDED = """async ([base, run]) => {
  const { showRun, firstView } = await import(`${base}/run_view.js`)
  const place = document.createElement('div')
  showRun(place, run, firstView(), (key) => key)
  return place.querySelector('.ab-guard li').textContent
}"""
"""What a run's list of bad checks says; words are their keys."""

SPARSE = """async ([base, run]) => {
  const { showRun, firstView } = await import(`${base}/run_view.js`)
  const { ranWords } = await import(`${base}/line_words.js`)
  const { asCsv } = await import(`${base}/account.js`)
  const place = document.createElement('div')
  for (const row of run.rows) row.mask = 'none'
  const [first, second, exact] = run.rows
  Object.assign(first, { kept: 0.25, expected_gain: 4, measured_gain: 2, calls: 10, dense: { 'first steps': 2 } })
  Object.assign(second, { kept: 0.5, expected_gain: 2, measured_gain: 2, calls: 10, dense: { 'first steps': 2 } })
  first.backend = second.backend = 'video_sparse_attn'
  run.windows = []
  showRun(place, run, firstView(), (key, values) => (key === 'run.whole' ? Object.values(values).join(' ') : key))
  const cells = [...place.querySelectorAll('tbody tr:first-child td')].map((cell) => cell.textContent)
  const said = [...place.querySelectorAll('.ab-sparse li')].map((item) => item.textContent)
  const line = { state: 'done', totals: [{ role: 'self', backend: 'x', calls: 2 }], calls: 2, fallbacks: 0, offers: [],
                 tuning: false, ms_per_step: null, attention_share: null, saved: null, cached: false, step: 1 }
  const say = (key, values) => key + (values?.percent ?? '')
  const words = (sparse) => ranWords({ ...line, sparse: { whole: 2, ...sparse } }, '', say).texts[0]
  const short = [{ kept: 0.25, calls: 2 }, { kept: null, calls: 0 }, { kept: null, calls: 2 }].map(words)
  exact.role = 'cross'
  return [cells.slice(2), said, short, asCsv({ ...run, rows: [exact] }).includes('kept')]
}"""
SPARSE_SHOWN = [
    ["video_sparse_attn", "20", "38 %", "2.67x", "2.00x", "none", "", ""], ["4 self video_sparse_attn first steps"],
    ["x · line.kept25", "x · line.all_kept", "x"], False,
]  # fmt: skip

TUNED = """async (base) => {
  const { tuned } = await import(`${base}/run_view.js`)
  const { loadWords } = await import(`${base}/words.js`)
  const say = await loadWords(window.app.api, 'en')
  return tuned({ state: 'tuning', kinds: 6, from_store: 1, decided: 2, open: 3, not_tuned: 0 }, say).textContent
}"""


def test_two_tabs_a_cancelled_run_and_live_figures(server: Server) -> None:
    with open_comfyui(server.url) as page:
        other = page.context.new_page()
        other.goto(server.url)
        other.wait_for_function("() => window.app?.graph && window.app.extensionManager", timeout=60_000)
        other.wait_for_timeout(1500)
        panels = [open_tab(page), open_tab(other)]
        load_workflow(page, workflow(steps=4000))
        page.evaluate("async () => { await window.app.queuePrompt(0) }")
        seen = []
        for panel in panels:
            panel.locator(".ab-running").first.wait_for(timeout=60_000)
            panel.locator("tbody tr").first.wait_for()
        for _ in range(2):
            seen.append([int(table(panel)[0][3]) for panel in panels])
            page.wait_for_timeout(2500)
        assert all(after > before > 0 for before, after in zip(*seen, strict=True)), seen
        server.post("/interrupt", {})
        for panel in panels:
            panel.locator(".ab-stopped").first.wait_for(timeout=60_000)
            assert "did not finish" in panel.locator(".ab-notes").inner_text()
        last = server.get("/attention_backends/runs")["runs"][0]
        cancelled = words()["line"]["cancelled"].format(step=last["step"], steps=last["steps"])
        panels[0].get_by_text(cancelled).first.wait_for(timeout=20_000)
        full = server.get(f"/attention_backends/runs/{last['number']}")["run"]
        assert len(full["windows"]) <= 64
        page.wait_for_timeout(1500)
        totals = {total["role"]: str(total["calls"]) for total in last["totals"]}
        for panel in panels:
            assert {row[0]: row[3] for row in table(panel)} == totals
        # Only the tab that queued it writes on its node.
        assert page.locator(LINE).count() == 1
        assert other.locator(LINE).count() == 0
        assert ours(page) == []


def test_it_comes_back_after_the_connection_was_lost(server: Server) -> None:
    with open_comfyui(server.url) as page:
        load_workflow(page, workflow(steps=2))
        run_workflow(page, server)
        panel = open_tab(page)
        panel.locator("tbody tr").first.wait_for()
        panel.get_by_text("Can run here (").wait_for(timeout=60_000)
        page.context.set_offline(True)
        page.evaluate("() => window.app.api.dispatchCustomEvent('status', { exec_info: { queue_remaining: 1 } })")
        panel.get_by_text(words()["panel"]["lost"]).wait_for(timeout=20_000)
        page.context.set_offline(False)
        panel.get_by_text("No connection to the server").wait_for(state="detached", timeout=20_000)
        assert all("ERR_INTERNET_DISCONNECTED" in problem for problem in ours(page))  # the browser's own words for it
        page.problems.clear()

        # A server that was started again: the old numbers mean nothing any more, and the panel begins anew.
        answer = json.dumps({"numbering": "another", "runs": []})
        page.route(
            "**/attention_backends/runs", lambda route: route.fulfill(body=answer, content_type="application/json")
        )
        page.evaluate("() => window.app.api.dispatchCustomEvent('reconnected')")
        panel.get_by_text("No run yet.").wait_for(timeout=20_000)
        assert ours(page) == []


def test_a_run_that_ends_while_the_connection_is_lost_is_told(server: Server) -> None:
    with open_comfyui(server.url) as page:
        load_workflow(page, workflow(steps=14))
        run_workflow(page, server)
        page.locator(LINE).wait_for(timeout=20_000)
        panel = open_tab(page)
        with waiting(server):  # however slow the machine is, the run is not over when the connection goes
            load_workflow(page, workflow(steps=16))
            page.evaluate("async () => { await window.app.queuePrompt(0) }")
            panel.locator(".ab-running").wait_for(timeout=20_000)
            page.context.set_offline(True)
            page.evaluate("() => window.app.api.socket.close()")
        newest = done(page, server, 16)
        assert (newest["steps"], newest["state"]) == (16, "done")
        page.wait_for_timeout(1500)
        assert page.locator(f"{LINE}[title*=' calls']").count() == 0  # it says what it knew when the connection went
        page.context.set_offline(False)
        told_run(page, 4 * 16).wait_for(timeout=30_000)
        panel.locator(".ab-running").wait_for(state="detached", timeout=20_000)
        assert {int(row[3]) for row in table(panel)} == {4 * 16}


LABEL = "an_attention_role_with_a_name_of_more_than_sixty_letters_in_one"
PLANTED = ("self", "KSampler", "cudnn_attn")
"""Names that are replaced by the label in what the server answers: a role, a node's class, a backend."""


def looks(palette: str, language: str) -> Any:
    """Every theme in every language, all but one behind `slow`."""
    every = [(one, other) for one in ("dark", "light") for other in ("en", "zh", "ja", "ko")]
    cases = [pytest.param(*one, marks=[] if one == (palette, language) else [SLOW]) for one in every]
    return pytest.mark.parametrize(("palette", "language"), cases)


@looks("dark", "en")
def test_it_looks_right_in_light_and_dark(server: Server, tmp_path: Path, palette: str, language: str) -> None:
    """At 100 % zoom nothing is cut off or off the screen, also with a long label; and everything has contrast."""
    settings = {"Comfy.ColorPalette": palette, "Comfy.Locale": language}
    steps = 7 + 4 * (palette == "light") + ("en", "zh", "ja", "ko").index(language)
    with open_comfyui(server.url, settings) as page:
        load_workflow(page, workflow(backend="cudnn_attn", steps=steps))
        run_workflow(page, server)
        page.route("**/attention_backends/runs**", plant)
        panel = open_tab(page)
        panel.locator("tbody tr").first.wait_for()
        panel.locator("summary[data-key=available]").wait_for(timeout=60_000)
        panel.locator("[data-key^='by time']").click()
        panel.locator("[data-key^='blocks']").check()
        panel.evaluate("panel => { for (const one of panel.querySelectorAll('details')) one.open = true }")
        assert LABEL in panel.inner_text()
        texts = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))
        said = texts["attentionBackends"]["said"]
        reason = said["device"].format(needed=said["device_cuda"], found=said["device_cpu"])
        assert reason in panel.locator(".ab-reasons").inner_text()  # the server's words, in the page's language
        page.screenshot(path=keep(tmp_path, f"{palette}_{language}.png"))
        assert panel.evaluate(CUT_ANYWHERE) == []
        for width in (300, 399, 620):
            panel.evaluate("(panel, width) => { panel.style.width = `${width}px` }", width)
            page.wait_for_timeout(100)
            panel.screenshot(path=keep(tmp_path, f"{palette}_{language}_{width}.png"))
            assert panel.evaluate(CUT_ANYWHERE) == [], width
        assert panel.evaluate("panel => panel.scrollWidth <= panel.clientWidth")
        assert ours(page) == []
        assert barriers(page) == []


def plant(route: Any) -> None:
    """Answers as the server does, with names of sixty letters in it."""
    text = route.fetch().text()
    for name in PLANTED:
        text = text.replace(f'"{name}', f'"{LABEL}')
    route.fulfill(body=text, content_type="application/json")


CUT_ANYWHERE = """panel => {
  const page = panel.getBoundingClientRect()
  const found = page.left < 0 || page.left + panel.clientWidth > innerWidth + 1 ? ['the panel itself'] : []
  for (const one of panel.querySelectorAll('*')) {
    const text = [...one.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE && node.data.trim())
    for (const node of text) {
      const range = document.createRange()
      range.selectNodeContents(node)
      for (const { left, right, width } of range.getClientRects()) {
        const place = one.closest('.ab-scroll') ?? panel
        const outside = place.getBoundingClientRect()
        const cut = left < outside.left - 1 || right > outside.left + place.clientWidth + 2
        if (width && cut) found.push(node.data.slice(0, 80))
      }
    }
  }
  return [...new Set(found)]
}"""
"""Texts in the panel, or in its table, that end outside of what is seen to the left or right."""


CLIPPED = """(selector) => [...document.querySelectorAll(selector)].flatMap((root) => {
  const found = []
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT)
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const seen = text.parentElement.checkVisibility({ visibilityProperty: true, opacityProperty: true })
    if (!seen || !text.data.trim()) continue
    const range = document.createRange()
    range.selectNodeContents(text)
    for (const one of range.getClientRects()) {
      if (one.width < 1 || one.height < 2) continue
      const scrolls = { x: false, y: false }
      let cut = ''
      for (let above = text.parentElement; above && above !== document.body; above = above.parentElement) {
        const { overflowX, overflowY, clipPath } = getComputedStyle(above)
        const box = above.getBoundingClientRect()
        if (box.width <= 1 && box.height <= 1) { cut = ''; scrolls.x = scrolls.y = true; break } // for screen readers
        if (/auto|scroll/.test(overflowX)) scrolls.x = true
        if (/auto|scroll/.test(overflowY)) scrolls.y = true
        const [wide, high] = [/hidden|clip/.test(overflowX), /hidden|clip/.test(overflowY)]
        if (!scrolls.x && wide && (one.left < box.left - 1 || one.right > box.right + 1)) cut ||= 'x'
        if (!scrolls.y && high && (one.top < box.top - 2 || one.bottom > box.bottom + 2)) cut ||= 'y'
      }
      if (!scrolls.x && (one.left < -1 || one.right > innerWidth + 1)) cut ||= 'screen x'
      if (!scrolls.y && (one.top < -1 || one.bottom > innerHeight + 1)) cut ||= 'screen y'
      if (cut) found.push(`${cut}: ${text.data.trim().slice(0, 60)}`)
    }
  }
  return [...new Set(found)]
})"""
"""Texts that end outside of what is seen, to each side: of the screen, or of a box that neither shows nor scrolls."""
PLACED = """(types) => {
  const { graph, canvas } = window.app
  graph.clear()
  const right = types.map((type, index) => {
    const node = window.LiteGraph.createNode(type)
    graph.add(node)
    node.pos = [40 + 400 * (index % 3), 60 + 420 * Math.floor(index / 3)]
    return node.id
  })
  canvas.ds.scale = 1
  canvas.ds.offset[0] = 60
  canvas.ds.offset[1] = 60
  canvas.setDirty(true, true)
  return right
}"""
CONFIGURE = ("AttentionBackendSelector", "PerRoleAttentionConfig", "AttentionSchedule", "AttentionConfigText")


@looks("light", "ja")
def test_nodes_tooltips_help_and_settings_are_whole(
    server: Server, tmp_path: Path, palette: str, language: str
) -> None:
    """At 100 % zoom, with a long name of a backend on the line and in the settings."""

    def planted(route: Any) -> None:
        found = route.fetch().json()
        if "takes" in found:
            found.update(backend=LABEL, kind="named", takes=None, reasons=[f"{LABEL} {LABEL}"])
        else:
            found["environment"] = {"DIFFUSION_ATTENTION_BACKEND": LABEL}
        route.fulfill(json=found)

    settings = {
        "Comfy.ColorPalette": palette, "Comfy.Locale": language, "Comfy.VueNodes.Enabled": True,
        "LiteGraph.Node.TooltipDelay": 0, "Comfy.Node.AlwaysShowAdvancedWidgets": True,
    }  # fmt: skip
    with open_comfyui(server.url, settings) as page:
        page.route("**/attention_backends/forecast?*", planted)
        page.route("**/attention_backends/settings", planted)
        page.reload()
        page.wait_for_function("() => window.app?.graph && window.app.extensionManager", timeout=60_000)
        page.wait_for_timeout(1500)
        every = (palette, language) != ("light", "ja")  # the sweep
        types = CONFIGURE if every else CONFIGURE[:1]
        ids = page.evaluate(PLACED, types)
        page.locator(SAID).first.wait_for(timeout=20_000)
        page.wait_for_timeout(1000)
        page.screenshot(path=keep(tmp_path, f"nodes_{palette}_{language}.png"))
        found = page.evaluate(CLIPPED, "[data-node-id]")
        assert LABEL[:10] in page.locator(SAID).first.inner_text()
        page.evaluate("(line) => { document.querySelector(line).style.width = '9px' }", SAID)
        assert page.evaluate(CLIPPED, "[data-node-id]") != [], "what is cut off is seen"
        page.evaluate("(line) => { document.querySelector(line).style.width = '' }", SAID)
        tips = page.locator(".p-tooltip")
        for number in ids:
            for widget in page.locator(f'[data-node-id="{number}"] [data-testid=widget-layout-field-label]').all():
                widget.hover()
                tips.first.wait_for(timeout=5_000)
                found += page.evaluate(CLIPPED, ".p-tooltip")
                page.mouse.move(5, 5)
                tips.first.wait_for(state="detached")
        for kind in types:
            page.evaluate(ADD_AND_SELECT, kind)
            page.get_by_test_id("info-button").click()
            page.locator(f"{HELP} p").first.wait_for(timeout=10_000)
            page.wait_for_timeout(300)
            found += page.evaluate(CLIPPED, HELP)
        page.screenshot(path=keep(tmp_path, f"help_{palette}_{language}.png"))
        page.evaluate("async () => { await window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog') }")
        dialog = page.get_by_role("dialog")
        texts = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))
        name = texts.get("settingsCategories", {}).get("Attention Backends", "Attention Backends")
        dialog.get_by_text(name, exact=True).first.click()
        dialog.get_by_text(LABEL).first.wait_for()
        page.screenshot(path=keep(tmp_path, f"settings_{palette}_{language}.png"))
        found += page.evaluate(CLIPPED, "[role=dialog]")
        assert found == []
        assert ours(page) == []
