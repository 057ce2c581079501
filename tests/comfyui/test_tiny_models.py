"""The tiny models are real: they sample, depend on attention, and give the hook calls that were recorded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfy_location import find_comfyui, why_no_comfyui
from tiny_models import FAMILIES

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from record_hook_calls import record  # noqa: E402

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECORDINGS = sorted(FIXTURES.glob("hook_calls_*.json"))
# ComfyUI's code for these calls attention without transformer_options, so no override can see it.
WITHOUT_HOOK = {"hunyuan3d2_1"}

families = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def comfy() -> Path:
    folder = find_comfyui()
    if folder is None:
        pytest.skip(why_no_comfyui())
    try:
        tiny_sampling.prepare(folder, "--use-pytorch-cross-attention")
        import comfy.sd  # noqa: F401
    except ModuleNotFoundError as error:
        pytest.skip(f"this Python lacks {error.name}, which the ComfyUI in {folder} needs")
    return folder


def build_or_skip(name: str, seed: int = 0) -> Any:
    reason = tiny_sampling.unavailable(name)
    if reason:
        pytest.skip(reason)
    return tiny_sampling.build(name, seed)


def override_with(patcher: Any, function: Callable[..., Any]) -> None:
    patcher.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = function


@pytest.mark.comfy
@families
def test_samples_finite_and_reproducibly(comfy: Path, name: str) -> None:
    first = tiny_sampling.sample(build_or_skip(name), name)
    assert first.isfinite().all()
    assert torch.equal(first, tiny_sampling.sample(build_or_skip(name), name))
    assert not torch.allclose(first, tiny_sampling.sample(build_or_skip(name, seed=1), name))


@pytest.mark.comfy
@families
def test_attention_matters(comfy: Path, name: str) -> None:
    patcher = build_or_skip(name)
    stock = tiny_sampling.sample(patcher, name)
    calls = []

    def silenced(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return torch.zeros_like(func(*args, **kwargs))

    override_with(patcher, silenced)
    changed = tiny_sampling.sample(patcher, name)
    if name in WITHOUT_HOOK:
        assert not calls
        return
    assert calls
    assert (changed - stock).norm() > 0.01 * stock.norm()


@pytest.mark.comfy
def test_padded_mask_matters(comfy: Path) -> None:
    masked, plain = (tiny_sampling.sample(build_or_skip(name), name) for name in ("qwen_image_masked", "qwen_image"))
    assert (masked - plain).norm() > 1e-4 * plain.norm()


@pytest.mark.comfy
@families
def test_recording_is_what_this_comfyui_does(comfy: Path, name: str) -> None:
    import comfyui_version

    path = FIXTURES / f"hook_calls_{comfyui_version.__version__}.json"
    if not path.exists():
        pytest.skip(f"no recording of ComfyUI {comfyui_version.__version__}; make one with record_hook_calls.py")
    expected = json.loads(path.read_text(encoding="utf-8"))["families"][name]
    reason = tiny_sampling.unavailable(name)
    seen = {"unavailable": reason} if reason else record(name)
    for part in ("unavailable", "model", "mro", "calls", "bypass"):
        assert seen.get(part) == expected.get(part)


@pytest.mark.comfy
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.from_file])
def test_loads_from_a_file(comfy: Path, name: str, tmp_path: Path) -> None:
    import comfy.sd

    patcher = build_or_skip(name)
    tiny_sampling.save(patcher, name, tmp_path / "model.safetensors")
    loaded = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"))
    assert torch.equal(tiny_sampling.sample(loaded, name), tiny_sampling.sample(patcher, name))


@pytest.mark.comfy
def test_clear_errors(comfy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="already imported"):
        tiny_sampling.prepare(comfy, "--use-quad-cross-attention")
    with pytest.raises(LookupError, match="tiny sd15"):
        tiny_sampling.save(tiny_sampling.build("sd15"), "sd15", tmp_path / "model.safetensors")
    monkeypatch.setitem(FAMILIES, "sd15", dataclasses.replace(FAMILIES["sd15"], config="NoSuchModel"))
    with pytest.raises(LookupError, match=r"no comfy\.supported_models\.NoSuchModel"):
        tiny_sampling.build("sd15")


def test_a_wrong_comfyui_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert find_comfyui() is None
    assert str(tmp_path) in why_no_comfyui()
    (tmp_path / "comfy").mkdir()
    (tmp_path / "nodes.py").touch()
    assert find_comfyui() == tmp_path


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_recordings_are_small_and_complete(path: Path) -> None:
    assert path.stat().st_size < 400_000
    recorded = json.loads(path.read_text(encoding="utf-8"))["families"]
    assert recorded.keys() == FAMILIES.keys()
    for name, facts in recorded.items():
        assert facts.get("unavailable") or facts["calls"] or facts["bypass"], name
