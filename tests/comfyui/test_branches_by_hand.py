"""Attention Report and Attention Comparison on branches that a person built, through the real server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from attention_backends.devtools.server import Server, WorkflowError
from syrupy.assertion import SnapshotAssertion
from workflow_graphs import EMBEDDED, Graph, Link, embedded, ksampler, output

pytestmark = pytest.mark.comfy


def text_of(server: Server, graph: Graph, link: Link) -> str:
    """Runs a graph and returns the text that a link carries."""
    [number, _] = graph.add("PreviewAny", source=link)
    return str(server.run(graph.nodes)["outputs"][number]["text"][0])


def branch(graph: Graph, model: Link, settings: dict[str, Any], **changed: Any) -> tuple[Link, Link]:
    """A sampler of four steps on `model`: its picture, and its report as JSON."""
    samples = ksampler(graph, model, **{**settings, **EMBEDDED, "steps": 4})
    graph.nodes[samples[0]]["inputs"] |= changed
    report = graph.add("AttentionReport", samples=samples)
    return graph.add("TinyShapesImage", samples=report, scale=4), output(report, 2)


def compare(graph: Graph, *pairs: tuple[Link, Link], **more: Any) -> Link:
    """The table of an Attention Comparison."""
    inputs: dict[str, Any] = {}
    for number, (image, report) in enumerate(pairs, start=1):
        inputs |= {f"image_{number}": image, f"report_{number}": report}
    return output(graph.add("AttentionComparison", **inputs, **more), 1)


def test_two_stages_are_one_account(server: Server) -> None:
    graph = Graph("")
    model, settings = embedded(graph)
    settings |= {**EMBEDDED, "steps": 5, "noise_seed": 1, "return_with_leftover_noise": "enable"}
    first = graph.add(
        "KSamplerAdvanced", model=graph.selector(model, "torch_sdpa"),
        **{**settings, "add_noise": "enable", "start_at_step": 0, "end_at_step": 2},
    )  # fmt: skip
    second = graph.add(
        "KSamplerAdvanced", model=graph.selector(model, "sdpa_math"),
        **{**settings, "add_noise": "disable", "start_at_step": 2, "end_at_step": 5, "latent_image": first},
    )  # fmt: skip
    report = graph.add("AttentionReport", samples=second)
    run = json.loads(text_of(server, graph, output(report, 2)))["run"]
    assert run["steps"] == 5
    assert run["seconds"] > 0
    calls = [(row["role"], row["backend"], row["calls"]) for row in run["rows"]]
    totals = {key: sum(count for *k, count in calls if tuple(k) == key) for key in {tuple(k) for *k, _ in calls}}
    assert totals == {
        ("self", "torch_sdpa"): 8, ("cross", "torch_sdpa"): 8, ("self", "sdpa_math"): 12, ("cross", "sdpa_math"): 12,
    }  # fmt: skip


def test_a_fallback_of_some_calls_is_a_note_and_of_all_a_failed_row(
    server: Server, snapshot: SnapshotAssertion
) -> None:
    graph = Graph("")
    model, settings = embedded(graph)
    plain = graph.selector(model, "torch_sdpa")
    mixed = graph.add("PerRoleAttentionConfig", model=plain, role="cross", backend="cudnn_attn", extra="")
    branches = [branch(graph, each, settings) for each in (plain, mixed, graph.selector(model, "sage_attn"))]
    table = text_of(server, graph, compare(graph, *branches, label_3="my fast one")).splitlines()
    assert table[2].split()[:5] == ["torch_sdpa", "+", "cudnn_attn", "->", "torch_sdpa"]
    assert "bit-identical" in table[2]
    # A label of one's own does not hide what ran.
    assert table[3].split()[:5] == ["my", "fast", "one", "->", "torch_sdpa"]
    assert "  fell back  " in table[3]
    reason = next(line for line in table if line.startswith("Note: my fast one"))
    assert reason.partition("fell back")[2] == snapshot
    assert next(line for line in table if line.startswith("Note: branch 2")) == snapshot


def test_branches_that_differ_in_more_than_attention_are_refused(server: Server, snapshot: SnapshotAssertion) -> None:
    graph = Graph("")
    model, settings = embedded(graph)
    first = branch(graph, graph.selector(model, "torch_sdpa"), settings)
    second = branch(graph, graph.selector(model, "sdpa_math"), settings, seed=43)
    with pytest.raises(WorkflowError) as caught:
        text_of(server, graph, compare(graph, first, second))
    assert str(caught.value).splitlines()[0] == snapshot
    graph.nodes[second[0][0]]["inputs"]["scale"] = 8
    with pytest.raises(WorkflowError) as caught:
        text_of(server, graph, compare(graph, first, second))
    assert str(caught.value).splitlines()[0] == snapshot


def test_without_reports_the_table_says_that_nothing_was_checked(server: Server, snapshot: SnapshotAssertion) -> None:
    graph = Graph("")
    model, settings = embedded(graph)
    images = [branch(graph, graph.selector(model, name), settings)[0] for name in ("torch_sdpa", "sdpa_math")]
    comparison = graph.add("AttentionComparison", image_1=images[0], image_2=images[1], label_2="cuDNN")
    table = text_of(server, graph, output(comparison, 1))
    assert [line for line in table.splitlines() if line.startswith("Note: ")] == snapshot
    assert "branch 1" in table


def test_a_sampler_that_is_not_counted_is_named(server: Server, snapshot: SnapshotAssertion) -> None:
    graph = Graph("")
    model, settings = embedded(graph)
    patched = graph.selector(model, "torch_sdpa")
    first = branch(graph, patched, settings)
    second = branch(graph, model, settings)
    sampler = next(number for number, node in graph.nodes.items() if node["inputs"].get("model") == model
                   and node["class_type"] == "KSampler")  # fmt: skip
    table = text_of(server, graph, compare(graph, first, second)).splitlines()
    note = next(line for line in table if line.startswith("Note: branch 2"))
    assert f"node {sampler} (KSampler)" in note
    assert note == snapshot
    assert not any(line.startswith("Note: branch 1: node") for line in table)
