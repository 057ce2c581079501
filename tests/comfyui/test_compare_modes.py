"""Compare Attention Backends beyond whole pictures: attention alone on a model's own calls, and CLIP similarity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.measure.error import exact_rows  # noqa: E402
from attention_backends.comparison.report import Row  # noqa: E402
from attention_backends.devtools.server import Server, WorkflowError  # noqa: E402
from hook_side import comfyui, nodes_module  # noqa: E402

NODES = Path(__file__).parents[1] / "server_nodes" / "tiny_models_node.py"
comfy_only = pytest.mark.comfy


@pytest.fixture(scope="module")
def server(tiny_models_server: Server) -> Server:
    return tiny_models_server


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def comparison(family: str, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "noise": ["noise", 0], "sampler": ["sampler", 0], "sigmas": ["sigmas", 0], "latent_image": ["tiny", 3],
        "backends": "sdpa_math, emulated_int8, cudnn_attn", "mode": "attention", "repeat": 2, "cfg": 1.0,
        "model": ["tiny", 0], "positive": ["tiny", 1], "negative": ["tiny", 2],
    }  # fmt: skip
    return {
        "tiny": node("TinyModel", family=family),
        "noise": node("RandomNoise", noise_seed=3),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=["tiny", 0], scheduler="simple", steps=3, denoise=1.0),
        "compare": node("AttentionCompare", **{**settings, **changes}),
        "picture": node("PreviewImage", images=["compare", 1]),
        "report": node("PreviewAny", source=["compare", 3]),
    }


def report_of(server: Server, family: str, **changes: Any) -> dict[str, Any]:
    outputs = server.run(comparison(family, **changes))["outputs"]
    assert outputs["picture"]["images"]
    report: dict[str, Any] = json.loads(outputs["report"]["text"][0])
    return report


@comfy_only
@pytest.mark.parametrize(
    ("family", "roles"),
    [
        ("wan", {"self", "cross"}), ("qwen_image_masked", {"joint"}), ("flux", {"flux.double"}),
        ("ltxv", {"self", "cross"}),
    ],
)  # fmt: skip
def test_attention_alone_on_the_calls_of_the_model(
    server: Server, family: str, roles: set[str], snapshot: SnapshotAssertion
) -> None:
    report = report_of(server, family)
    rows = {row["asked"]: row for row in report["rows"]}
    assert list(rows) == ["torch_sdpa", "comfy", "sdpa_math", "emulated_int8", "cudnn_attn"]
    assert rows["cudnn_attn"]["failed"] == snapshot
    assert {call["role"] for call in rows["torch_sdpa"]["calls"]} >= roles
    for name in ("torch_sdpa", "comfy", "sdpa_math"):
        assert rows[name]["ran"] == name
        assert 0 < rows[name]["relative_l2"] < 1e-5, name
        assert rows[name]["runs"] == 2
    assert 1e-3 < rows["emulated_int8"]["relative_l2"] < 0.1
    if family == "qwen_image_masked":
        assert any("mask" in call["request"] and "mask none" not in call["request"]
                   for call in rows["comfy"]["calls"])  # fmt: skip
    if family == "ltxv":  # as in sampling: the text's padding is left out, ComfyUI itself gets the whole mask
        for name, row in rows.items():
            honoured = [call["request"].endswith("mask trimmed") for call in row["calls"] if call["role"] == "cross"]
            assert set(honoured) == {name != "comfy"} or name == "cudnn_attn", name
    assert any("VBench: not measured" in note for note in report["notes"])


@comfy_only
def test_patched_models_have_no_place_in_it(server: Server, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(WorkflowError) as caught:
        report_of(server, "wan", model_1=["tiny", 0])
    assert str(caught.value).splitlines()[0] == snapshot


@comfy_only
def test_similarity_by_a_clip_vision_model(tmp_path: Path) -> None:
    comfyui()
    import comfy.clip_vision

    shape = {
        "hidden_act": "quick_gelu", "hidden_size": 32, "image_size": 28, "intermediate_size": 64, "patch_size": 14,
        "layer_norm_eps": 1e-5, "model_type": "clip_vision_model", "num_attention_heads": 2, "num_channels": 3,
        "num_hidden_layers": 2, "projection_dim": 16,
    }  # fmt: skip
    (tmp_path / "tiny.json").write_text(json.dumps(shape), encoding="utf-8")
    torch.manual_seed(0)
    clip = comfy.clip_vision.ClipVisionModel(str(tmp_path / "tiny.json"))
    for parameter in clip.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    picture = torch.rand(2, 40, 56, 3)
    broken = picture.clone()
    broken[0, 0, 0, 0] = float("nan")
    rows = [Row(name) for name in ("reference", "near", "far", "broken", "missing")]
    pictures = [picture, (picture + 0.01).clamp(0, 1), 1 - picture, broken, None]
    nodes_module("compare.similarity").score(rows, pictures, clip)
    same, near, far = (row.clip_similarity for row in rows[:3])
    assert same == pytest.approx(1, abs=1e-5)
    assert far < near < 1
    assert near > 0.9
    assert [row.clip_similarity for row in rows[3:]] == [None, None]


def test_rows_of_a_long_call_equal_those_of_the_whole() -> None:
    """Drawn rows are right with a mask, grouped heads and an offset, and the last row is among them."""
    from attention_backends.backends.kernels.reference import reference_attention
    from attention_backends.backends.values.request import AttentionCall

    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 90, 16, generator=random) for heads in (4, 2, 2))
    mask = torch.rand(2, 1, 90, 90, generator=random) > 0.3
    call = AttentionCall(query, key, value, mask, False, 0.2, True)
    whole = reference_attention(AttentionCall(query.double(), key.double(), value.double(), mask, False, 0.2, True))
    rows, exact = exact_rows(call, 20)
    assert len(rows) == 20
    assert rows[-1] == 89
    assert torch.allclose(exact, whole[:, :, rows], atol=1e-12)
