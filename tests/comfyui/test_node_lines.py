"""What the line on a node is made of: figures of runs, seconds saved by warm runs alone, and the runs of a prompt."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from attention_backends.backends.report import RunReport
from hook_side import nodes_module

figures = nodes_module("history.figures")
graph = nodes_module("history.graph")
node_lines = nodes_module("history.node_lines")
runs = nodes_module("history.runs")


def row(backend: str, role: str = "self", ms: float | None = 1000.0, calls: int = 8) -> dict[str, Any]:
    return {"role": role, "backend": backend, "member": None, "ms": ms, "calls": calls}


def report(*rows: dict[str, Any], seconds: float | None = 10.0, steps: int = 4, **rest: Any) -> dict[str, Any]:
    found = {
        "rows": list(rows),
        "seconds": seconds,
        "steps": steps,
        "outcome": {"kind": "done"},
        "tuning": {"state": None},
    }
    return {**found, **rest}


def ran(**facts: Any) -> Any:
    return SimpleNamespace(**{"steps_reached": lambda: 4, "started": 5.0, "last_time": 9.0, **facts})


def test_a_finished_run_is_told_by_all_of_its_time() -> None:
    assert figures.of_run(report(row("a"), row("b", ms=1500.0)), ran()) == {
        "step": 4,
        "ms_per_step": 2500.0,
        "attention_share": 0.25,
    }


def test_a_run_that_goes_on_is_told_by_the_time_until_its_last_step() -> None:
    live = figures.of_run(report(row("a"), seconds=None, steps=20), ran(steps_reached=lambda: 2))
    assert (live["step"], live["ms_per_step"], live["attention_share"]) == (2, 2000.0, 0.25)


@pytest.mark.parametrize(
    "told",
    [
        report(row("a"), row("b", ms=None)),  # one call without a time, such as one of another pack
        report(row("a", ms=12_000.0)),  # several cards at a time
        report(),
        report(row("a"), seconds=None),
    ],
)
def test_a_share_that_is_not_known_is_left_out(told: dict[str, Any]) -> None:
    assert figures.of_run(told, ran(started=None))["attention_share"] is None


def test_a_step_is_known_from_the_host_or_from_sigmas() -> None:
    unknown = RunReport()
    assert unknown.steps_reached() is None
    unknown.end_of_model_call(step=2)
    assert unknown.steps_reached() == 3
    untimed = RunReport(mode="off")
    untimed.end_of_model_call(step=0)
    assert untimed.steps_reached() == 1


# Seconds saved


def saved(*told: tuple[str, dict[str, Any]]) -> list[tuple[float, tuple[str, ...]] | None]:
    warm = figures.WarmRuns()
    found = [warm.add(name, one) for name, one in told]
    return [None if one is None else (one.seconds, one.than) for one in found]


def test_only_two_warm_runs_are_compared() -> None:
    sdpa, sage = report(row("torch_sdpa"), seconds=10.0), report(row("sage_attn"), seconds=6.0)
    cold = report(row("sage_attn"), seconds=30.0)
    assert saved(("g", sdpa), ("g", cold), ("g", sage)) == [None, None, None]  # the other one was cold
    assert saved(("g", sdpa), ("g", sdpa), ("g", cold), ("g", sage), ("g", sdpa)) == [
        None,
        None,
        None,
        (4.0, ("torch_sdpa",)),
        (-4.0, ("sage_attn",)),
    ]


def test_the_last_warm_run_of_other_kernels_is_the_one_to_compare_with() -> None:
    first, second = report(row("a"), seconds=10.0), report(row("b"), seconds=8.0)
    later = report(row("a"), seconds=9.0)
    found = saved(*[("g", one) for one in (first, first, second, second, later, report(row("c")), report(row("c")))])
    assert found[-1] == (-1.0, ("a",))


def test_another_graph_or_size_is_not_compared() -> None:
    sdpa, sage = report(row("torch_sdpa")), report(row("sage_attn"), seconds=6.0)
    assert saved(("g", sdpa), ("g", sdpa), ("h", sage), ("h", sage)) == [None] * 4


@pytest.mark.parametrize(
    "change",
    [
        {"outcome": {"kind": "cancelled"}},
        {"outcome": {"kind": "not_used"}},
        {"tuning": {"state": "tuning"}},
        {"seconds": None},
        {"rows": [row("sage_attn"), row("by another", "cross", None)]},
        {"rows": []},
    ],
)
def test_a_run_that_does_not_count_makes_nothing_warm(change: dict[str, Any]) -> None:
    sdpa, sage = report(row("torch_sdpa")), report(row("sage_attn"), seconds=6.0)
    assert saved(("g", sdpa), ("g", sdpa), ("g", {**sage, **change}), ("g", sage)) == [None] * 4


def test_what_is_remembered_stays_small() -> None:
    warm = figures.WarmRuns()
    for number in range(1000):
        warm.add(f"g{number}", report(row("a")))
        warm.add("one", report(row(f"b{number}")))
    assert len(warm._graphs) <= figures.MOST_GRAPHS
    assert len(warm._graphs["one"]) <= figures.MOST_KERNELS


# The graph


def prompt(**changes: Any) -> dict[str, dict[str, Any]]:
    """A split run as Wan 2.2 has it: two samplers behind one selector, each with its model."""
    nodes: dict[str, dict[str, Any]] = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "high"}},
        "2": {"class_type": "UNETLoader", "inputs": {"unet_name": "low"}},
        "3": {
            "class_type": "AttentionBackendSelector",
            "inputs": {"model": ["1", 0], "model_2": ["2", 0], "backend": "auto"},
        },
        "4": {"class_type": "KSamplerAdvanced", "inputs": {"model": ["3", 0], "noise_seed": 1, "steps": 4}},
        "5": {
            "class_type": "KSamplerAdvanced",
            "inputs": {"model": ["3", 1], "latent_image": ["4", 0], "noise_seed": 1, "steps": 4},
        },
    }
    for place, value in changes.items():
        node, _, name = place.partition("_")
        nodes[node.removeprefix("n")]["inputs"][name] = value
    return nodes


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({"n4_noise_seed": 2, "n5_noise_seed": 2}, True),
        ({"n3_backend": "sage_attn"}, True),
        ({"n4_steps": 6}, False),
        ({"n1_unet_name": "other"}, False),
        ({"n3_model_2": ["1", 0]}, False),
    ],
)
def test_graphs_that_do_the_same_work_are_alike(changes: dict[str, Any], alike: bool) -> None:
    assert (graph.likeness(prompt(**changes), "5") == graph.likeness(prompt(), "5")) is alike
    assert graph.signature(prompt(**changes), "5") != graph.signature(prompt(), "5")


# The runs of a prompt


def entry(number: int, sampler: str, nodes: dict[str, Any], **changes: Any) -> tuple[dict[str, Any], Any]:
    told = {
        "number": number, "prompt_id": "p", "node_id": sampler, "state": "done", "step": 2, "steps": 2,
        "nodes": [{"id": "3", "class_type": "AttentionBackendSelector", "backend": "auto"}],
        "outcome": {"kind": "done", "cause": "", "text": ""}, "tuning": {"state": None}, "fallbacks": 0, "offers": [],
        "sparse": [{"calls": 8, "kept": 0.25, "dense": {"the first 2 steps": 4}}],
        "totals": [{"role": "self", "backend": "torch_sdpa", "calls": 8}], "ms_per_step": 1000.0,
        "attention_share": 0.5, "saved": {"seconds": 1.0, "of": 3.0, "than": ["sage_attn"]},
    }  # fmt: skip
    asked = {"3": {"inputs": {"backend": "auto"}, "models": {"1": {"unet_name": "high"}}}}
    node = runs.SamplerNode(sampler, "KSamplerAdvanced", graph.signature(nodes, sampler), "mark", None, asked)
    return {**told, **changes}, node


def test_two_samplers_of_a_split_run_are_one_line() -> None:
    nodes = prompt()
    high, low = entry(1, "4", nodes), entry(2, "5", nodes, ms_per_step=2000.0, attention_share=0.8)
    (line,) = node_lines.lines(nodes, [low, high], [low, high]).values()
    assert (line["steps"], line["ms_per_step"], line["attention_share"]) == (4, 1500.0, 0.7)
    assert line["totals"] == [{"role": "self", "backend": "torch_sdpa", "calls": 16}]
    assert line["saved"] == {"seconds": 2.0, "of": 6.0, "than": ["sage_attn"]}
    assert line["sparse"] == {"kept": 0.25, "calls": 8, "whole": 8}
    live = entry(3, "5", nodes, sparse=[{"calls": 3, "kept": None, "dense": {}}])
    assert node_lines.lines(nodes, [live, high], [live, high])["3"]["sparse"] == {"kept": None, "calls": 7, "whole": 4}
    assert line["inputs"] == {"backend": "auto"}
    assert line["models"] == {"1": {"unet_name": "high"}}
    cold = entry(2, "5", nodes, saved=None)
    assert node_lines.lines(nodes, [cold, high], [cold, high])["3"]["saved"] is None


def test_a_split_run_goes_on_between_its_samplers() -> None:
    nodes = prompt()
    high, low = entry(1, "4", nodes), entry(2, "5", nodes)

    def state(*own: Any, of: str = node_lines.RUNNING) -> str:
        return str(node_lines.lines(nodes, [*own], [*own], of)["3"]["state"])

    assert [state(high), state(low, high), state(high, of=node_lines.STOPPED)] == ["running", "done", "done"]
    assert state(entry(1, "4", nodes, state="stopped")) == "stopped"


def test_a_node_has_the_run_that_is_in_the_cache() -> None:
    nodes = prompt()
    before = [entry(2, "5", nodes), entry(1, "4", nodes)]
    line = node_lines.lines(nodes, [], before)["3"]
    assert (line["cached"], line["steps"]) == (True, 4)
    changed = prompt(n3_backend="sage_attn")
    assert node_lines.lines(changed, [], before) == {}
    other = copy.deepcopy(nodes)
    del other["3"]  # bypassed
    assert node_lines.lines(other, [], before, node_lines.RUNNING) == {}


@pytest.mark.parametrize("backend", ["auto", "sage_attn"])
def test_an_equal_run_of_before_is_told_only_where_the_prompt_ended_well(backend: str) -> None:
    """Until then its output may have left the cache, so the sampler may run again; or it may not be reached."""
    nodes = prompt(n3_backend=backend)
    before = [entry(2, "5", prompt()), entry(1, "4", prompt())]
    waiting = {"class_type": "AttentionBackendSelector", "state": "waiting"}
    assert node_lines.lines(nodes, [], before, node_lines.RUNNING) == {"3": waiting}
    assert node_lines.lines(nodes, [], before, node_lines.STOPPED) == {}
    later = [entry(4, "5", prompt(), ms_per_step=60.6), entry(3, "4", prompt(), ms_per_step=60.6), *before]
    if backend == "auto":
        assert node_lines.lines(nodes, [], later)["3"]["ms_per_step"] == 60.6  # the last one


def test_a_prompt_is_over_when_the_page_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI says it before the prompt leaves the queue."""
    nodes = prompt()
    monkeypatch.setattr(runs, "entry_of", lambda prompt_id: (nodes, "mark"))
    monkeypatch.setattr(runs, "entries", lambda: [entry(2, "5", nodes), entry(1, "4", nodes)])
    assert node_lines.of_prompt("q")["nodes"]["3"]["state"] == "waiting"
    assert node_lines.of_prompt("q", node_lines.SUCCESS)["nodes"]["3"]["cached"] is True
    assert node_lines.of_prompt("q", node_lines.STOPPED)["nodes"] == {}


def test_a_run_that_stopped_is_never_from_the_cache() -> None:
    nodes = prompt()
    stopped = entry(1, "4", nodes, state="stopped")
    assert node_lines.lines(nodes, [], [stopped]) == {}
