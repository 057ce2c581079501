"""Who computed in a compiled model: another pack's patch or forward is in the graph, and the run says what is not seen.

A trace tells which calls come to us, not whether the rest is attention. Tiny models of a real ComfyUI, compiled with
torch's backend `eager`, which traces, guards and recompiles as any other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion
from tiny_models import FAMILIES

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from hook_side import comfyui, counts, last_run, nodes_module, plain_comfyui, selected  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

pytestmark = pytest.mark.comfy
ME = "the Python module test_who_compiled"
UNET_BLOCK = "middle_block.1.transformer_blocks.0"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    comfyui()
    plain_comfyui(monkeypatch)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@functools.cache
def built(family: str, **sizes: int) -> Any:
    """Tracing takes the time of these tests: one block where it is enough."""
    stock = FAMILIES[family]
    FAMILIES[family] = dataclasses.replace(stock, unet={**stock.unet, **sizes})
    try:
        return tiny_sampling.build(family)
    finally:
        FAMILIES[family] = stock


def compiled(model: Any, *paths: str) -> Any:
    """The model as one graph, or these parts of it; a graph that breaks is an error."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    keys = [f"diffusion_model.{path}" for path in paths] or ["diffusion_model"]
    set_torch_compile_wrapper(model, backend="eager", fullgraph=True, keys=keys)
    return model


def sampled(model: Any, family: str, steps: int = 2) -> tuple[Any, dict[str, Any]]:
    return tiny_sampling.sample(model, family, steps=steps), last_run()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def mixed(x: Any) -> Any:
    """Attention, as a pack may compute it without asking anybody."""
    return torch.softmax(x @ x.mT, dim=-1) @ x


def is_ours_alone(record: dict[str, Any]) -> bool:
    """Whether outcome, record and comparison say so, and nothing else."""
    decisions = nodes_module("history.runs").decisions(record["number"])
    report = {"run": record}
    row = nodes_module("compare.comparison").make_row(1, "", report)
    said = {
        "outcome": record["outcome"]["kind"] == "done",
        "record": decisions["steady"] and not decisions["not_repeated"],
        "comparison": row.failed is None
        and nodes_module("compare.comparison").fallback_notes([row], {1: report}) == [],
        "notes": not any("compiled model" in note for note in record["notes"]),
    }
    assert len(set(said.values())) == 1, (said, record["notes"])
    return said["outcome"]


# Patches that replace a block or an attention


@pytest.mark.parametrize("kind", ["computes", "calls", "skips"])
def test_a_block_patch_in_the_graph(kind: str, snapshot: SnapshotAssertion) -> None:
    def own(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        if kind == "calls":
            return extra["original_block"](args)
        img = args["img"]
        return {**args, "img": img + mixed(img) if kind == "computes" else img}

    def patched(*, strict: bool = False) -> Any:
        model = selected(built("wan"), "sdpa_math", strict=strict)
        model.set_model_patch_replace(own, "dit", "double_block", 0)
        return model

    latent, record = sampled(compiled(patched()), "wan")
    assert not counters["graph_break"]
    assert graphs() == 1
    assert is_ours_alone(record) is (kind == "calls")
    assert {backend for _, backend in counts(record)} == {"sdpa_math"}
    if kind != "computes":
        return
    assert record["notes"] == snapshot
    eager, _ = sampled(patched(), "wan")
    torch.testing.assert_close(latent, eager, rtol=0, atol=1e-4 * float(eager.abs().max()))
    _, record = sampled(compiled(patched(strict=True)), "wan")
    assert not is_ours_alone(record), "not certain, so strict refuses nothing"
    assert graphs() == 1


@pytest.mark.parametrize("kind", ["computes", "calls"])
def test_a_replaced_attention_in_the_graph(kind: str) -> None:
    """As IP-Adapter's packs do, in a block of a UNet that is compiled."""
    from comfy.ldm.modules.attention import optimized_attention

    def own(q: Any, k: Any, v: Any, extra: dict[str, Any]) -> Any:
        if kind == "calls":
            return optimized_attention(q, k, v, extra["n_heads"], transformer_options=extra)
        return torch.softmax(q @ k.mT, dim=-1) @ v

    model = selected(built("sd15"), "sdpa_math")
    model.set_model_patch_replace(own, "attn2", "middle", 0)
    _, record = sampled(compiled(model, UNET_BLOCK), "sd15", steps=1)
    assert not counters["graph_break"]
    assert graphs() == 1
    assert is_ours_alone(record) is (kind == "calls")


# Replaced forwards


@pytest.mark.parametrize("kind", ["computes", "calls"])
def test_a_replaced_forward_in_the_graph(kind: str) -> None:
    model = selected(built("wan", num_layers=1), "sdpa_math")
    module = model.model.diffusion_model.get_submodule("blocks.0.self_attn")
    theirs = type(module).forward

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return mixed(x) if kind == "computes" else theirs(self, x, *args, **kwargs)

    model.add_object_patch("diffusion_model.blocks.0.self_attn.forward", MethodType(forward, module))
    _, record = sampled(compiled(model), "wan", steps=1)
    assert not counters["graph_break"]
    assert graphs() == 1
    assert is_ours_alone(record) is (kind == "calls")


@pytest.mark.parametrize("kind", ["partly", "calls"])
def test_a_replaced_forward_of_a_block_in_the_graph(kind: str, snapshot: SnapshotAssertion) -> None:
    model = selected(built("wan", num_layers=1), "sdpa_math")
    block = model.model.diffusion_model.get_submodule("blocks.0")
    theirs = type(block).forward

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if kind == "calls":
            return theirs(self, x, *args, **kwargs)
        x = x + mixed(x)
        context = kwargs["context"] if "context" in kwargs else args[1]
        return x + self.cross_attn(x, context, transformer_options=kwargs["transformer_options"])

    model.add_object_patch("diffusion_model.blocks.0.forward", MethodType(forward, block))
    _, record = sampled(compiled(model), "wan", steps=1)
    assert not counters["graph_break"]
    assert graphs() == 1
    assert is_ours_alone(record) is (kind == "calls")
    if kind == "partly":
        assert record["notes"] == snapshot


def test_a_model_of_which_nothing_comes_to_us(snapshot: SnapshotAssertion) -> None:
    def own(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return {**args, "img": args["img"] + mixed(args["img"])}

    model = selected(built("wan", num_layers=1), "sdpa_math")
    model.set_model_patch_replace(own, "dit", "double_block", 0)
    _, record = sampled(compiled(model), "wan", steps=1)
    assert record["outcome"] == snapshot
    assert ME in record["outcome"]["cause"]


def test_the_op_is_what_it_declares() -> None:
    reported = nodes_module("hook.compiled")._reported
    torch.library.opcheck(reported, (torch.ones(2, 3).mT, None, 0), test_utils=("test_schema", "test_faketensor"))


def test_a_patch_that_a_wrapper_inside_the_graph_puts_there() -> None:
    from comfy.patcher_extension import WrappersMP

    def own(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return {**args, "img": args["img"] + mixed(args["img"])}

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        at = next(at for at, one in enumerate(args) if isinstance(one, dict) and "sigmas" in one)
        options = {**args[at], "patches_replace": {"dit": {("double_block", 0): own}}}
        return executor(*args[:at], options, *args[at + 1 :], **kwargs)

    model = selected(built("wan", num_layers=1), "sdpa_math")
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "theirs", wrapper)
    _, record = sampled(compiled(model), "wan", steps=1)
    assert not counters["graph_break"]
    assert graphs() == 1
    assert not is_ours_alone(record)
