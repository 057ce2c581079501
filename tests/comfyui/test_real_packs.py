"""The real code of other packs beside ours: what docs/works_with.md says of them.

A pack is looked for in the folder `custom_nodes` that ATTENTION_BACKENDS_TEST_PACKS names, and in that of the ComfyUI
that is tested; where it is in neither, its tests are skipped.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from comfy_location import find_comfyui  # noqa: E402
from hook_side import comfyui, counts, last_run, plain_comfyui, selected  # noqa: E402

pytestmark = pytest.mark.comfy
CONTEXT, IMAGE, TOKENS = 64, 32, 4
"""Width of the tiny SD1.5's text, of the picture's embedding, and how many tokens IP-Adapter makes of it."""
PLACES = [*(("input", n) for n in (1, 2, 4, 5, 7, 8)), *(("output", n) for n in range(3, 12)), ("middle", 1)]
"""The blocks of SD1.5 in the order in which IP-Adapter counts them."""


def place_of(folder_name: str, here: Path) -> Path:
    """Where a pack lies; the case of its folder's name is its installer's."""
    named = os.environ.get("ATTENTION_BACKENDS_TEST_PACKS")
    folders = [*([Path(named)] if named else []), here / "custom_nodes"]
    places = [one for folder in folders for one in folder.iterdir() if one.name.lower() == folder_name.lower()]
    if not places:
        pytest.skip(f"{folder_name} is not in ATTENTION_BACKENDS_TEST_PACKS or the custom_nodes of this ComfyUI")
    return places[0]


def source(folder_name: str, path: str) -> str:
    """A file of a pack, to be read where what it imports needs a GPU."""
    here = find_comfyui()
    assert here is not None
    return (place_of(folder_name, here) / path).read_text(encoding="utf-8")


def loaded(folder_name: str) -> Any:
    """ComfyUI's module of nodes with a pack loaded as ComfyUI loads it."""
    comfyui()
    import nodes

    here = find_comfyui()
    assert here is not None
    assert asyncio.run(nodes.load_custom_node(str(place_of(folder_name, here)), module_parent="custom_nodes"))
    return nodes


@pytest.fixture
def sd15(monkeypatch: pytest.MonkeyPatch) -> Any:
    import tiny_sampling

    plain_comfyui(monkeypatch)
    return tiny_sampling.build("sd15")


def width(model: Any, place: tuple[str, int]) -> int:
    """Of the cross-attention in a block of the UNet; of one that the tiny model lacks any will do."""
    unet, (kind, number) = model.model.diffusion_model, place
    path = "middle_block.1" if kind == "middle" else f"{kind}_blocks.{number}.1"
    with contextlib.suppress(AttributeError):
        return int(unet.get_submodule(f"{path}.transformer_blocks.0.attn2.to_q").weight.shape[0])
    return 8


def ip_adapter(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of a plain IP-Adapter for this UNet, at random."""
    weights = {}
    for number, place in enumerate(PLACES):
        for part in ("k", "v"):
            weights[f"{2 * number + 1}.to_{part}_ip.weight"] = torch.randn(width(model, place), CONTEXT)
    picture = {
        "proj.weight": torch.randn(TOKENS * CONTEXT, IMAGE),
        "proj.bias": torch.zeros(TOKENS * CONTEXT),
        "norm.weight": torch.ones(CONTEXT),
        "norm.bias": torch.zeros(CONTEXT),
    }
    return {"image_proj": picture, "ip_adapter": weights}


@pytest.mark.parametrize("order", ["before", "after"])
def test_ip_adapter_is_counted_named_and_refused_under_strict(sd15: Any, order: str) -> None:
    """Its patch in place of cross-attention calls ComfyUI's function without the model's options."""
    import tiny_sampling

    node = loaded("ComfyUI_IPAdapter_plus").NODE_CLASS_MAPPINGS["IPAdapterEmbeds"]

    weights, picture = ip_adapter(sd15), torch.randn(1, IMAGE)

    def patched(model: Any) -> Any:
        arguments = {"weight": 1.0, "weight_type": "linear", "start_at": 0.0, "end_at": 1.0}
        return node().apply_ipadapter(model, weights, picture, neg_embed=picture, **arguments)[0]

    def model(**more: Any) -> Any:
        if order == "before":
            return selected(patched(sd15), "sdpa_math", **more)
        return patched(selected(sd15, "sdpa_math", **more))

    stock = tiny_sampling.sample(patched(sd15), "sd15", steps=2)
    assert not torch.equal(stock, tiny_sampling.sample(sd15, "sd15", steps=2)), "the adapter does nothing here"
    found = tiny_sampling.sample(model(), "sd15", steps=2)
    assert (found - stock).norm() < 1e-4 * stock.norm()
    record = last_run()
    calls = counts(record)
    assert calls[("cross", "by another")] > 0
    # The tiny model has blocks where SD1.5 has none; each module of either kind makes one call.
    assert calls[("cross", "by another")] + calls[("cross", "sdpa_math")] == calls[("self", "sdpa_math")]
    (name,) = {row["member"] for row in record["rows"] if row["backend"] == "by another"}
    assert "IPAdapter" in name
    with pytest.raises(NoBackendError, match=re.escape(name)):
        tiny_sampling.sample(model(strict=True), "sd15", steps=2)


def test_kjnodes_nag_is_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalized Attention Guidance replaces the forward of each cross-attention and calls ComfyUI's function there."""
    import tiny_sampling

    node = loaded("ComfyUI-KJNodes").NODE_CLASS_MAPPINGS["WanVideoNAG"]
    plain_comfyui(monkeypatch)
    wan = tiny_sampling.build("wan")
    _, negative = tiny_sampling.conditioning("wan")

    def patched(model: Any) -> Any:
        with torch.inference_mode():
            return node().patch(model, negative, 5.0, 0.5, 1.5)[0]

    stock = tiny_sampling.sample(patched(wan), "wan", steps=2)
    assert not torch.equal(stock, tiny_sampling.sample(wan, "wan", steps=2)), "NAG does nothing here"
    found = tiny_sampling.sample(patched(selected(wan, "sdpa_math", strict=True)), "wan", steps=2)
    assert (found - stock).norm() < 1e-4 * stock.norm()
    calls = counts(last_run())
    assert set(calls) == {("self", "sdpa_math"), ("cross", "sdpa_math")}
    assert calls[("cross", "sdpa_math")] == 3 * calls[("self", "sdpa_math")]  # both prompts' calls, and one more of NAG


@pytest.fixture
def wan(monkeypatch: pytest.MonkeyPatch) -> Any:
    import tiny_sampling

    plain_comfyui(monkeypatch)
    return tiny_sampling.build("wan")


def sampled(model: Any, steps: int = 2) -> torch.Tensor:
    import tiny_sampling

    return tiny_sampling.sample(model, "wan", steps=steps)


def run_of(model: Any, steps: int = 2) -> tuple[torch.Tensor, dict[str, Any]]:
    return sampled(model, steps), last_run()


def test_kjnodes_sage_node_gives_way_before_ours_and_is_named_after_it(wan: Any, monkeypatch: Any) -> None:
    """The node is KJNodes' own; of the package that it calls only the one function is there."""
    package = types.ModuleType("sageattention")
    package.sageattn = lambda q, k, v, is_causal, attn_mask, tensor_layout: torch.zeros_like(q)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sageattention", package)
    node = loaded("ComfyUI-KJNodes").NODE_CLASS_MAPPINGS["PathchSageAttentionKJ"]()
    (before,) = node.patch(wan, "auto")
    stock = sampled(wan)
    assert not torch.equal(sampled(before), stock), "KJNodes' node does nothing here"
    found, record = run_of(selected(before, "sdpa_math", strict=True))
    assert (found - stock).norm() < 1e-4 * stock.norm()
    assert set(counts(record)) == {("self", "sdpa_math"), ("cross", "sdpa_math")}
    assert len(record["notes"]) == 1
    (after,) = node.patch(selected(wan, "sdpa_math"), "auto")
    _, record = run_of(after)
    assert set(counts(record)) == {("self", "by another"), ("cross", "by another")}


def test_gguf_models_are_routed(wan: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """A tiny Wan in Q8_0, loaded by ComfyUI-GGUF's own node."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    nodes = loaded("ComfyUI-GGUF")
    import folder_paths

    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "wan")
    for key, tensor in wan.model.diffusion_model.state_dict().items():
        values = tensor.numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            quantized = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(key, gguf.quants.quantize(values, quantized), raw_dtype=quantized)
            continue
        if values.ndim > 4:  # the format has four; ComfyUI-GGUF reads the shape from a field of its own
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(values.shape))
            values = values.reshape(values.shape[0], -1)
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(folder_paths, "get_full_path", lambda *_: str(tmp_path / "tiny.gguf"))
    (model,) = nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet("tiny.gguf")
    stock = sampled(model)
    found, record = run_of(selected(model, "sdpa_math", strict=True))
    assert (found - stock).norm() < 1e-3 * stock.norm()
    assert set(counts(record)) == {("self", "sdpa_math"), ("cross", "sdpa_math")}


def test_teacache_keeps_wan_from_the_hook_and_is_named(wan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copy of Wan's forward gives the blocks no options of the model.

    Its nodes file alone: the other one needs Diffusers. ComfyUI 0.33 has no longer a function that TeaCache's code for
    LTX imports; the code for Wan does without.
    """
    here = find_comfyui()
    assert here is not None
    spec = importlib.util.spec_from_file_location("teacache_nodes", place_of("ComfyUI-TeaCache", here) / "nodes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    from comfy.ldm.lightricks import model as lightricks

    monkeypatch.setattr(lightricks, "precompute_freqs_cis", None, raising=False)
    spec.loader.exec_module(module)

    def cached(model: Any) -> Any:
        return module.TeaCache().apply_teacache(model, "wan2.1_t2v_1.3B", 1e9, 0.0, 1.0, "cpu")[0]

    stock = sampled(cached(wan), steps=6)
    assert not torch.equal(stock, sampled(wan, steps=6)), "TeaCache skips nothing here"
    found, record = run_of(cached(selected(wan, "sdpa_math")), steps=6)
    assert torch.equal(found, stock)
    assert set(counts(record)) == {("self", "by another"), ("cross", "by another")}
    with pytest.raises(NoBackendError, match="TeaCache"):
        sampled(cached(selected(wan, "sdpa_math", strict=True)), steps=6)


def test_easycache_skips_steps_and_the_others_are_routed(wan: Any) -> None:
    from comfy_extras.nodes_easycache import EasyCacheNode

    def cached(model: Any) -> Any:
        return EasyCacheNode.execute(model, 3.0, 0.0, 1.0, False).result[0]

    stock = sampled(cached(wan), steps=6)
    whole = counts(run_of(selected(wan, "sdpa_math"), steps=6)[1])
    for model in (cached(selected(wan, "sdpa_math")), selected(cached(wan), "sdpa_math")):
        found, record = run_of(model, steps=6)
        assert (found - stock).norm() < 1e-4 * stock.norm()
        calls = counts(record)
        assert set(calls) == set(whole)
        assert 0 < calls[("self", "sdpa_math")] < whole[("self", "sdpa_math")], "EasyCache skipped nothing"


def test_wanvideowrapper_has_models_of_its_own() -> None:
    """A MODEL is what our nodes take: its loader gives another type, and has its own menu of kernels."""
    tree = ast.parse(source("ComfyUI-WanVideoWrapper", "nodes.py"))
    loader = next(one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == "WanVideoModelLoader")
    text = ast.unparse(loader)
    assert "RETURN_TYPES = ('WANVIDEOMODEL',)" in text
    assert "attention_mode" in text
    assert "sageattn" in text


def test_nunchaku_calls_attention_without_the_options_of_the_model() -> None:
    """Where ComfyUI's hook is: FLUX runs in nunchaku's own library, Qwen-Image calls the function without the hook."""
    tree = ast.parse(source("ComfyUI-nunchaku", "models/qwenimage.py"))
    every = [one for one in ast.walk(tree) if isinstance(one, ast.Call)]
    calls = [one for one in every if "optimized_attention" in ast.unparse(one.func)]
    assert calls
    assert all("transformer_options" not in ast.unparse(call) for call in calls)
    flux = source("ComfyUI-nunchaku", "wrappers/flux.py") + source("ComfyUI-nunchaku", "nodes/models/flux.py")
    assert "optimized_attention" not in flux
    assert "flash-attention2" in flux


def test_the_folders_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "custom_nodes" / "comfyui-pack").mkdir(parents=True)
    assert place_of("ComfyUI-Pack", tmp_path).name == "comfyui-pack"
    with pytest.raises(pytest.skip.Exception, match="no-such-pack"):
        place_of("no-such-pack", tmp_path)
