"""Node Attention Record in a real server: what it puts into files, and that a record makes the same picture again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from attention_backends.comparison.metadata import PNG, texts_of
from attention_backends.comparison.replay_command import load
from attention_backends.devtools.server import Server
from browser import alerts, open_comfyui, why_no_browser
from syrupy.assertion import SnapshotAssertion
from test_panel import CANVAS_IS_SLOW
from workflow_graphs import EMBEDDED, Graph, Link, embedded, ksampler, output

pytestmark = pytest.mark.comfy
Nodes = dict[str, dict[str, Any]]


class Workflow(Graph):
    """The embedded model, nodes of ours between it and the sampler, a record, and a picture that is saved."""

    def __init__(self, seed: int, *ours: dict[str, Any]) -> None:
        super().__init__("")
        self.model, self.settings = embedded(self)
        self.seed = seed
        self.sampler = self.sample(*ours)
        self.record = self.add("AttentionRecord", value=self.picture(self.sampler))
        self.saved = self.add("SaveImage", images=self.record, filename_prefix=f"seed{seed}")
        self.add("PreviewAny", "record", source=output(self.record, 1))

    def sample(self, *ours: dict[str, Any]) -> Link:
        model = self.model
        for inputs in ours:
            model = self.add(model=model, **inputs)
        sampler = ksampler(self, model, **{**self.settings, **EMBEDDED, "steps": 4, "cfg": 1.0})
        self.nodes[sampler[0]]["inputs"]["seed"] = self.seed
        return sampler

    def picture(self, samples: Link) -> Link:
        return self.add("TinyShapesImage", samples=samples, scale=2)


def selector(backend: str, **settings: Any) -> dict[str, Any]:
    said = {"backend": backend, "accuracy": "exact", "strict": False, "guard": "off", **settings}
    return {"kind": "AttentionBackendSelector", **said}


def per_role(role: str, backend: str) -> dict[str, Any]:
    return {"kind": "PerRoleAttentionConfig", "role": role, "backend": backend, "extra": ""}


def pasted(text: str) -> dict[str, Any]:
    return {"kind": "AttentionConfigText", "text": text, "file": "none", "component": "transformer"}


def run(server: Server, nodes: Nodes, metadata: bool = True) -> dict[str, Any]:
    """Queues as the front end does, with a place for metadata; the answer is what the nodes show."""
    extra = {"extra_data": {"extra_pnginfo": {"workflow": {"nodes": []}}}} if metadata else {}
    prompt_id = server.post("/prompt", {"prompt": nodes, **extra})["prompt_id"]
    shown: dict[str, Any] = server.wait(prompt_id)["outputs"]
    return shown


def files(server: Server, shown: dict[str, Any], node: Link) -> list[Path]:
    (kind,) = (entries for name, entries in shown[node[0]].items() if name in ("images", "latents"))
    return [server.folder / one["type"] / one["subfolder"] / one["filename"] for one in kind]


def pixels(path: Path) -> bytes:
    """What a PNG holds beside its texts."""
    data, place, found = path.read_bytes(), len(PNG), b""
    while place < len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        found += data[place + 8 : place + 8 + length] if kind in (b"IHDR", b"IDAT") else b""
        place += 12 + length
    return found


def ran(server: Server) -> set[tuple[str, str, str, int]]:
    rows = server.get("/attention_backends/last_run")["runs"][0]["rows"]
    return {(row["role"], row["block"], row["backend"], row["calls"]) for row in rows}


def newest(server: Server) -> int:
    return int(server.get("/attention_backends/last_run")["runs"][0]["number"])


def test_the_record_of_a_picture_makes_it_again(server: Server) -> None:
    """A lossy kernel for one role, and another for the last step: repeated without the nodes that said so."""
    window = {"when": "steps", "window": "last 1", "blocks": "", "role": ""}
    schedule = {"kind": "AttentionSchedule", "backend": "sdpa_math", **window}
    plain = Workflow(1, selector("torch_sdpa"))
    (exact,) = files(server, run(server, plain.nodes), plain.saved)
    first = Workflow(1, selector("torch_sdpa"), per_role("cross", "emulated_int8"), schedule)
    (made,) = files(server, run(server, first.nodes), first.saved)
    assert pixels(made) != pixels(exact), "the kernels of this test do not differ"
    kernels = ran(server)
    assert {backend for _, _, backend, _ in kernels} == {"torch_sdpa", "emulated_int8", "sdpa_math"}

    record = load(made)
    assert record.text.count("from_model_call") == 4
    again = Workflow(1, pasted(json.dumps(record.data)))
    (repeated,) = files(server, run(server, again.nodes), again.saved)
    assert pixels(repeated) == pixels(made)
    assert ran(server) == kernels
    account = server.get("/attention_backends/last_run")["runs"][0]
    assert {row["source"] for row in account["rows"]} == {"record of WAN21 (text)"}
    assert account["nodes"][0]["class_type"] == "AttentionConfigText"
    assert len(account["nodes"]) == 1


def test_a_new_name_has_the_record_though_nothing_is_sampled(server: Server) -> None:
    workflow = Workflow(2, selector("sdpa_math"))
    (first,) = files(server, run(server, workflow.nodes), workflow.saved)
    number = newest(server)
    run(server, workflow.nodes)
    assert len(list(first.parent.glob("seed2_*"))) == 1, "queued twice, saved twice"

    renamed = copy.deepcopy(workflow.nodes)
    renamed[workflow.saved[0]]["inputs"]["filename_prefix"] = "another"
    (second,) = files(server, run(server, renamed), workflow.saved)
    assert newest(server) == number, "the sampler ran again: this test shows nothing"
    assert second.name.startswith("another")
    assert load(second).data == load(first).data


def test_every_stock_save_node_keeps_it(server: Server) -> None:
    workflow = Workflow(3, selector("sdpa_math"))
    frames = {"filename_prefix": "moving", "fps": 6.0}
    webp = workflow.add(
        "SaveAnimatedWEBP", images=workflow.record, lossless=True, quality=80, method="default", **frames
    )
    apng = workflow.add("SaveAnimatedPNG", images=workflow.record, compress_level=4, **frames)
    after_sampler = workflow.add("AttentionRecord", value=workflow.sampler)
    latent = workflow.add("SaveLatent", samples=after_sampler, filename_prefix="kept")
    shown = run(server, workflow.nodes)
    for node in (workflow.saved, webp, apng, latent):
        (path,) = files(server, shown, node)
        assert load(path).run_of(workflow.sampler[0]).node_id == workflow.sampler[0], path.name
        assert "workflow" in texts_of(path), path.name


def test_two_branches_and_a_sampler_without_a_node_of_ours(server: Server, snapshot: SnapshotAssertion) -> None:
    workflow = Workflow(4, selector("sdpa_math"))
    other, bare = workflow.sample(selector("emulated_int8")), workflow.sample()
    second = workflow.add("AttentionRecord", value=workflow.picture(other))
    saved = workflow.add("SaveImage", images=second, filename_prefix="other")
    third = workflow.add("AttentionRecord", value=workflow.picture(bare))
    workflow.add("SaveImage", images=third, filename_prefix="bare")
    text = workflow.add("PreviewAny", "bare", source=output(third, 1))
    shown = run(server, workflow.nodes)
    for picture, sampler, backend in ((workflow.saved, workflow.sampler, "sdpa_math"), (saved, other, "emulated_int8")):
        own = load(files(server, shown, picture)[0]).run_of(sampler[0])
        assert own.node_id == sampler[0]
        assert {choice.asked for timeline in own.timelines for choice in timeline.choices} == {backend}
    told = json.loads(shown[text[0]]["text"][0])
    assert told["runs"] == []
    (missing,) = told["not_recorded"]
    assert missing == {"node_id": bare[0], "class_type": "KSampler", "reason": snapshot}


def test_a_script_that_leaves_no_place_for_it_is_told(server: Server) -> None:
    workflow = Workflow(5, selector("sdpa_math"))
    shown = run(server, workflow.nodes, metadata=False)
    (picture,) = files(server, shown, workflow.saved)
    assert "attention_backends" not in texts_of(picture)
    assert "cannot be put into pictures" in server.log
    (text,) = (entries["text"][0] for entries in shown.values() if "text" in entries)
    again = Workflow(5, pasted(text))
    (repeated,) = files(server, run(server, again.nodes), again.saved)
    assert pixels(repeated) == pixels(picture)


@pytest.mark.browser
@pytest.mark.skipif(why_no_browser() is not None, reason=f"browser: {why_no_browser()}")
@CANVAS_IS_SLOW
def test_the_front_end_connects_it_and_its_pictures_have_the_record(server: Server, nodes_2: bool) -> None:
    workflow = Workflow(60 + nodes_2, selector("sdpa_math"))
    with open_comfyui(server.url, {"Comfy.VueNodes.Enabled": nodes_2}) as page:
        page.evaluate("async (nodes) => { await window.app.loadApiJson(nodes, 'made') }", workflow.nodes)
        page.wait_for_timeout(500)
        # The front end takes links away that it thinks do not fit.
        made = json.loads(page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)"))
        for number in (workflow.record[0], workflow.saved[0]):
            assert made[number]["inputs"] == workflow.nodes[number]["inputs"]
        assert alerts(page) == []
        page.evaluate("async () => { await window.app.queuePrompt(0) }")
        pattern = f"{workflow.nodes[workflow.saved[0]]['inputs']['filename_prefix']}_*.png"
        for _ in range(100):
            found = list((server.folder / "output").glob(pattern))
            if found:
                break
            page.wait_for_timeout(200)
        page.wait_for_timeout(300)  # until it is written
    (picture,) = found
    assert load(picture).run_of(workflow.sampler[0]).timelines[0].choices[0].asked == "sdpa_math"
    assert {"workflow", "prompt"} <= set(texts_of(picture))
