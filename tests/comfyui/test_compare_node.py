"""Compare Attention Backends in a running ComfyUI: one step, progress, cancelling, memory that ends, wrong input."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

pytest.importorskip("torch", reason="torch is not installed")
aiohttp = pytest.importorskip("aiohttp", reason="aiohttp, which ComfyUI needs, is not installed")

from attention_backends.devtools.server import Server, WorkflowError  # noqa: E402
from test_bad_input import without_names  # noqa: E402

pytestmark = pytest.mark.comfy
NODES = Path(__file__).parents[1] / "server_nodes"
OUR_NODE = "compare"


@pytest.fixture(scope="module")
def server(tiny_models_server: Server) -> Server:
    return tiny_models_server


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph(steps: int = 3, seed: int = 3, shaky: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "noise": ["noise", 0], "sampler": ["sampler", 0], "sigmas": ["sigmas", 0], "latent_image": ["tiny", 3],
        "backends": "sdpa_math", "mode": "end_to_end", "repeat": 1, "cfg": 1.0,
        "model": ["tiny", 0], "positive": ["tiny", 1], "negative": ["tiny", 2],
    }  # fmt: skip
    nodes = {
        "tiny": node("TinyModel", family="wan"),
        "noise": node("RandomNoise", noise_seed=seed),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=["tiny", 0], scheduler="simple", steps=steps, denoise=1.0),
        OUR_NODE: node("AttentionCompare", **{**settings, **changes}),
        "picture": node("PreviewImage", images=[OUR_NODE, 1]),
        "table": node("PreviewAny", source=[OUR_NODE, 2]),
        "report": node("PreviewAny", source=[OUR_NODE, 3]),
    }
    if shaky is not None:
        settings = {"seconds": 0.0, "no_memory_at": 0, "cancel_after": 0, **shaky}
        nodes["shaky"] = node("ShakyModel", model=["tiny", 0], **settings)
        nodes[OUR_NODE]["inputs"]["model_1"] = ["shaky", 0]
    return nodes


def report_of(server: Server, nodes: dict[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(server.run(nodes)["outputs"]["report"]["text"][0])
    return report


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["asked"]: row for row in report["rows"]}


def watched(server: Server, nodes: dict[str, Any], on_progress: Callable[[int, int], None] | None = None) -> Any:
    """Run a graph as a page does: the last message, and (value, max) of each progress message of our node."""

    async def follow() -> tuple[str, list[tuple[int, int]]]:
        seen: list[tuple[int, int]] = []
        address = server.url.replace("http", "ws", 1) + "/ws?clientId=test"
        async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
            prompt = server.post("/prompt", {"prompt": nodes, "client_id": "test"})["prompt_id"]
            while True:
                message = await asyncio.wait_for(socket.receive(), 240)
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue  # previews are binary
                told = json.loads(message.data)
                data = told["data"]
                if data.get("prompt_id") not in (prompt, None):
                    continue
                if told["type"] == "progress" and data["node"] == OUR_NODE:
                    seen.append((data["value"], data["max"]))
                    if on_progress is not None:
                        on_progress(*seen[-1])
                if told["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    return told["type"], seen

    return asyncio.run(follow())


def test_one_step_starts_every_row_from_the_same_half_finished_latent(server: Server) -> None:
    report = report_of(server, graph(steps=6, mode="one_step", backends="sdpa_math, emulated_int8"))
    rows = rows_of(report)
    assert (report["mode"], report["steps"]) == ("one_step", 1)
    assert rows["comfy"]["identical"]
    assert 0 <= rows["sdpa_math"]["relative_l2"] < 1e-5 < rows["emulated_int8"]["relative_l2"] < 0.1
    assert rows["torch_sdpa"]["step_ms"]["count"] == 1
    whole = rows_of(report_of(server, graph(steps=6, backends="emulated_int8")))
    assert rows["emulated_int8"]["relative_l2"] < whole["emulated_int8"]["relative_l2"], "sampling amplifies it"


def test_one_step_of_a_single_step_starts_from_the_noise(server: Server) -> None:
    """There is no half-finished latent then; the finished one would be noised and stepped a second time."""
    one, whole = (
        report_of(server, graph(steps=1, mode=mode, backends="emulated_int8")) for mode in ("one_step", "end_to_end")
    )
    assert one["steps"] == whole["steps"] == 1
    assert one["sampling"] == whole["sampling"]
    # The very same step: equal numbers to the last digit, from the same noise.
    for key in ("relative_l2", "psnr", "cosine"):
        assert rows_of(one)["emulated_int8"][key] == rows_of(whole)["emulated_int8"][key] != 0


def test_progress_rises_to_its_maximum_also_past_a_row_that_fails(server: Server) -> None:
    # Three rows that run: a warm-up step each, then two rounds of three steps. The fourth falls out in its first run.
    nodes = graph(repeat=2, backends="sdpa_math, cudnn_attn", seed=4, shaky={"no_memory_at": 2, "seconds": 0.1})
    ended, seen = watched(server, nodes)
    assert ended == "execution_success"
    values = [value for value, _ in seen]
    assert {most for _, most in seen} == {4 + 2 * 3 * 4}
    assert values == sorted(values)
    assert len(set(values)) >= 3, "ComfyUI sends them at intervals, so not each"
    assert values[-1] == 4 + 2 * 3 * 4


def test_out_of_memory_in_the_second_run_keeps_what_was_finished(server: Server, snapshot: SnapshotAssertion) -> None:
    # The warm-up is one call and a run three: the sixth call is in the second run.
    record = server.run(graph(repeat=3, seed=5, shaky={"no_memory_at": 6}))["outputs"]
    rows = rows_of(json.loads(record["report"]["text"][0]))
    assert rows["model_1"]["failed"] == snapshot
    assert rows["model_1"]["runs"] == 1
    assert rows["model_1"]["psnr"] is None or rows["model_1"]["identical"], "its finished picture is compared"
    assert [rows[name]["runs"] for name in ("torch_sdpa", "comfy", "sdpa_math")] == [3, 3, 3]
    assert rows["model_1"]["failed"] in record["table"]["text"][0]
    assert record["picture"]["images"]


def test_cancel_within_a_run_stops_it_and_logs_what_was_finished(server: Server, snapshot: SnapshotAssertion) -> None:
    done = {"cancelled": 0}

    def cancel(value: int, most: int) -> None:
        # 4 warm-ups and three rows of 3 steps are done: the slow row is in its only run.
        if value > 4 + 3 * 3 and not done["cancelled"]:
            done["cancelled"] = value
            server.post("/interrupt", {})

    lines = len(server.log)
    ended, seen = watched(server, graph(steps=20, seed=6, shaky={"seconds": 0.3}, repeat=1), cancel)
    assert ended == "execution_interrupted"
    assert done["cancelled"]
    assert seen[-1][0] < seen[-1][1]
    said = server.log[lines:].splitlines()
    first = next(number for number, line in enumerate(said) if "the comparison was cancelled" in line)
    assert said[first].partition("the comparison")[2] == snapshot
    rows = {line.split("  ")[0]: " ".join(line.split()) for line in said[first:]}
    assert "torch_sdpa" in rows
    assert rows["model 1"] == snapshot


def test_cancel_between_two_runs_begins_no_other(server: Server) -> None:
    # model_1 comes last in each round: its second sampling ends round 1, and Cancel comes before round 2.
    lines = len(server.log)
    with pytest.raises(WorkflowError, match="the run was interrupted"):
        server.run(graph(seed=7, repeat=2, shaky={"cancel_after": 2}))
    table = server.log[lines:].split("the comparison was cancelled")[1]
    rows = [line for line in table.splitlines() if line.startswith(("torch_sdpa", "comfy", "sdpa_math", "model 1"))]
    assert len(rows) == 4
    assert not [line for line in rows if "interrupted" in line], "each had finished a run"
    again = rows_of(report_of(server, graph(seed=7, repeat=2)))
    assert [row["runs"] for row in again.values()] == [2, 2, 2], "nothing of it is left behind"


@pytest.mark.parametrize(
    "changes",
    [
        {"backends": "sdpa_math, sdpa_math"},
        {"backends": "torch_sdpa, sdpa"},
        {"backends": " "},
        {"backends": "", "mode": "attention"},
        {"backends": "auto"},
        {"backends": "sage_atn"},
    ],
    ids=["twice", "twice by another name", "none", "none, attention alone", "a choice", "unknown"],
)
def test_wrong_backends_are_refused_in_one_sentence(
    server: Server, changes: dict[str, Any], snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(WorkflowError) as caught:
        server.run(graph(**changes))
    first, second = str(caught.value).splitlines()[:2]
    refused = "refused the workflow" in first
    assert without_names(second.partition(" - ")[2] if refused else first) == snapshot
    assert refused == bool(changes["backends"].strip()), "names are read before anything runs"


@pytest.mark.parametrize("mode", ["end_to_end", "one_step", "attention"])
def test_a_latent_of_another_model_is_refused_before_anything_runs(
    server: Server, mode: str, snapshot: SnapshotAssertion
) -> None:
    nodes = graph(mode=mode, latent_image=["other", 3])
    nodes["other"] = node("TinyModel", family="sd15")
    nodes["filled"] = node("LatentAdd", samples1=["drawn", 0], samples2=["drawn", 0])
    nodes["drawn"] = node(
        "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["sampler", 0],
        sigmas=["other_sigmas", 0], latent_image=["other", 3],
    )  # fmt: skip
    nodes["guider"] = node("BasicGuider", model=["other", 0], conditioning=["other", 1])
    nodes["other_sigmas"] = node("BasicScheduler", model=["other", 0], scheduler="simple", steps=1, denoise=1.0)
    nodes[OUR_NODE]["inputs"]["latent_image"] = ["filled", 0]
    with pytest.raises(WorkflowError) as caught:
        server.run(nodes)
    assert str(caught.value).splitlines()[0] == snapshot
