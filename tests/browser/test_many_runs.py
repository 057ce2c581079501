"""Hundreds of runs in a row: nothing grows, on the server and in the page, and each account is of its own run.

`pytest -m slow tests/browser/test_many_runs.py` samples every one of the 300 with a real model.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from attention_backends.backends.report import Row, RunReport  # noqa: E402
from attention_backends.devtools.server import Server  # noqa: E402
from browser import load_workflow, open_comfyui, why_no_browser  # noqa: E402
from hook_side import (  # noqa: E402
    HEADS,
    PLACES,
    Q,
    comfyui,
    model_call,
    nodes_module,
    override,
    rows,
    sampling,
    selected,
    stand_in,
    wrappers,
)
from server_harness import start_server  # noqa: E402
from test_panel import PANEL, open_tab, ours, run_workflow, workflow  # noqa: E402

runs = nodes_module("history.runs")
RUNS = 300
WARM_UP = 50
MOST_GROWTH = 50_000
"""Bytes of Python objects over the second half of the runs; the account of one is some thousand."""
NOT_OURS = [tracemalloc.Filter(False, tracemalloc.__file__)]
BACKENDS = ("torch_sdpa", "sdpa_math", "reference")


class Cancelled(Exception):
    """As ComfyUI's own, when a person stops a run."""


class Stand:
    """Sampling runs of a small model through the pack's own two wrappers, without ComfyUI's sampler."""

    def __init__(self) -> None:
        self.model = stand_in(["WanModel"], PLACES)
        self.keys = rows(6, 1), rows(6, 2)

    def sample(self, number: int) -> tuple[str, int, bool]:
        """One run, different from the one before: its backend, its model calls, and whether it was cancelled."""
        backend, calls, cancelled = BACKENDS[number % 3], 1 + number % 4, number % 10 == 9
        options: dict[str, Any] = {sampling.KEY: override(backend)}
        options[sampling.OVERRIDE] = options[sampling.KEY]

        def forward() -> None:
            self.model.get_submodule("blocks.0.self_attn")([((Q, *self.keys, HEADS), {"transformer_options": options})])

        def executor() -> None:
            for _ in range(calls):
                model_call(self.model, options, forward)
            if cancelled:
                raise Cancelled

        executor = SimpleExecutor(executor, options)
        if cancelled:
            with pytest.raises(Cancelled):
                wrappers.outer_sample_wrapper(executor)
        else:
            wrappers.outer_sample_wrapper(executor)
        return backend, calls, cancelled


class SimpleExecutor:
    """What ComfyUI hands to a wrapper around sampling."""

    def __init__(self, run: Any, options: dict[str, Any]) -> None:
        self.run = run
        self.class_obj = SimpleNamespace(model_options={"transformer_options": options})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run()


def alive() -> dict[str, int]:
    """How many objects of a run there are."""
    gc.collect()
    kinds = (RunReport, Row, sampling.Run, nodes_module("hook.model_call").ModelCall, sampling.DeviceSession)
    counted = Counter(type(one) for one in gc.get_objects())
    gc.collect()  # the list that was just made held the frame that holds it
    return {kind.__name__: counted[kind] for kind in kinds}


def assert_no_more_than(before: dict[str, int]) -> None:
    """No run of this test is left; what earlier tests left behind may go meanwhile."""
    now = alive()
    assert all(now[kind] <= before[kind] for kind in before), f"objects of runs that are over: {before} -> {now}"


def check_kept(numbers: list[int]) -> None:
    """As many runs are kept as are said to be, those that are over, and the last ones."""
    assert runs._live == {}
    assert [run["number"] for run in runs.recent()] == numbers[::-1][: runs.KEPT]
    assert len(runs.summaries()) == runs.KEPT


def test_hundreds_of_runs_leave_nothing_and_are_told_apart() -> None:
    torch.set_num_threads(1)  # for tensors this small, threads mostly wait for each other
    runs._live.clear()  # of tests that stopped in the middle of a run
    stand, numbers = Stand(), []

    def one(number: int) -> None:
        backend, calls, cancelled = stand.sample(number)
        account, summary = runs.recent()[0], runs.summaries()[0]
        numbers.append(account["number"])
        assert [(row["role"], row["backend"], row["calls"]) for row in account["rows"]] == [("self", backend, calls)]
        assert (summary["calls"], summary["state"]) == (calls, "stopped" if cancelled else "done")
        assert runs.find(account["number"])["windows"][-1]["last"] == calls

    for number in range(WARM_UP):
        one(number)
    before = alive()
    tracemalloc.start()
    try:
        for number in range(WARM_UP, RUNS // 2):
            one(number)
        assert_no_more_than(before)
        halfway = tracemalloc.take_snapshot().filter_traces(NOT_OURS)
        for number in range(RUNS // 2, RUNS):
            one(number)
        assert_no_more_than(before)
        grown = tracemalloc.take_snapshot().filter_traces(NOT_OURS).compare_to(halfway, "lineno")
    finally:
        tracemalloc.stop()
    assert len(set(numbers)) == RUNS
    check_kept(numbers)
    assert sum(line.size_diff for line in grown) < MOST_GROWTH, "\n".join(map(str, grown[:20]))


def real_runs(count: int) -> None:
    """Runs of a real model in ComfyUI's sampler, each with its own backend, steps, prompt and node."""
    comfyui()
    import tiny_sampling

    try:
        from comfy_execution.utils import CurrentNodeContext
    except ModuleNotFoundError:
        pytest.skip("this ComfyUI does not say which node runs")
    model = tiny_sampling.build("wan")
    patched = {backend: selected(model, backend) for backend in BACKENDS[:2]}
    numbers, before = [], {}
    for number in range(count):
        backend, steps = BACKENDS[number % 2], 1 + number % 3
        prompt, node = f"prompt {number}", str(number % 7)
        with CurrentNodeContext(prompt, node):
            tiny_sampling.sample(patched[backend], "wan", steps=steps, seed=number)
        graph = {name: {"class_type": "KSampler", "inputs": {}} for name in (node, "another")}
        (account,) = runs.of_node(graph, node, prompt)
        assert runs.of_node(graph, "another", prompt) == []
        numbers.append(account["number"])
        assert {row["backend"] for row in account["rows"]} == {backend}
        assert (account["steps"], account["prompt_id"], account["node_id"]) == (steps, prompt, node)
        per_step = sum(row["calls"] for row in account["rows"]) / steps
        assert per_step == before.setdefault("calls", per_step)
        if number == count // 5:
            before["alive"] = alive()
    check_kept(numbers[-runs.KEPT :])
    assert alive() == before["alive"]


@pytest.mark.comfy
def test_runs_of_a_real_model_are_told_apart() -> None:
    real_runs(24)


@pytest.mark.comfy
@pytest.mark.slow
def test_as_many_runs_of_a_real_model() -> None:
    real_runs(RUNS)


# In the page


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with start_server(extra_nodes=()) as running:
        yield running


COUNT_UP = """async ([base, count, account]) => {
  const { openPanel } = await import(`${base}/panel.js`)
  const { nodeLines } = await import(`${base}/node_line.js`)
  window.many ??= (() => {
    const events = new EventTarget()
    const state = { events, number: 0, all: [], place: document.body.appendChild(document.createElement('div')) }
    const server = {
      runs: async () => ({ numbering: 'one', runs: state.all.slice(-20).reverse() }),
      run: async (number) => ({ numbering: 'one', run: { ...account, number, steps: number } }),
      machine: async () => ({ platform: { packages: {} }, interpreter: {}, backends: [] }),
      measured: async () => ({ summary: {}, entries: [] }),
      nodeLines: async () => ({ prompt_id: null, mark: null, nodes: {} }), forecast: async () => undefined,
      forget() {}, onForget() {}
    }
    state.panel = openPanel(state.place, events, server, (key) => key)
    state.lines = nodeLines({ graph: null }, events, server, (key) => key)
    return state
  })()
  const { many } = window
  for (let i = 0; i < count; i++) {
    const number = ++many.number
    many.all.push({
      number, prompt_id: `p${number}`, node_id: '1', model: 'M', device: 'cpu', steps: number, seconds: 1,
      state: 'done', calls: 1, fallbacks: 0, totals: [{ role: 'self', backend: 'torch_sdpa', calls: number }],
      nodes: [{ id: '5', class_type: 'AttentionBackendSelector', backend: 'torch_sdpa' }]
    })
    many.all = many.all.slice(-20)
    many.events.dispatchEvent(new CustomEvent('execution_start', { detail: { prompt_id: `p${number}` } }))
    many.events.dispatchEvent(new CustomEvent('execution_success', { detail: { prompt_id: `p${number}` } }))
    while (many.place.querySelector('.ab-toggle strong')?.textContent !== `${number}. M`) {
      await scheduler.postTask(() => {}) // a timeout would wait 4 ms
    }
  }
  await new Promise((done) => setTimeout(done, 100))
  return many.place.querySelectorAll('.ab-runs > li').length
}"""
"""`count` runs end, one after another, in a panel of its own; the answer is how many it lists."""

REAL_EVENTS = """async (count) => {
  for (let i = 0; i < count; i++) {
    for (const name of ['execution_start', 'execution_success']) {
      window.app.api.dispatchCustomEvent(name, { prompt_id: `none ${i}` })
    }
    if (i % 20 === 0) await new Promise((done) => setTimeout(done, 50))
  }
  await new Promise((done) => setTimeout(done, 1500))
}"""


def counters(page: Any) -> dict[str, int]:
    """Nodes and listeners of the page, and bytes of its heap, after what nobody holds was taken away."""
    session = page.context.new_cdp_session(page)
    for _ in range(2):
        session.send("HeapProfiler.collectGarbage")
    found = session.send("Memory.getDOMCounters")
    heap = session.send("Runtime.getHeapUsage")["usedSize"]
    session.detach()
    return {"nodes": found["nodes"], "listeners": found["jsEventListeners"], "heap": int(heap)}


@pytest.mark.slow
@pytest.mark.comfy
@pytest.mark.browser
@pytest.mark.skipif(why_no_browser() is not None, reason=f"browser: {why_no_browser()}")
def test_the_page_does_not_grow_with_runs(server: Server) -> None:
    with open_comfyui(server.url) as page:
        load_workflow(page, workflow(steps=2))
        account = run_workflow(page, server)
        panel = open_tab(page)
        panel.locator("tbody tr").first.wait_for()
        panel.get_by_text("Can run here (").wait_for(timeout=60_000)
        base = page.evaluate("() => [...document.querySelectorAll('.attention-backends link')][0].href")
        base = base.rsplit("/", 1)[0]

        assert page.evaluate(COUNT_UP, [base, WARM_UP, account]) == 20
        before = counters(page)
        assert page.evaluate(COUNT_UP, [base, RUNS - WARM_UP, account]) == 20
        after = counters(page)
        assert after["nodes"] <= before["nodes"] + 50, (before, after)
        assert after["listeners"] <= before["listeners"] + 20, (before, after)
        assert after["heap"] <= before["heap"] + 2_000_000, (before, after)
        # ComfyUI's own page gains listeners with such events, also without this pack: only nodes are compared.
        page.evaluate(REAL_EVENTS, WARM_UP)
        assert counters(page)["nodes"] <= before["nodes"] + 50, (before, after)
        # The newest run is the open one, with its own figures; closing the tab leaves nothing of it behind.
        opened = page.evaluate("() => window.many.place.querySelector('[aria-expanded=true]').dataset.key")
        assert opened == f"run {RUNS}"
        page.evaluate("() => { window.many.panel.close(); window.many.place.remove(); delete window.many }")
        assert page.locator(PANEL).count() == 1
        assert panel.locator(".ab-runs > li").count() == 1
        assert ours(page) == []
