"""What a node says it will do before anything runs, on described machines."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from attention_backends.backends.config import AttentionConfig
from attention_backends.backends.config.text import from_environment
from attention_backends.backends.engine.router import Router
from attention_backends.backends.values.platform import parse_platform
from hook_side import comfyui, nodes_module

forecast = nodes_module("http.forecast")
functions = nodes_module("hook.comfy_functions")
SAGE = "packages=sageattention==2.2.0;triton==3.6.0"
ADA = "cuda:8.9"


def started(name: str = "attention_pytorch", flag: str = "") -> Any:
    return functions.Started(functions._known(name, False), flag)


def foreseen(machine: str, backend: str = "auto", accuracy: str = "exact", **rest: Any) -> dict[str, Any]:
    nothing: tuple[AttentionConfig, ...] = ()
    rest = {"started": started(), "environment": lambda: nothing, **rest}
    return dict(forecast.forecast(Router(parse_platform(machine)), backend, accuracy, **rest))


def test_auto_says_that_it_is_as_without_the_node_and_what_would_be_faster() -> None:
    found = foreseen(f"{ADA},{SAGE}")
    assert (found["takes"], found["same"], found["without"]) == ("torch_sdpa", True, "torch_sdpa")
    assert found["faster"] == {"backend": "sage_attn", "why": forecast.NOT_ALLOWED, "accuracy": "quantized"}
    bare = foreseen(ADA)["faster"]
    assert bare["why"] == forecast.NOT_INSTALLED
    allowed = foreseen(f"{ADA},{SAGE}", accuracy="quantized")
    assert (allowed["takes"], allowed["same"], allowed["faster"]) == ("sage_attn", False, None)


@pytest.mark.parametrize(
    ("machine", "takes"),
    [("cuda:8.9,packages=flash-attn==2.8.3", "flash_attn"), ("cuda:12.0", "cudnn_attn"), ("cpu", "torch_sdpa")],
)
def test_auto_takes_what_the_priorities_say(machine: str, takes: str) -> None:
    assert foreseen(machine)["takes"] == takes


def test_nothing_is_faster_where_nothing_would_help() -> None:
    assert [foreseen(machine)["faster"] for machine in ("cpu", "mps")] == [None, None]


@pytest.mark.parametrize(
    ("name", "flag", "without", "same"),
    [
        ("attention_pytorch", "--use-pytorch-cross-attention", "torch_sdpa", True),
        ("attention_sage", "--use-sage-attention", "sage_attn", False),
        ("attention_flash", "--use-flash-attention", "flash", False),
        ("attention_split", "--use-split-cross-attention", "split", False),
        ("attention_sub_quad", "", "sub_quad", False),
    ],
)
def test_without_the_node_is_what_the_server_was_started_with(name: str, flag: str, without: str, same: bool) -> None:
    found = foreseen(ADA, started=started(name, flag))
    assert (found["without"], found["flag"], found["same"]) == (without, flag, same)
    assert found["without_accuracy"] == ("quantized" if name == "attention_sage" else "exact")
    kept = foreseen(ADA, "comfy", started=started(name, flag))
    assert (kept["takes"], kept["same"]) == ("comfy", True)
    assert foreseen(f"{ADA},{SAGE}", "sage_attn", started=started(name, flag))["same"] is (name == "attention_sage")


def test_a_named_backend_runs_or_has_one_thing_to_do() -> None:
    assert foreseen(f"{ADA},{SAGE}", "sage_attn")["takes"] == "sage_attn"
    missing = foreseen(ADA + ",packages=triton==3.6.0", "sage_attn")
    assert (missing["takes"], missing["package"]) == (None, "sageattention")
    wrong = foreseen("cpu", "sage_attn")
    assert (wrong["takes"], wrong["package"], len(wrong["reasons"])) == (None, "", 1)
    assert list(wrong["phrases"]) == wrong["reasons"], "a page in another language says it in its words"


def test_autotune_names_its_candidates() -> None:
    found = foreseen("cpu", "measured")
    assert (found["backend"], found["kind"], found["tries"][0]) == ("autotune", "autotune", "torch_sdpa")
    assert {"flex_attn", "sdpa_math"} < set(found["tries"])
    assert not {"reference", "emulated_int8", "comfy", "flash_attn"} & set(found["tries"])
    assert foreseen("mps", "autotune")["tries"] == []  # nothing is timed there


def test_an_environment_variable_decides_what_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "SDPA_MATH")
    found = foreseen("cpu", environment=from_environment)
    assert (found["kind"], found["takes"], found["source"]) == ("named", "sdpa_math", "DIFFUSION_ATTENTION_BACKEND")
    assert foreseen("cpu", "torch_sdpa", environment=from_environment)["source"] == ""
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "no_such_backend")
    assert foreseen("cpu", environment=from_environment)["takes"] == "torch_sdpa"


@pytest.mark.parametrize("asked", [("no_such_backend", "exact"), ("auto", "no_such_class")])
def test_what_is_not_known_is_refused(asked: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="no_such"):
        foreseen("cpu", *asked)


def test_heads_of_the_model_decide_too() -> None:
    """Sage takes heads up to 128: it computes some calls of SD 1.5, which has 40, 80 and 160."""
    machine = f"{ADA},{SAGE}"
    named = foreseen(machine, "sage_attn", head_dims=(160, 256))
    assert (named["takes"], named["by_model"], named["package"]) == (None, True, "")
    assert set(named["phrases"]) == set(named["reasons"])
    auto = foreseen(machine, accuracy="quantized", head_dims=(160, 256))
    assert (auto["takes"], auto["by_model"], auto["faster"]["backend"]) == ("torch_sdpa", True, "flash_attn")
    assert foreseen(machine, head_dims=(160, 256))["faster"]["backend"] == "flash_attn", "which takes such heads"
    for heads in ((), (128,), (40, 80, 160)):
        assert foreseen(machine, "sage_attn", head_dims=heads)["takes"] == "sage_attn"
        assert foreseen(machine, accuracy="quantized", head_dims=heads)["by_model"] is False


@pytest.mark.parametrize(
    ("backend", "accuracy", "family", "expected"),
    [
        ("sage_attn", "exact", "qwen_image", ["offer.masked"]),
        ("auto", "quantized", "ltx2", ["offer.cross"]),  # which takes Sage here
        ("auto", "exact", "ltx2", []),
        ("torch_sdpa", "exact", "qwen_image", []),
        ("sage_attn", "exact", "flux", []),
        ("sage_attn", "exact", "", []),
    ],
)
def test_exceptions_of_the_model_are_said(backend: str, accuracy: str, family: str, expected: list[str]) -> None:
    """Of calls with masks too, whose values nothing tells before a run."""
    machine = f"{ADA},{SAGE}"
    found = foreseen(machine, backend, accuracy, family=family, recommended=True)
    assert [phrase["id"] for phrase in found["phrases"].values()] == expected
    assert list(found["phrases"]) == found["exceptions"]
    assert foreseen(machine, backend, accuracy, family=family)["exceptions"] == []


@pytest.fixture(scope="module")
def facts() -> Any:
    comfyui()
    return nodes_module("http.model_file")


@pytest.mark.comfy
@pytest.mark.parametrize("name", ["wan_vace", "flux", "sd3", "ltxav", "hunyuan_video", "kandinsky5"])
def test_a_file_tells_roles_and_heads_by_its_header(facts: Any, name: str, tmp_path: Path, caplog: Any) -> None:
    """As the model of that file has them when it is loaded; no weight is read, and ComfyUI logs no model."""
    import tiny_sampling

    model = tiny_sampling.build(name)
    file = tmp_path / "m.safetensors"
    tiny_sampling.save(model, name, file)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    size = file.stat().st_size
    os.truncate(file, header)  # a sparse file of that size
    os.truncate(file, size)
    caplog.clear()
    caplog.set_level("INFO")
    found = facts._in_file(str(file), 0, size)
    assert found == facts._facts(model.model.diffusion_model)
    assert found.roles
    assert found.head_dims
    assert caplog.records == []


@pytest.mark.comfy
@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_tells_nothing(facts: Any, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(content)
    assert facts._in_file(str(file), 0, len(content)) is None
    assert facts.facts_of("../../no such file.safetensors") is None


@pytest.mark.comfy
def test_a_node_does_not_wait_for_all_that_the_panel_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The panel asks every backend; each is loaded in a thread, and a node's question comes in between."""
    comfyui()
    machine = nodes_module("http.machine")
    monkeypatch.setattr(machine, "started_with", started)
    here, begun, loaded = machine.Machine(), threading.Event(), threading.Event()
    asked: list[str] = []

    def row(router: Router, name: str) -> None:
        asked.append(name)
        here._rows[router.platform, name] = {"id": name}
        begun.set()
        loaded.wait(20)

    monkeypatch.setattr(here, "_row", row)

    async def both() -> tuple[dict[str, Any], int]:
        panel = asyncio.create_task(here.describe())
        await asyncio.to_thread(begun.wait, 20)
        node = asyncio.create_task(here.forecast("torch_sdpa", "exact"))
        await asyncio.sleep(0)
        loaded.set()
        found = await node
        before = len(asked)
        await panel
        return found, before

    found, before = asyncio.run(both())
    assert found["takes"] == "torch_sdpa"
    assert before < len(asked) / 2
