"""The shipped workflows: complete, equal to what they are made from, and good in the real server and front end."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from attention_backends.devtools.server import Server
from browser import alerts, load_workflow, missing_nodes, open_comfyui, ours, why_no_browser
from make_workflows import API_FORM, MOST_BYTES, TITLES, UI_FORM, WORKFLOWS, notes, ui_file, values
from PIL import Image, ImageChops
from server_harness import ROOT, start_server
from syrupy.assertion import SnapshotAssertion
from workflow_families import FAMILY_WORKFLOWS, TEMPLATES
from workflow_graphs import EMBEDDED_WORKFLOWS

SEEDED = ("KSampler", "KSamplerAdvanced", "RandomNoise", "AttentionBenchmark", "PrimitiveInt")
FILE_INPUTS = {
    "unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name", "ckpt_name", "text_encoder", "lora_name",
    "model_name",
}  # fmt: skip
BENCHMARK_GRAPHS = sorted(path.stem for path in (ROOT / "benchmarks" / "graphs").iterdir())
OURS = ("AttentionBackendSelector", "PerRoleAttentionConfig", "Attention")
SMALLEST = 8 / 14
"""The front end draws no text below 8 pixels; that of nodes has 14."""
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

every_workflow = pytest.mark.parametrize("name", WORKFLOWS)


def saved(name: str) -> dict[str, Any]:
    workflow: dict[str, Any] = json.loads(ui_file(name).read_text(encoding="utf-8"))
    return workflow


def api_form(name: str) -> dict[str, Any]:
    nodes: dict[str, Any] = json.loads((API_FORM / f"{name}.json").read_text(encoding="utf-8"))
    return nodes


def test_files_pair_up() -> None:
    """Nothing else may lie there: ComfyUI lists every JSON of the folder as a template."""
    assert set(TITLES) == set(WORKFLOWS)
    expected = {f"{title}{suffix}" for title in TITLES.values() for suffix in (".json", ".jpg")}
    assert {path.name for path in UI_FORM.iterdir()} == expected
    assert {path.name for path in API_FORM.iterdir()} == {f"{name}.json" for name in WORKFLOWS}


def test_docs_name_templates_that_are_there() -> None:
    """In each language; a page may leave out the number and what follows the name in brackets."""
    pages = {path: path.read_text(encoding="utf-8") for path in (ROOT / "web" / "docs").rglob("*.md")}
    pages[ROOT / "README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    words = "template|\u6a21\u677f|\u30c6\u30f3\u30d7\u30ec\u30fc\u30c8|\ud15c\ud50c\ub9bf"
    named = [(path, name) for path, text in pages.items() for name in re.findall(rf"(?:{words})\s?\*([^*]+)\*", text)]
    assert len(named) >= 4 * 7
    for path, name in named:
        assert any(name in title for title in TITLES.values()), (path, name)


@every_workflow
def test_api_form_is_up_to_date(name: str) -> None:
    assert api_form(name) == WORKFLOWS[name]().nodes, "run: python tests/make_workflows.py"


@every_workflow
def test_saved_form_is_flat_and_draws_a_new_seed_for_each_run(name: str) -> None:
    """With the same seed ComfyUI answers from its cache, so that no time after the first run would be a warm one."""
    workflow = saved(name)
    assert {"nodes", "links", "groups", "version"} <= set(workflow)
    assert "definitions" not in workflow  # subgraphs
    # A label that is saved hides the one in the page's language.
    assert not any("label" in entry for node in workflow["nodes"] for entry in node.get("inputs", ()))
    types = sorted(node["type"] for node in workflow["nodes"])
    assert types == sorted([*(node["class_type"] for node in api_form(name).values()), "MarkdownNote"])
    fixed = [int(number) for number in WORKFLOWS[name]().fixed]
    seeded = [node for node in workflow["nodes"] if node["type"] in SEEDED and not seed_is_linked(node)]
    assert seeded
    for node in seeded:
        assert ("fixed" if node["id"] in fixed else "randomize") in node["widgets_values"], node["type"]
    if name not in ("text_and_record", "benchmark"):  # the record repeats a picture; the benchmark warms up by itself
        assert any(node["id"] not in fixed for node in seeded)


def seed_is_linked(node: dict[str, Any]) -> bool:
    return any(entry["name"] in ("seed", "noise_seed") and entry["link"] is not None for entry in node["inputs"])


@every_workflow
def test_the_note_is_that_of_the_workflow_and_short(name: str) -> None:
    assert notes(saved(name)) == [WORKFLOWS[name]().about], "run: python tests/make_workflows.py --ui"
    assert len(WORKFLOWS[name]().about) <= 240


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_is_comfyuis_own_template_with_few_nodes_of_ours(name: str) -> None:
    """Each node, file and number is in ComfyUI's template of this model, where that is installed."""
    nodes = api_form(name).values()
    assert 1 <= sum(node["class_type"].startswith(OURS) for node in nodes) <= 3
    spec = importlib.util.find_spec("comfyui_workflow_templates_json")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("comfyui-workflow-templates-json is not installed")
    path = Path(spec.submodule_search_locations[0]) / "templates" / f"{TEMPLATES[name]}.json"
    theirs = json.loads(path.read_text(encoding="utf-8"))
    graphs = [theirs, *theirs["definitions"]["subgraphs"]]
    known: dict[str, set[Any]] = {}
    for node in (node for graph in graphs for node in graph["nodes"]):
        given = node.get("widgets_values") or []
        known.setdefault(node["type"], set()).update(round(x, 6) if isinstance(x, float) else x for x in given)
    anywhere = set().union(*known.values())
    ours = [node for node in nodes if not node["class_type"].startswith(OURS)]
    assert {node["class_type"] for node in ours} <= set(known)
    free = ("text", "filename_prefix", "noise_seed", "seed", "width", "height", "format.codec", "bit_depth")
    for node in ours:
        for entry, value in node["inputs"].items():
            if not isinstance(value, list) and entry not in free:
                # Steps, cfg and rates come from nodes of their own there.
                assert value in (anywhere if isinstance(value, (int, float)) else known[node["class_type"]]), entry


@pytest.mark.parametrize("name", FAMILY_WORKFLOWS)
def test_the_front_end_can_offer_each_file(name: str) -> None:
    files = [file for node in saved(name)["nodes"] for file in node.get("properties", {}).get("models", ())]
    for file in files:
        assert file["url"].startswith("https://huggingface.co/")
        assert file["url"].endswith(f"/{file['name']}")
    asked = {
        value for node in api_form(name).values() for entry, value in node["inputs"].items() if entry in FILE_INPUTS
    }
    assert asked == {file["name"] for file in files}


@pytest.mark.comfy
def test_every_node_is_in_a_workflow_that_runs_anywhere(server: Server) -> None:
    ours = {
        name
        for name, info in server.get("/object_info").items()
        if info["python_module"].endswith(ROOT.name) and not info["deprecated"]
    }
    assert "AttentionBackendSelector" in ours
    assert ours <= {node["class_type"] for name in EMBEDDED_WORKFLOWS for node in api_form(name).values()}


@every_workflow
def test_thumbnail_is_a_small_jpeg(name: str) -> None:
    data = ui_file(name).with_suffix(".jpg").read_bytes()
    assert data[:3] == b"\xff\xd8\xff"
    assert len(data) <= MOST_BYTES


@pytest.mark.comfy
def test_templates_are_listed_with_thumbnails(server: Server) -> None:
    assert set(server.get("/api/workflow_templates")[ROOT.name]) == set(TITLES.values())
    for name in WORKFLOWS:
        address = f"/api/workflow_templates/{ROOT.name}/{quote(TITLES[name])}"
        assert server.get(f"{address}.json") == saved(name)
        with _open(f"{server.url}{address}.jpg", timeout=60) as answer:
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
    assert len(lines) == 4, "this model has no attention that is not counted"


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
        # No figures: a time or a PSNR here would be another kernel's.
        _, result, *figures = re.split(r"\s{2,}", rows[name].strip())
        assert result == "did not run", table
        assert set(figures) == {"-"}, table
        assert f"\nNote: {name}: " in table


@pytest.mark.comfy
def test_branches_by_hand_run_and_no_fallback_bears_another_name(server: Server, snapshot: SnapshotAssertion) -> None:
    lines = shown(server, "compare_sdpa_cudnn_sage").splitlines()
    assert lines[1].startswith("torch_sdpa ")
    assert "reference" in lines[1]
    for line, note, name in zip(lines[2:4], lines[4:6], ("cudnn_attn", "sage_attn"), strict=True):
        assert re.split(r"\s{2,}", line)[:2] == [f"{name} -> torch_sdpa", "fell back"]
        assert note.startswith(f"Note: {name} -> torch_sdpa: ")
        assert note.partition("fell back: ")[2] == snapshot(name=name)


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
@pytest.mark.parametrize("name", BENCHMARK_GRAPHS)
def test_graphs_of_the_benchmark_lack_nothing_but_files(server: Server, name: str) -> None:
    nodes = json.loads((ROOT / "benchmarks" / "graphs" / f"{name}.json").read_text(encoding="utf-8"))
    report = next(number for number, node in nodes.items() if node["class_type"] == "AttentionReport")
    nodes["shown"] = {"class_type": "PreviewAny", "inputs": {"source": [report, 2]}}
    found = refusal(server, nodes)
    assert {(kind, entry in FILE_INPUTS) for kind, entry, _ in found} == {("value_not_in_list", True)}, found


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


BEHIND = (ROOT / "tests" / "links_behind_nodes.js").read_text(encoding="utf-8")
OVERLAPS = """() => {
    const frames = window.app.graph.nodes.map((node) => {
        const drawn = document.querySelector(`[data-node-id="${node.id}"]`)
        const [x, y, width, height] = drawn ? Object.values(drawn.getBoundingClientRect().toJSON()) : node.getBounding()
        return [node.title, x, y, x + width, y + height]
    })
    return frames.flatMap(([one, x, y, right, low], at) => frames.slice(at + 1)
        .filter(([, left, top, far, deep]) => left < right - 1 && far > x + 1 && top < low - 1 && deep > y + 1)
        .map(([other]) => `${one} over ${other}`))
}"""
OUTSIDE = """() => {
    const { ds, canvas, graph } = window.app.canvas
    const width = canvas.width / window.devicePixelRatio
    const seen = (node) => node.pos[0] + ds.offset[0] >= 0 && node.pos[0] + node.size[0] + ds.offset[0] <= width
        && node.pos[1] + ds.offset[1] >= 0
    const first = graph.nodes.filter((node) => /^(UNETLoader|CheckpointLoaderSimple|AttentionBackendS)/.test(node.type))
    return [ds.scale, first.filter((node) => !seen(node)).map((node) => node.title), first.length]
}"""


def opened_as_template(page: Any, name: str) -> float:
    """Opens a workflow as the dialog of templates does; returns the zoom."""
    script = """async ([workflow, name]) => {
        await window.app.loadGraphData(workflow, true, true, name, { openSource: 'template' })
        return window.app.canvas.ds.scale
    }"""
    return float(page.evaluate(script, [saved(name), TITLES[name]]))


@pytest.mark.comfy
@pytest.mark.browser
@pytest.mark.skipif(why_no_browser() is not None, reason=f"browser: {why_no_browser()}")
@pytest.mark.parametrize("nodes_2", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["canvas", "nodes_2.0"])
def test_every_workflow_opens_in_the_front_end(server_with_files: Server, nodes_2: bool) -> None:
    with open_comfyui(server_with_files.url, {"Comfy.VueNodes.Enabled": nodes_2}) as page:
        assert bool(page.evaluate("() => window.LiteGraph.vueNodesMode")) is nodes_2
        for name in WORKFLOWS:
            load_workflow(page, saved(name))
            assert missing_nodes(page) == [], name
            assert alerts(page) == [], name
            made = json.loads(page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)"))
            assert values(made) == values(api_form(name)), name

            # The loaders of models and our node are there at 100 %, nothing lies over anything.
            scale, outside, asked = page.evaluate(OUTSIDE)
            assert (scale, outside) == (1, []), name
            assert asked or name == "benchmark"
            assert page.evaluate(OVERLAPS) == [], name
            # From the dialog the front end shows the whole graph, in a window of 1600 pixels with text still drawn.
            assert opened_as_template(page, name) >= SMALLEST, name
            if not nodes_2:
                assert page.evaluate(BEHIND) == [], name
        assert ours(page) == []

        # The checks above can fail: a node that does not exist, or that stands on another and on a link, is seen.
        broken = saved("per_role")
        broken["nodes"][0]["type"] = "NoSuchNode"
        load_workflow(page, broken)
        assert missing_nodes(page) == ["NoSuchNode"]
        assert alerts(page)
        load_workflow(page, saved("per_role"))
        page.evaluate("""() => {
            const { canvas, graph } = window.app
            graph.nodes.find((one) => one.type === 'KSampler').pos = [340, 40]
            canvas.setDirty(true, true)
        }""")
        page.wait_for_timeout(300)
        assert page.evaluate(OVERLAPS)
        if not nodes_2:
            assert page.evaluate(BEHIND)


@pytest.mark.comfy
@pytest.mark.browser
@pytest.mark.skipif(why_no_browser() is not None, reason=f"browser: {why_no_browser()}")
def test_the_dialog_lists_them_in_order_and_the_comparison_runs(server: Server) -> None:
    with open_comfyui(server.url, {"Comfy.Templates.SortBy": "alphabetical"}) as page:
        page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        dialog = page.get_by_role("dialog")
        dialog.get_by_text(ROOT.name, exact=True).click()
        cards = dialog.locator("[data-testid^=template-workflow-]")
        cards.first.wait_for()
        dialog.get_by_text(TITLES["compare_sdpa_cudnn_sage"], exact=True).first.wait_for()
        ids = cards.evaluate_all("(cards) => cards.map((card) => card.dataset.testid)")
        shown = [one.removeprefix("template-workflow-") for one in ids]
        assert sorted(shown) == sorted(TITLES.values())
        # Newer front ends put names that begin with a number behind the others, older ones before.
        assert [title for title in shown if title[0].isdigit()] == [t for t in TITLES.values() if t[0].isdigit()]
        dialog.get_by_text(TITLES["compare_sdpa_cudnn_sage"], exact=True).first.click()
        page.wait_for_function("() => window.app.graph.nodes.some((node) => node.type === 'AttentionComparison')")

        # A second run samples again, so that its times are warm: the one seed of all branches is a new one.
        samplers = {
            number for number, node in api_form("compare_sdpa_cudnn_sage").items() if node["class_type"] == "KSampler"
        }
        for _ in range(2):
            done = set(server.get("/history"))
            page.evaluate("() => window.app.queuePrompt(0)")
            while not (new := set(server.get("/history")) - done):
                page.wait_for_timeout(200)
            status = server.get("/history")[new.pop()]["status"]
            assert status["status_str"] == "success"
            cached = next(said["nodes"] for kind, said in status["messages"] if kind == "execution_cached")
        assert not samplers & set(cached)
        table = "() => window.app.graph.nodes.find((node) => node.title === 'Table').widgets.map((one) => one.value)"
        assert "torch_sdpa" in str(page.evaluate(table))
        assert alerts(page) == []
        assert ours(page) == []
