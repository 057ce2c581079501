"""An Attention Report tells of the execution that made its latent, and of no other: through the real server."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from attention_backends.devtools.server import Server
from hook_side import nodes_module
from syrupy.assertion import SnapshotAssertion
from workflow_graphs import EMBEDDED, Graph, Link, embedded, ksampler, output

pytestmark = pytest.mark.comfy

UNPATCHED = "no data: this sampler's model has no attention node"
NO_ACCOUNT = f"{UNPATCHED}, or the run is no longer kept"
MODEL, SELECTOR, SAMPLER = "1", "5", "6"
"""Ids of these nodes in `workflow`."""


def add_report(graph: Graph, samples: Link) -> None:
    report = graph.add("AttentionReport", samples=samples)
    graph.add("PreviewAny", "text", source=output(report, 1))
    graph.add("PreviewAny", "json", source=output(report, 2))


def workflow(seed: int, backend: str = "sdpa_math", steps: int = 3) -> Graph:
    """One patched sampler and its report. Each test has a seed of its own: they share a server and its cache."""
    graph = Graph("")
    model, settings = embedded(graph)
    patched = graph.selector(model, backend)
    samples = ksampler(graph, patched, **{**settings, **EMBEDDED, "steps": steps, "cfg": 1.0})
    graph.nodes[SAMPLER]["inputs"]["seed"] = seed
    assert (model[0], patched[0], samples[0]) == (MODEL, SELECTOR, SAMPLER)
    add_report(graph, samples)
    return graph


def without_selector(graph: Graph) -> Graph:
    bare = copy.deepcopy(graph)
    bare.nodes[SAMPLER]["inputs"]["model"] = [MODEL, 0]
    del bare.nodes[SELECTOR]
    return bare


def told(server: Server, nodes: dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Runs a graph: the text and the data of its report."""
    outputs = server.run(nodes)["outputs"]
    by_title = {nodes[number].get("_meta", {}).get("title"): shown for number, shown in outputs.items()}
    data: dict[str, Any] = json.loads(by_title["json"]["text"][0])
    return str(by_title["text"]["text"][0]), data


def ran(report: dict[str, Any]) -> dict[tuple[str, str], int]:
    """(role, backend) -> calls."""
    found: dict[tuple[str, str], int] = {}
    for row in report["run"]["rows"]:
        key = row["role"], row["backend"]
        found[key] = found.get(key, 0) + row["calls"]
    return found


def calls(backend: str, steps: int) -> dict[tuple[str, str], int]:
    """What a run of the embedded model has: 4 blocks."""
    return {("self", backend): 4 * steps, ("cross", backend): 4 * steps}


def newest(server: Server) -> int:
    return int(server.get("/attention_backends/last_run")["runs"][0]["number"])


def test_an_older_run_of_the_same_sampler_is_not_this_one(server: Server) -> None:
    graph = workflow(seed=1)
    text, report = told(server, graph.nodes)
    assert ran(report) == calls("sdpa_math", 3)
    assert report["not_counted"] == []
    assert UNPATCHED not in text

    bare = without_selector(graph)
    for steps in (3, 4):
        bare.nodes[SAMPLER]["inputs"]["steps"] = steps
        text, report = told(server, bare.nodes)
        assert report["run"] is None
        assert report["not_counted"] == [{"node_id": SAMPLER, "class_type": "KSampler", "reason": UNPATCHED}]
        assert text.splitlines() == [NO_ACCOUNT, f"node {SAMPLER} (KSampler): {UNPATCHED}"]


def test_two_workflows_with_equal_ids_stay_apart(server: Server) -> None:
    one, other = workflow(seed=2, backend="sdpa_math"), workflow(seed=2, backend="torch_sdpa", steps=2)
    assert ran(told(server, one.nodes)[1]) == calls("sdpa_math", 3)
    assert ran(told(server, other.nodes)[1]) == calls("torch_sdpa", 2)
    assert ran(told(server, one.nodes)[1]) == calls("sdpa_math", 3)

    third = without_selector(workflow(seed=2, steps=2))
    third.nodes["2"]["inputs"]["caption"] = "a small blue star"
    report = told(server, third.nodes)[1]
    assert report["run"] is None
    assert [one["reason"] for one in report["not_counted"]] == [UNPATCHED]


@pytest.mark.parametrize("renumbered", [False, True], ids=["same ids", "other ids"])
def test_a_sampler_from_the_cache_keeps_its_account(server: Server, renumbered: bool) -> None:
    graph = workflow(seed=3 + renumbered)
    first = told(server, graph.nodes)[1]
    number = newest(server)

    again = copy.deepcopy(graph)
    old = again.nodes.pop("7")  # another Report, so that it cannot come from the cache itself
    again.nodes["70"] = old
    again.nodes["8"]["inputs"]["source"][0] = again.nodes["9"]["inputs"]["source"][0] = "70"
    if renumbered:  # ComfyUI's cache does not look at ids
        again.nodes["60"] = again.nodes.pop(SAMPLER)
        old["inputs"]["samples"] = ["60", 0]
        again.nodes[SAMPLER] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    text, report = told(server, again.nodes)
    assert newest(server) == number, "the sampler ran again: this test shows nothing"
    assert report["run"] == first["run"]
    assert report["not_counted"] == []
    assert UNPATCHED not in text


def two_stages(seed: int, second_patched: bool) -> Graph:
    graph = workflow(seed)
    for number in ("7", "8", "9"):
        del graph.nodes[number]
    graph.nodes["7"] = copy.deepcopy(graph.nodes[SAMPLER])
    graph.nodes["7"]["inputs"] |= {
        "model": [SELECTOR if second_patched else MODEL, 0], "latent_image": [SAMPLER, 0], "denoise": 0.5, "steps": 2,
    }  # fmt: skip
    add_report(graph, ["7", 0])
    return graph


def test_an_unpatched_sampler_after_a_patched_one_is_named(server: Server, snapshot: SnapshotAssertion) -> None:
    text, report = told(server, two_stages(seed=5, second_patched=False).nodes)
    assert ran(report) == calls("sdpa_math", 3)
    # The selector is before it too, but only through the first sampler's latent.
    assert report["not_counted"] == [{"node_id": "7", "class_type": "KSampler", "reason": UNPATCHED}]
    lines = text.splitlines()
    assert lines[0] == f"node 7 (KSampler): {UNPATCHED}"
    assert lines[1] == snapshot
    assert lines[2].split() == ["role", "backend", "mask", "calls", "ms"]


def test_a_first_stage_from_the_cache_is_in_the_account(server: Server) -> None:
    graph = two_stages(seed=6, second_patched=True)
    assert told(server, graph.nodes)[1]["run"]["steps"] == 5
    number = newest(server)
    graph.nodes["7"]["inputs"]["steps"] = 4
    report = told(server, graph.nodes)[1]
    assert newest(server) == number + 1, "only the second stage has to run"
    assert ran(report) == calls("sdpa_math", 7)
    assert report["run"]["steps"] == 7
    assert report["not_counted"] == []


def test_signature_is_of_the_graph_and_not_of_its_numbers() -> None:
    graph = nodes_module("history.graph")
    nodes = workflow(seed=7).nodes
    mine = graph.signature(nodes, SAMPLER)
    moved = {f"1{name}": copy.deepcopy(node) for name, node in reversed(nodes.items())}
    for node in moved.values():
        node["_meta"] = {"title": "another"}
        node["inputs"] = {
            key: [f"1{value[0]}", value[1]] if isinstance(value, list) else value
            for key, value in reversed(node["inputs"].items())
        }
    assert graph.signature(moved, f"1{SAMPLER}") == mine
    for name, key, value in (
        ("1", "weight_dtype", "fp8_e4m3fn"),
        ("2", "caption", ""),
        (SAMPLER, "negative", ["2", 0]),
    ):
        changed = copy.deepcopy(nodes)
        changed[name]["inputs"][key] = value
        assert graph.signature(changed, SAMPLER) != mine, key
    downstream = copy.deepcopy(nodes)
    downstream["7"]["inputs"]["more"] = 1
    assert graph.signature(downstream, SAMPLER) == mine


def test_an_expanded_node_stands_for_its_origin() -> None:
    origin = nodes_module("history.graph").origin
    assert origin({"12:5": {}}, "12:5.0.0.3") == "12:5"
    assert origin({"12:5": {}}, "12:5") == "12:5"
    assert origin({"12:5": {}}, "7.0.0.3") is None


def test_a_node_is_told_of_the_runs_of_its_own_model(server: Server) -> None:
    """Two stages, each with a selector: what the first one made is in the second one's picture, not its patch.

    The node that compares models samples several: which of them a run was of is in no graph.
    """
    graph = Graph("")
    model, settings = embedded(graph)
    settings |= {**EMBEDDED, "steps": 2, "cfg": 1.1}  # which no other test has: nothing may come from the cache
    first, second = graph.selector(model, "torch_sdpa"), graph.selector(model, "sdpa_math")
    latent = ksampler(graph, first, **settings)
    add_report(graph, ksampler(graph, second, **{**settings, "latent_image": latent, "steps": 3}))
    compared = {"backends": "", "repeat": 1, "cfg": 1.0, "mode": "end_to_end", "model_1": first, "model_2": second}
    sampling = ("positive", "negative", "latent_image")
    compare = graph.add(
        "AttentionCompare", model=model, **compared, **{name: settings[name] for name in sampling},
        noise=graph.add("RandomNoise", noise_seed=9), sampler=graph.add("KSamplerSelect", sampler_name="euler"),
        sigmas=graph.add("BasicScheduler", model=first, scheduler="simple", steps=4, denoise=1.0),
    )  # fmt: skip
    graph.add("PreviewImage", images=output(compare, 1))
    server.run(graph.nodes)
    listed = server.get("/attention_backends/runs")["runs"]
    listed = [run for run in listed if run["prompt_id"] == listed[0]["prompt_id"]]
    found = {run["steps"]: [node["id"] for node in run["nodes"]] for run in listed if run["node_id"] != compare[0]}
    assert found[2] == [first[0]]
    assert found[3] == [second[0]]
    assert [run["nodes"] for run in listed if run["node_id"] == compare[0]][-1] == []
