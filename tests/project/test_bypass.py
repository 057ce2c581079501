"""What the report names as going past the hook is what does: in the recordings, in ComfyUI's code, in a ControlNet."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_location import find_comfyui, why_no_comfyui
from syrupy.assertion import SnapshotAssertion

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = sorted((ROOT / "tests" / "fixtures").glob("hook_calls_*.json"))

RECORDED = {
    "ltx2": (r"_embeddings_connector.", "text connectors"),
    "cosmos_predict2": ("llm_adapter.", "Anima's text adapter"),
    "hunyuan3d_2_1": ("blocks.", "every attention call"),
    "minimax_h3": ("token_refiner.", "the token refiner"),
}
"""Family: what the paths of the calls hold that its tiny models make past the hook, and the words for them."""

IN_CODE = {
    "FaceBlock": ("wan", "face blocks of Wan Animate"),
    "MusicSelfAttention": ("wan", "music blocks and injector of WanDancer"),
    "SingleStreamAttention": ("wan", "audio layers of MultiTalk"),
    "SingleStreamMultiAttention": ("wan", "audio layers of MultiTalk"),
    "SelfAttentionContext": ("sd3", "context processor"),
    "Attention of anima": ("cosmos_predict2", "Anima's text adapter"),
    "Attention of hunyuan3dv2_1": ("hunyuan3d_2_1", "every attention call"),
    "CrossAttention of hunyuan3dv2_1": ("hunyuan3d_2_1", "every attention call"),
}
"""Modules of the families whose code calls attention without handing the hook on, and where they are named."""
NOT_RUN = {"SelfAttention", "DismantledBlock"}
"""Of SD3: its blocks are mixed by a function that hands the hook on, and these forwards are never called."""
ANOTHER_MODEL = {"AceStepAttention"}
"""ACE-Step 1.5, which the role table does not have."""

FOLDERS = (
    "wan", "flux", "chroma", "qwen_image", "lightricks", "hunyuan_video", "lumina", "cosmos", "anima", "hidream",
    "hunyuan3d", "hunyuan3dv2_1", "ace", "minimax", "kandinsky5", "omnigen", "modules/diffusionmodules",
)  # fmt: skip
VAES = ("vae.py", "audio_vae.py", "layers3d.py", "model.py of modules/diffusionmodules")
ATTENTION = ("optimized_attention", "optimized_attention_masked", "scaled_dot_product_attention")


ROLES = ROOT / "nodes" / "hook" / "roles.py"


def roles() -> Any:
    """`nodes/hook/roles.py` needs no ComfyUI, but its package does."""
    # A name inside the package, for its relative imports.
    spec = importlib.util.spec_from_file_location("attention_backends.nodes.hook.roles_of_the_bypass", ROLES)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = {family.name: family for family in roles().FAMILIES}


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_every_recorded_bypass_is_named(path: Path) -> None:
    seen = set()
    for name, facts in json.loads(path.read_text(encoding="utf-8"))["families"].items():
        for call in facts.get("bypass", ()):
            family = roles().family_of(tuple(facts["mro"]))
            assert family is not None
            place, words = RECORDED[family.name]
            assert place in call["module"], f"{name}: {call['module']} goes past the hook and nothing says so"
            assert words in family.bypass
            seen.add(family.name)
    assert seen >= RECORDED.keys() - {"minimax_h3"}, "a family's recorded bypass is gone: take its words out"


def calls_without_the_hook(tree: ast.AST) -> Iterator[str]:
    """The outermost class or function of each call of attention that is not given `transformer_options`."""

    def walk(node: ast.AST, outermost: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            named = child.name if isinstance(child, ast.ClassDef | ast.FunctionDef) and not outermost else outermost
            if isinstance(child, ast.Call):
                called = child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")
                if called in ATTENTION and not any(word.arg == "transformer_options" for word in child.keywords):
                    yield named
            yield from walk(child, named)

    return walk(tree, "")


@pytest.mark.comfy
def test_every_module_of_the_families_that_drops_the_hook_is_named() -> None:
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip(why_no_comfyui())
    found = set()
    for folder in FOLDERS:
        for file in sorted((comfyui / "comfy" / "ldm" / folder).rglob("*.py")):
            if file.name in VAES or f"{file.name} of {folder}" in VAES:
                continue
            for name in calls_without_the_hook(ast.parse(file.read_text(encoding="utf-8"))):
                found.add(next((known for known in IN_CODE if known == f"{name} of {folder}"), name))
    assert found == IN_CODE.keys() | NOT_RUN | ANOTHER_MODEL
    for name, (family, words) in IN_CODE.items():
        assert words in table[family].bypass, name


def test_a_dropped_hook_is_found_in_code() -> None:
    code = "class A:\n def f(s):\n  optimized_attention(q)\nclass B:\n def f(s):\n  optimized_attention(q, {})"
    assert list(calls_without_the_hook(ast.parse(code.format("transformer_options=o")))) == ["A"]


def test_a_report_names_what_its_model_has_alone(snapshot: SnapshotAssertion) -> None:
    bypass_of, only_in = roles().bypass_of, roles().ONLY_IN
    everything = " ".join(only_in.values())
    for family in table.values():
        assert bypass_of(family, everything) == family.bypass
    assert all(any(part in family.bypass for family in table.values()) for part in only_in)
    assert bypass_of(table["wan"], "comfy.ldm.wan.model.WanModel") == ""
    assert [part for part, name in only_in.items() if bypass_of(table["wan"], name) == part] == list(only_in)[:4]
    assert bypass_of(None, everything) == bypass_of(table["flux"], everything) == ""
    assert bypass_of(table["flux"], "", controlled=True) == snapshot


@pytest.mark.comfy
def test_a_real_controlnet_is_not_counted_and_is_named(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    """Its attention runs on ComfyUI's own, beside a strictly routed model; the account has the model's calls alone."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import tiny_sampling
    from hook_side import comfyui, last_run, nodes_module, selected
    from record_hook_calls import Recorder
    from tiny_models import SD15

    comfyui()
    import comfy.cldm.cldm
    import comfy.controlnet

    control_model = comfy.cldm.cldm.ControlNet(**SD15, hint_channels=3, num_head_channels=32)
    tiny_sampling._fill(control_model, 0)
    control = comfy.controlnet.ControlNet(control_model, load_device=torch.device("cpu"))
    control.set_cond_hint(torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(0)))
    patcher = tiny_sampling.build("sd15")
    model = selected(patcher, "reference", strict=True)
    plain = tiny_sampling.sample(model, "sd15")
    calls = sum(row["calls"] for row in last_run()["rows"])
    assert last_run()["bypass"] == ""

    original = tiny_sampling.conditioning

    def controlled(name: str, seed: int = 0) -> Any:
        return tuple([[text, {**extras, "control": control}] for text, extras in part] for part in original(name, seed))

    monkeypatch.setattr(tiny_sampling, "conditioning", controlled)
    recorder = Recorder(patcher.model.diffusion_model)
    with recorder.watching():
        steered = tiny_sampling.sample(model, "sd15")
    assert not torch.equal(steered, plain), "the ControlNet did something"
    assert sum(row["calls"] for row in last_run()["rows"]) == calls
    # `reference` computes with matrix products, so whatever reached torch's own attention was not the model's.
    assert sum(call["count"] for call in recorder.bypass.values()) > 0
    report = nodes_module("report.report").as_text({"run": last_run()})
    assert next(line for line in report.splitlines() if "ControlNets" in line) == snapshot
