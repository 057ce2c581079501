"""Adapters and hooks as their own libraries set them: IP adapters, fused projections, LoRA of peft, accelerate's hooks.

peft is not among the packages for tests, since it needs transformers; where it is installed, its tests run.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_diffusers as tiny
import torch
from attention_backends.backends.values.errors import ConfigError
from attention_backends.integrations.diffusers import apply, reset
from test_diffusers_leaks import calls
from test_diffusers_models import ROLES, assert_same_state, state

EXAMPLES = Path(__file__).resolve().parents[2] / "integrations" / "examples"


def ip_adapter(unet: Any, image_dim: int) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of an IP adapter, by the names in published files: of a projection, and of each cross-attention."""
    width = unet.config.cross_attention_dim
    cross = [path for path in unet.attn_processors if path.endswith("attn2.processor")]
    layers = {}
    for number, path in enumerate(cross):
        inner = unet.get_submodule(path.removesuffix(".processor")).to_q.out_features
        for seed, name in enumerate(("to_k_ip", "to_v_ip")):
            layers[f"{2 * number + 1}.{name}.weight"] = tiny.noise(inner, width, seed=10 + 2 * number + seed)
    projection = {
        "proj.weight": tiny.noise(4 * width, image_dim, seed=7),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": layers}


@pytest.mark.parametrize("first", [True, False])
def test_an_ip_adapter_is_loaded_and_unloaded(first: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = runpy.run_path(str(EXAMPLES / "diffusers_sdxl.py"))["tiny_pipeline"]()
    pipe.feature_extractor = SimpleNamespace()  # else load_ip_adapter makes one
    unet, (_, given) = pipe.unet.eval(), tiny.sdxl()
    with_image = {**given, "added_cond_kwargs": {**given["added_cond_kwargs"], "image_embeds": [tiny.noise(1, 1, 8)]}}
    plain = tiny.forward(unet, given)

    def load() -> None:
        pipe.load_ip_adapter(ip_adapter(unet, 8), "", "", image_encoder_folder=None, low_cpu_mem_usage=False)

    if not first:
        load()
    applied = apply(pipe, "torch_sdpa")
    if first:
        assert torch.equal(tiny.forward(unet, given)[0], plain[0])
        load()
        applied = apply(pipe, "torch_sdpa")
    output = tiny.forward(unet, with_image)
    counts = {row.role: 0 for row in applied.reports["unet"].rows.values()}
    for row in applied.reports["unet"].rows.values():
        counts[row.role] += row.calls
    assert counts == {"self": 4, "cross": 4, "unet.image_cross": 4}
    assert not applied.reports["unet"].bypass
    reset(pipe)
    assert torch.equal(tiny.forward(unet, with_image)[0], output[0])
    assert not torch.equal(output[0], plain[0])
    applied = apply(pipe, "torch_sdpa")
    pipe.unload_ip_adapter()
    assert torch.equal(tiny.forward(unet, given)[0], plain[0])
    assert calls(applied) == 8
    reset(pipe)


def test_fused_processors_are_followed() -> None:
    model, given = tiny.sdxl()
    expected, number = tiny.forward(model, given), sum(ROLES["sdxl"].values())
    applied = apply(model, "torch_sdpa")
    model.fuse_qkv_projections()
    output = tiny.forward(model, given)
    assert calls(applied) == number
    assert not applied.reports["model"].bypass
    reset(model)
    assert torch.equal(tiny.forward(model, given)[0], output[0])
    applied = apply(model, "torch_sdpa")
    model.unfuse_qkv_projections()
    assert torch.equal(tiny.forward(model, given)[0], expected[0])
    assert calls(applied) == number
    reset(model)


@pytest.mark.parametrize("first", [True, False])
def test_lora_layers_of_peft_are_followed(first: bool) -> None:
    peft = pytest.importorskip("peft")
    model, given = tiny.flux()
    plain = tiny.forward(model, given)
    lora = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    if first:
        model.add_adapter(lora)
    applied = apply(model, "torch_sdpa")
    if not first:
        model.add_adapter(lora)
    output = tiny.forward(model, given)
    assert not torch.equal(output[0], plain[0])
    model.disable_adapters()
    assert torch.equal(tiny.forward(model, given)[0], plain[0])
    assert calls(applied) == 8
    assert not applied.reports["model"].bypass
    model.enable_adapters()
    reset(model)
    assert torch.equal(tiny.forward(model, given)[0], output[0])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("path", ["", "transformer_blocks.0.attn"])
def test_hooks_of_accelerate_are_followed(path: str, first: bool) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, given = tiny.flux()
    expected, before = tiny.forward(model, given), state(model)
    module = model.get_submodule(path)
    if first:
        hooks.add_hook_to_module(module, hooks.ModelHook())
    applied = apply(model, "torch_sdpa")
    if not first:
        hooks.add_hook_to_module(module, hooks.ModelHook())
    assert torch.equal(tiny.forward(model, given)[0], expected[0])
    assert calls(applied) == 4
    assert not applied.reports["model"].bypass
    reset(model)
    assert torch.equal(tiny.forward(model, given)[0], expected[0])
    assert calls(applied) == 4
    hooks.remove_hook_from_module(module)
    assert module.forward.__func__ is type(module).forward
    module.__dict__.pop("forward")  # accelerate leaves the bound method there
    assert_same_state(before, state(model))


@pytest.mark.parametrize("way", ["whole", "by layer"])
@pytest.mark.parametrize("first", [True, False])
def test_models_that_accelerate_offloads_are_routed(way: str, first: bool) -> None:
    """What `enable_model_cpu_offload` and `enable_sequential_cpu_offload` do to a model, on the CPU."""
    accelerate = pytest.importorskip("accelerate")
    model, given = tiny.flux()
    expected = tiny.forward(model, given)

    def offload() -> None:
        if way == "whole":
            accelerate.cpu_offload_with_hook(model, execution_device="cpu")
        else:
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))

    if first:
        offload()
    applied = apply(model, "torch_sdpa")
    if not first:
        offload()
    for _ in range(2):
        assert torch.equal(tiny.forward(model, given)[0], expected[0])
    assert calls(applied) == 8
    assert not applied.reports["model"].bypass
    accelerate.hooks.remove_hook_from_module(model, recurse=True)  # as each pipeline call does
    assert torch.equal(tiny.forward(model, given)[0], expected[0])
    assert calls(applied) == 12
    reset(model)
    assert torch.equal(tiny.forward(model, given)[0], expected[0])


def text_encoder(kind: str) -> Any:
    transformers = pytest.importorskip("transformers", "5")
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "t5":
        sizes = {"vocab_size": 16, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 4}
        return transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    sizes |= {"intermediate_size": 16, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "clip":
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes)).eval()
    return transformers.Qwen3Model(transformers.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=4)).eval()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["clip", "t5", "qwen3"])  # causal; with a position bias; with grouped heads
def test_a_text_encoder_is_routed_where_it_is_named(kind: str, padded: bool) -> None:
    encoder, ids = text_encoder(kind), torch.arange(24).reshape(2, 12) % 13 + 3
    mask = torch.ones_like(ids) if padded else None
    if mask is not None:
        mask[1, 7:] = 0
    models, before = {"transformer": tiny.flux()[0], "text_encoder": encoder}, state(encoder)
    with torch.no_grad():
        expected = encoder(ids, attention_mask=mask)[0]
        applied = apply(models, {"text_encoder": "torch_sdpa"}, strict=True)
        assert torch.equal(encoder(ids, attention_mask=mask)[0], expected)
        rows = applied.reports["text_encoder"].rows.values()
        assert {(row.role, row.backend, row.reason): row.calls for row in rows}.keys() == {
            ("text_self", "torch_sdpa", None)
        }
        assert sum(row.calls for row in rows) == 2
        assert not applied.reports["text_encoder"].bypass
        other = apply(models, {"text_encoder": "reference"})
        torch.testing.assert_close(encoder(ids, attention_mask=mask)[0], expected, rtol=1e-3, atol=1e-4)
        assert {row.backend for row in other.reports["text_encoder"].rows.values()} == {"reference"}
        encoder.set_attn_implementation("eager")
        encoder(ids, attention_mask=mask)
        assert "attention implementation eager" in other.reports["text_encoder"].bypass
        other.reset()
        encoder.set_attn_implementation("sdpa")
        assert torch.equal(encoder(ids, attention_mask=mask)[0], expected)
    assert_same_state(before, state(encoder))


def test_a_model_without_attention_is_refused_with_the_reason() -> None:
    models = {"transformer": tiny.flux()[0], "text_encoder": torch.nn.Linear(4, 4)}
    before = [state(model) for model in models.values()]
    with pytest.raises(ConfigError, match=r"text_encoder \(Linear\).*\n.*leave text_encoder out"):
        apply(models, {"transformer": "torch_sdpa", "text_encoder": "sdpa_math"})
    for one, model in zip(before, models.values(), strict=True):
        assert_same_state(one, state(model))
    applied = apply(models, "torch_sdpa")  # without names: for the diffusion models
    assert applied.reports.keys() == {"transformer"}
    applied.reset()
