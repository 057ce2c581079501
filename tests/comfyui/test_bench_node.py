"""Node Attention Benchmark: through a real server on the CPU, and interrupted between two backends."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.kernels.reference import reference_attention  # noqa: E402
from attention_backends.backends.values.request import AttentionCall  # noqa: E402
from attention_backends.devtools.server import Server, WorkflowError  # noqa: E402
from hook_side import comfyui, nodes_module  # noqa: E402

pytestmark = pytest.mark.comfy
SETTINGS = {"presets": "ltx2_audio", "tokens": 32, "masked": "both", "backends": "", "dtype": "float32", "seed": 0}


def graph(**changed: Any) -> dict[str, Any]:
    """The node, and what shows its outputs as text."""
    return {
        "bench": {"class_type": "AttentionBenchmark", "inputs": {**SETTINGS, **changed}},
        "table": {"class_type": "PreviewAny", "inputs": {"source": ["bench", 0]}},
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["bench", 2]}},
    }


def test_in_a_real_server_with_what_comfyui_would_run(server: Server, snapshot: SnapshotAssertion) -> None:
    wanted = {"presets": "hv15", "backends": "sdpa_flash, CUDNN_ATTN, comfy", "dtype": "bfloat16"}
    outputs = server.run(graph(tokens=256, **wanted))["outputs"]
    report = json.loads(outputs["report"]["text"][0])
    assert [case["name"] for case in report["cases"]] == ["hv15, no mask", "hv15, masked"]
    assert report["versions"]["comfyui"]
    for case in report["cases"]:
        rows = {row["backend"]: row for row in case["rows"]}
        assert rows["comfy"]["status"] == "ok", rows["comfy"]
        assert rows["comfy"]["member"].startswith("attention_")
        assert rows["comfy"]["relative_l2"] < 0.01
        assert rows["comfy"]["ratio_to_sdpa"] > 0
        assert rows["torch_sdpa"]["result"] == "ok"
        assert rows["cudnn_attn"]["status"] == snapshot(name=case["name"])
    table = outputs["table"]["text"][0]
    assert "Ranking, fastest first" in table
    assert "comfy -> attention_" in table
    assert outputs["bench"]["images"], "the chart is shown on the node itself"


def test_a_wrong_name_is_refused_before_anything_runs(server: Server) -> None:
    with pytest.raises(WorkflowError, match=r"sage_atn.*did you mean.*sage_attn"):
        server.run(graph(backends="torch_sdpa, sage_atn"))
    with pytest.raises(WorkflowError, match="hv16"):
        server.run(graph(presets="hv16"))


def test_what_a_graph_may_hold_stays_as_it_is(server: Server) -> None:
    node = server.get("/object_info/AttentionBenchmark")["AttentionBenchmark"]
    inputs = node["input"]["required"]
    assert list(inputs) == ["presets", "tokens", "masked", "backends", "dtype", "seed"]
    options = {name: inputs[name][1].get("options") or inputs[name][0] for name in ("presets", "masked", "dtype")}
    assert options == {
        "presets": [
            "all", "hv15", "wan22", "flux", "hunyuan_video_15", "wan22_14b_self", "wan22_14b_cross", "flux2", "z_image",
            "qwen_image", "ltx2_video", "ltx2_audio", "ltx2_audio_to_video",
        ],
        "masked": ["both", "unmasked", "masked"],
        "dtype": ["bfloat16", "float16", "float32"],
    }  # fmt: skip
    assert node["output"] == ["STRING", "IMAGE", "STRING"]
    assert node["output_node"]


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the node in this process, without the picture that a server would write."""
    comfyui()
    module = nodes_module("compare.benchmark")
    monkeypatch.setattr(module.ui, "PreviewImage", lambda image, cls: SimpleNamespace(as_dict=dict))
    return module


def test_an_interruption_is_heard_between_backends(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management as management

    asked: list[str] = []

    def stop() -> None:
        asked.append("interrupted?")
        if len(asked) == 3:
            raise management.InterruptProcessingException

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(management.InterruptProcessingException):
        node.AttentionBenchmark.execute(**SETTINGS)
    assert len(asked) == 3


def test_the_progress_bar_goes_from_backend_to_backend(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.utils

    shown: list[tuple[int, int]] = []

    class Bar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int | None = None) -> None:
            shown.append((value, total or self.total))

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    output = node.AttentionBenchmark.execute(**{**SETTINGS, "backends": "sdpa_math, comfy"})
    assert shown == [(0, 3), (1, 3), (2, 3), (3, 3)]
    table, chart, report = output.args
    assert "sdpa_math" in table
    assert chart.ndim == 4
    assert chart.shape[3] == 3
    assert json.loads(report)["cases"][0]["rows"][2]["status"] == "ok"


@pytest.mark.parametrize("name", ["attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic"])
@pytest.mark.parametrize("kind", ["none", "key_padding"])
def test_every_function_of_comfyui_gives_the_right_result(
    node: Any, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attention_backends.backends.values.request import AttentionRequest
    from attention_backends.comparison.bench_inputs import random_call

    monkeypatch.setattr(node.attention, "optimized_attention", getattr(node.attention, name))
    call = random_call(AttentionRequest(1, 4, 40, 48, 16, "float32", mask=kind), torch.device("cpu"), 0)
    given = AttentionCall(call.query.clone(), call.key.clone(), call.value.clone(), call.attn_mask)
    torch.testing.assert_close(node.as_comfyui_would(given), reference_attention(call), rtol=1e-4, atol=1e-5)
