"""Through a real ComfyUI server on the CPU: our nodes in a graph, against the same graph without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attention_backends.devtools.server import Server, WorkflowError
from syrupy.assertion import SnapshotAssertion
from tiny_models import FAMILIES

pytestmark = pytest.mark.comfy

NODES = Path(__file__).parents[1] / "server_nodes" / "tiny_models_node.py"
ROLES = {
    "wan": {"self", "cross"},
    "wan_i2v": {"self", "cross", "wan.image_cross"},
    "wan_vace": {"self", "cross", "wan.vace_self", "wan.vace_cross"},
    "flux": {"flux.double", "flux.single"},
    "sd3": {"joint", "sd3.image_self"},
    "qwen_image": {"joint"},
    "qwen_image_masked": {"joint"},
    "ltxav": {
        "self",
        "cross",
        "ltx2.audio_self",
        "ltx2.audio_text_cross",
        "ltx2.audio_to_video",
        "ltx2.video_to_audio",
    },
}


@pytest.fixture(scope="module")
def server(tiny_models_server: Server) -> Server:
    return tiny_models_server


def selector(backend: str, strict: bool = False, model: Any = ("tiny", 0)) -> dict[str, Any]:
    inputs = {"model": list(model), "backend": backend, "accuracy": "exact", "strict": strict, "guard": "off"}
    return {"class_type": "AttentionBackendSelector", "inputs": inputs}


def branch(model: Any, family: str, path: Path) -> dict[str, dict[str, Any]]:
    """A sampler on `model` and the node that keeps its result."""
    sampler = {
        "class_type": "KSampler",
        "inputs": {
            "model": list(model), "positive": ["tiny", 1], "negative": ["tiny", 2], "latent_image": ["tiny", 3],
            "seed": 7, "steps": 2, "cfg": FAMILIES[family].cfg, "sampler_name": "euler", "scheduler": "simple",
            "denoise": 1.0,
        },
    }  # fmt: skip
    name = path.stem
    keep = {"class_type": "KeepLatent", "inputs": {"samples": [f"sampler_{name}", 0], "path": str(path)}}
    return {f"sampler_{name}": sampler, f"keep_{name}": keep}


def run(server: Server, family: str, patches: dict[str, Any], model: Any, path: Path) -> list[torch.Tensor]:
    tiny = {"tiny": {"class_type": "TinyModel", "inputs": {"family": family}}}
    server.run(tiny | patches | branch(model, family, path))
    kept: list[torch.Tensor] = torch.load(path)
    return kept


def last_run(server: Server) -> dict[str, Any]:
    newest: dict[str, Any] = server.get("/attention_backends/last_run")["runs"][0]
    return newest


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("family", ROLES)
def test_torch_sdpa_is_stock_to_the_bit(server: Server, family: str, tmp_path: Path) -> None:
    stock = run(server, family, {}, ("tiny", 0), tmp_path / "stock.pt")
    ours = run(server, family, {"ours": selector("torch_sdpa")}, ("ours", 0), tmp_path / "ours.pt")
    assert equal(stock, ours)
    account = last_run(server)
    assert {row["role"] for row in account["rows"]} == ROLES[family]
    assert {row["backend"] for row in account["rows"]} == {"torch_sdpa"}
    assert account["steps"] == 2
    assert account["notes"] == []
    assert account["seconds"] > 0
    parts = {"sd3": "the context processor", "ltxav": "the text connectors, which run before sampling"}
    assert account["bypass"] == parts.get(family, ""), "what this model does not have is not named"
    again = run(server, family, {}, ("tiny", 0), tmp_path / "again.pt")
    assert equal(stock, again), "the model of the cache was changed by our node"


def test_roles_go_to_their_backends_and_branches_stay_apart(server: Server, tmp_path: Path) -> None:
    stock = run(server, "wan", {}, ("tiny", 0), tmp_path / "stock.pt")
    graph = {
        "tiny": {"class_type": "TinyModel", "inputs": {"family": "wan"}},
        "a": selector("torch_sdpa"),
        "cross": {
            "class_type": "PerRoleAttentionConfig",
            "inputs": {"model": ["a", 0], "role": "cross", "backend": "sdpa_math", "extra": ""},
        },
        "b": selector("sdpa_math"),
        **branch(("cross", 0), "wan", tmp_path / "mixed.pt"),
        **branch(("b", 0), "wan", tmp_path / "math.pt"),
        **branch(("tiny", 0), "wan", tmp_path / "plain.pt"),
    }
    server.run(graph)
    runs = server.get("/attention_backends/last_run")["runs"][:2]
    seen = {frozenset((row["role"], row["backend"]) for row in account["rows"]) for account in runs}
    assert seen == {
        frozenset({("self", "torch_sdpa"), ("cross", "sdpa_math")}),
        frozenset({("self", "sdpa_math"), ("cross", "sdpa_math")}),
    }
    assert equal(torch.load(tmp_path / "plain.pt"), stock)
    mixed, math = torch.load(tmp_path / "mixed.pt")[0], torch.load(tmp_path / "math.pt")[0]
    assert not torch.equal(mixed, math)
    torch.testing.assert_close(mixed, math, rtol=1e-4, atol=1e-4)


def test_what_cannot_run_falls_back_and_strict_stops(
    server: Server, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    stock = run(server, "wan", {}, ("tiny", 0), tmp_path / "stock.pt")
    loose = run(server, "wan", {"ours": selector("cudnn_attn")}, ("ours", 0), tmp_path / "loose.pt")
    assert equal(stock, loose)
    rows = last_run(server)["rows"]
    assert {(row["asked"], row["backend"]) for row in rows} == {("cudnn_attn", "torch_sdpa")}
    (reason,) = {row["reason"] for row in rows}
    assert reason == snapshot
    with pytest.raises(WorkflowError) as caught:
        run(server, "wan", {"ours": selector("cudnn_attn", strict=True)}, ("ours", 0), tmp_path / "strict.pt")
    assert reason in str(caught.value)


def test_a_graph_with_an_unknown_backend_is_refused_with_the_nearest_names(server: Server, tmp_path: Path) -> None:
    with pytest.raises(WorkflowError, match=r"sage_atn.*did you mean.*sage_attn"):
        run(server, "wan", {"ours": selector("sage_atn")}, ("ours", 0), tmp_path / "never.pt")


def test_every_backend_is_offered_on_every_machine(server: Server) -> None:
    from attention_backends.backends.config.names import menu

    node = server.get("/object_info/AttentionBackendSelector")["AttentionBackendSelector"]
    options = node["input"]["required"]["backend"][1].get("options") or node["input"]["required"]["backend"][0]
    assert tuple(options) == menu("cpu")
    assert list(node["input"]["required"]) == ["model", "backend", "accuracy", "strict", "guard"]


# Wan 2.2's two experts


def expert(shift: float) -> dict[str, Any]:
    """Another model than that of another shift, to tell the two apart by what they sample."""
    return {"class_type": "ModelSamplingSD3", "inputs": {"model": ["tiny", 0], "shift": shift}}


def two_stages(high: Any, low: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Four distilled steps: two of the high-noise model, two of the low-noise one, without guidance."""

    def stage(model: Any, latent: Any, start: int, end: int) -> dict[str, Any]:
        noise = "enable" if start == 0 else "disable"
        left = "enable" if start == 0 else "disable"
        inputs = {
            "model": list(model), "positive": ["tiny", 1], "negative": ["tiny", 2], "latent_image": latent,
            "add_noise": noise, "noise_seed": 5, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
            "start_at_step": start, "end_at_step": end, "return_with_leftover_noise": left,
        }  # fmt: skip
        return {"class_type": "KSamplerAdvanced", "inputs": inputs}

    return {
        "tiny": {"class_type": "TinyModel", "inputs": {"family": "wan"}},
        "high": expert(8.0),
        "low": expert(3.0),
        "first": stage(high, ["tiny", 3], 0, 2),
        "second": stage(low, ["first", 0], 2, 4),
        "keep": {"class_type": "KeepLatent", "inputs": {"samples": ["second", 0], "path": str(path)}},
    }


@pytest.mark.parametrize("backend", ["torch_sdpa", "emulated_int8"])
def test_one_selector_serves_both_experts_as_two_do(server: Server, tmp_path: Path, backend: str) -> None:
    one = selector(backend, model=("high", 0))
    one["inputs"]["model_2"] = ["low", 0]
    graphs = {
        "without": ({}, ("high", 0), ("low", 0)),
        "two": (
            {"a": selector(backend, model=("high", 0)), "b": selector(backend, model=("low", 0))},
            ("a", 0),
            ("b", 0),
        ),
        "one": ({"ours": one}, ("ours", 0), ("ours", 1)),
        "swapped": ({"ours": one}, ("ours", 1), ("ours", 0)),
    }
    kept = {}
    for name, (nodes, high, low) in graphs.items():
        path = tmp_path / f"{name}.pt"
        server.run(two_stages(high, low, path) | nodes)
        kept[name] = torch.load(path)
        if name == "one":
            runs = server.get("/attention_backends/last_run")["runs"][:2]
            assert [[node["id"] for node in account["nodes"]] for account in runs] == [["ours"], ["ours"]]
            assert [account["steps"] for account in runs] == [2, 2]
            assert {row["backend"] for account in runs for row in account["rows"]} == {backend}
    assert equal(kept["one"], kept["two"])
    assert equal(kept["one"], kept["without"]) == (backend == "torch_sdpa")
    assert not equal(kept["one"], kept["swapped"])


def test_a_run_knows_the_nodes_of_its_own_expert_alone(server: Server, tmp_path: Path) -> None:
    one = selector("torch_sdpa", model=("cross", 0))
    one["inputs"]["model_2"] = ["low", 0]
    cross = {"model": ["high", 0], "role": "cross", "backend": "sdpa_math", "extra": ""}
    graph = two_stages(("ours", 0), ("ours", 1), tmp_path / "role.pt")
    server.run(graph | {"ours": one, "cross": {"class_type": "PerRoleAttentionConfig", "inputs": cross}})
    low, high = server.get("/attention_backends/last_run")["runs"][:2]
    assert [node["id"] for node in high["nodes"]] == ["ours", "cross"]
    assert [node["id"] for node in low["nodes"]] == ["ours"]
    assert {(row["role"], row["backend"]) for row in low["rows"]} == {("self", "torch_sdpa"), ("cross", "torch_sdpa")}


def test_an_output_without_its_model_is_an_error_also_from_the_cache(server: Server, tmp_path: Path) -> None:
    ours = {"ours": selector("torch_sdpa", model=("high", 0))}
    server.run(two_stages(("ours", 0), ("low", 0), tmp_path / "first.pt") | ours)  # not taken: no matter
    with pytest.raises(WorkflowError, match="the second output is connected"):
        server.run(two_stages(("ours", 0), ("ours", 1), tmp_path / "never.pt") | ours)
    assert not (tmp_path / "never.pt").exists()


def test_what_a_new_node_has_switched_on_keeps_qwen_image_right(server: Server, tmp_path: Path) -> None:
    """Its text is masked, where quantized kernels err: with the exceptions on, nothing differs from stock."""
    stock = run(server, "qwen_image_masked", {}, ("tiny", 0), tmp_path / "stock.pt")
    same = {}
    for on in (False, True):
        ours = selector("emulated_int8")
        ours["inputs"]["recommended"] = on
        kept = run(server, "qwen_image_masked", {"ours": ours}, ("ours", 0), tmp_path / f"{on}.pt")
        same[on] = equal(stock, kept)
    assert same == {False: False, True: True}
    assert {row["backend"] for row in last_run(server)["rows"]} == {"torch_sdpa"}
