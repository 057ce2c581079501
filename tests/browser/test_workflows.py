"""The shipped workflows: complete, equal to what they are made from, and good in the real server and front end."""

from __future__ import annotations

import copy
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attention_backends.devtools.server import Server
from browser import alerts, load_workflow, missing_nodes, open_comfyui, ours, why_no_browser
from make_workflows import API_FORM, MOST_BYTES, UI_FORM, WORKFLOWS, notes, values
from PIL import Image, ImageChops
from server_harness import ROOT, start_server
from syrupy.assertion import SnapshotAssertion
from workflow_families import FAMILY_WORKFLOWS
from workflow_graphs import EMBEDDED_WORKFLOWS

SEEDED = ("KSampler", "KSamplerAdvanced", "RandomNoise", "AttentionBenchmark")
FILE_INPUTS = {"unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name", "ckpt_name", "text_encoder"}
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

every_workflow = pytest.mark.parametrize("name", WORKFLOWS)


def saved(name: str) -> dict[str, Any]:
    workflow: dict[str, Any] = json.loads((UI_FORM / f"{name}.json").read_text(encoding="utf-8"))
    return workflow


def api_form(name: str) -> dict[str, Any]:
    nodes: dict[str, Any] = json.loads((API_FORM / f"{name}.json").read_text(encoding="utf-8"))
    return nodes


def test_files_pair_up() -> None:
    """Nothing else may lie there: ComfyUI lists every JSON of the folder as a template."""
    expected = {f"{name}{suffix}" for name in WORKFLOWS for suffix in (".json", ".jpg")}
    assert {path.name for path in UI_FORM.iterdir()} == expected
    assert {path.name for path in API_FORM.iterdir()} == {f"{name}.json" for name in WORKFLOWS}


@every_workflow
def test_api_form_is_up_to_date(name: str) -> None:
    assert api_form(name) == WORKFLOWS[name]().nodes, "run: python tests/make_workflows.py"


@every_workflow
def test_saved_form_is_flat_and_keeps_its_seed(name: str) -> None:
    workflow = saved(name)
    assert {"nodes", "links", "groups", "version"} <= set(workflow)
    assert "definitions" not in workflow  # subgraphs
    types = sorted(node["type"] for node in workflow["nodes"])
    assert types == sorted([*(node["class_type"] for node in api_form(name).values()), "MarkdownNote"])
    seeded = [node for node in workflow["nodes"] if node["type"] in SEEDED]
    assert seeded
    assert all("fixed" in node["widgets_values"] for node in seeded)


@every_workflow
def test_the_note_is_that_of_the_workflow(name: str) -> None:
    assert notes(saved(name)) == [WORKFLOWS[name]().about], "run: python tests/make_workflows.py --ui"


@pytest.mark.comfy
def test_every_node_is_in_a_workflow_that_runs_anywhere(server: Server) -> None:
    ours = {name for name, info in server.get("/object_info").items() if info["python_module"].endswith(ROOT.name)}
    assert "AttentionBackendSelector" in ours
    assert ours <= {node["class_type"] for name in EMBEDDED_WORKFLOWS for node in api_form(name).values()}


@every_workflow
def test_thumbnail_is_a_small_jpeg(name: str) -> None:
    data = (UI_FORM / f"{name}.jpg").read_bytes()
    assert data[:3] == b"\xff\xd8\xff"
    assert len(data) <= MOST_BYTES


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with start_server(extra_nodes=()) as running:
        yield running


@pytest.mark.comfy
def test_templates_are_listed_with_thumbnails(server: Server) -> None:
    assert set(server.get("/api/workflow_templates")[ROOT.name]) == set(WORKFLOWS)
    for name in WORKFLOWS:
        assert server.get(f"/api/workflow_templates/{ROOT.name}/{name}.json") == saved(name)
        with _open(f"{server.url}/api/workflow_templates/{ROOT.name}/{name}.jpg", timeout=60) as answer:
            assert answer.headers["Content-Type"] == "image/jpeg"


def shown(server: Server, name: str) -> str:
    """Runs a workflow; asserts that its picture is there, and returns its text."""
    nodes = api_form(name)
    outputs = server.run(nodes)["outputs"]
    by_kind = {node["class_type"]: outputs[number] for number, node in nodes.items() if number in outputs}
    image = next(by_kind[kind] for kind in ("PreviewImage", "SaveImage", "AttentionBenchmark") if kind in by_kind)
    image = image["images"][0]
    assert (server.folder / image["type"] / image["subfolder"] / image["filename"]).stat().st_size > 1000
    return str(by_kind["PreviewAny"]["text"][0])


@pytest.mark.comfy
def test_per_role_runs_and_reports_each_role(server: Server, snapshot: SnapshotAssertion) -> None:
    lines = [line.split() for line in shown(server, "per_role").splitlines()]
    # 4 blocks and 20 steps; both prompts go through the model as one batch.
    assert lines[0] == ["role", "backend", "mask", "calls", "ms"]
    assert [line[:4] for line in lines[1:3]] == [
        ["self", "torch_sdpa", "none", "80"],
        ["cross", "sdpa_math", "none", "80"],
    ]
    assert " ".join(lines[3]) == snapshot
    assert " ".join(lines[4]) == snapshot
    assert len(lines) == 5


@pytest.mark.comfy
def test_schedule_runs_the_first_and_last_steps_exactly(server: Server) -> None:
    lines = [line.split() for line in shown(server, "schedule").splitlines()]
    # 4 blocks, 20 steps: 2 at each end, and 16 between.
    assert sorted(line[:4] for line in lines[1:5]) == [
        ["cross", "emulated_int8", "none", "64"],
        ["cross", "torch_sdpa", "none", "16"],
        ["self", "emulated_int8", "none", "64"],
        ["self", "torch_sdpa", "none", "16"],
    ]


@pytest.mark.comfy
def test_a_record_in_place_of_the_text_repeats_the_picture(server: Server) -> None:
    nodes = api_form("text_and_record")
    record = shown(server, "text_and_record")
    ran = {
        (decision["role"], part["backend"])
        for decision in json.loads(record)["runs"][0]["decisions"]
        for part in decision["ran"]
    }
    assert ran == {("self", "torch_sdpa"), ("cross", "sdpa_math")}
    number = next(number for number, node in nodes.items() if node["class_type"] == "AttentionConfigText")
    nodes[number]["inputs"]["text"] = record
    saved_as = next(number for number, node in nodes.items() if node["class_type"] == "SaveImage")
    outputs = server.run(nodes)["outputs"]
    files = [server.folder / "output" / f"attention_record_{number:05}_.png" for number in (1, 2)]
    assert outputs[saved_as]["images"][0]["filename"] == files[1].name
    first, second = (Image.open(file) for file in files)
    assert ImageChops.difference(first, second).getbbox() is None


@pytest.mark.comfy
def test_benchmark_measures_what_runs_here(server: Server) -> None:
    table = shown(server, "benchmark")
    assert "hv15, no mask" in table
    assert "torch_sdpa" in table


@pytest.mark.comfy
def test_compare_node_runs_and_says_what_could_not(server: Server) -> None:
    table = shown(server, "compare_node")
    rows = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert {"torch_sdpa", "comfy", "sdpa_math", "emulated_int8", "cudnn_attn", "sage_attn"} <= set(rows)
    assert "reference" in rows["torch_sdpa"]
    for name in ("cudnn_attn", "sage_attn"):
        # Only the reason: a time or a PSNR here would be another kernel's.
        assert set(rows[name].split("device cpu not")[0].split()) == {name, "-"}, table


@pytest.mark.comfy
def test_branches_by_hand_run_and_no_fallback_bears_another_name(server: Server, snapshot: SnapshotAssertion) -> None:
    lines = shown(server, "compare_sdpa_cudnn_sage").splitlines()
    assert lines[1].startswith("torch_sdpa ")
    assert "reference" in lines[1]
    for line, name in zip(lines[2:4], ("cudnn_attn", "sage_attn"), strict=True):
        assert line.startswith(f"{name} -> torch_sdpa ")
        assert line.partition("fell back: ")[2] == snapshot(name=name)


def refusal(server: Server, nodes: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(kind of error, input, value) of everything that ComfyUI has against a workflow."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post("/prompt", {"prompt": nodes})
    answer = json.loads(caught.value.read())
    found = [error for node in answer["node_errors"].values() for error in node["errors"]]
    infos = [(error["type"], error.get("extra_info", {})) for error in found]
    return [(kind, info.get("input_name", ""), str(info.get("received_value", ""))) for kind, info in infos]


@pytest.mark.comfy
@pytest.mark.parametrize("name", FAMILY_WORKFLOWS)
def test_real_models_lack_nothing_but_their_files(server: Server, name: str) -> None:
    found = refusal(server, api_form(name))
    assert {(kind, entry in FILE_INPUTS) for kind, entry, _ in found} == {("value_not_in_list", True)}, found
    assert {value for _, _, value in found} == {Path(file).name for file in WORKFLOWS[name]().files}


@pytest.mark.comfy
def test_a_wrong_setting_would_be_seen_beside_missing_files(server: Server) -> None:
    nodes = copy.deepcopy(api_form("compare_qwen_image"))
    sampler = next(node for node in nodes.values() if node["class_type"] == "KSampler")
    sampler["inputs"] |= {"steps": "many", "sampler_name": "no such sampler"}
    kinds = {(kind, entry) for kind, entry, _ in refusal(server, nodes)}
    assert {("invalid_input_type", "steps"), ("value_not_in_list", "sampler_name")} <= kinds


@pytest.fixture(scope="module")
def server_with_files() -> Iterator[Server]:
    """Empty model files: the front end only asks whether they are there, so anything it then says is our fault."""

    def fill(_: Path, folder: Path) -> None:
        for file in {file for build in WORKFLOWS.values() for file in build().files}:
            (folder / "models" / file).parent.mkdir(exist_ok=True)
            (folder / "models" / file).touch()

    with start_server(extra_nodes=(), fill=fill) as running:
        yield running


@pytest.mark.comfy
@pytest.mark.browser
@pytest.mark.skipif(why_no_browser() is not None, reason=f"browser: {why_no_browser()}")
@pytest.mark.parametrize("nodes_2", [False, True], ids=["canvas", "nodes_2.0"])
def test_every_workflow_opens_in_the_front_end(server_with_files: Server, tmp_path: Path, nodes_2: bool) -> None:
    with open_comfyui(server_with_files.url, tmp_path, {"Comfy.VueNodes.Enabled": nodes_2}) as page:
        assert bool(page.evaluate("() => window.LiteGraph.vueNodesMode")) is nodes_2
        for name in WORKFLOWS:
            load_workflow(page, saved(name))
            assert missing_nodes(page) == [], name
            assert alerts(page) == [], name
            made = json.loads(page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)"))
            assert values(made) == values(api_form(name)), name
        assert ours(page) == []

        # The checks above can fail: a node that does not exist is seen by both.
        broken = saved("per_role")
        broken["nodes"][0]["type"] = "NoSuchNode"
        load_workflow(page, broken)
        assert missing_nodes(page) == ["NoSuchNode"]
        assert alerts(page)
