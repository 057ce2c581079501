"""Real packs that have a hand in attention, where they lie in the `custom_nodes` of the ComfyUI that is tested."""

from __future__ import annotations

import asyncio
import contextlib
import re
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
    """Where a pack lies in a ComfyUI; the case of its folder's name is its installer's."""
    places = [one for one in (here / "custom_nodes").iterdir() if one.name.lower() == folder_name.lower()]
    if not places:
        pytest.skip(f"{folder_name} is not in the custom_nodes of this ComfyUI")
    return places[0]


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


def test_the_folders_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "custom_nodes" / "comfyui-pack").mkdir(parents=True)
    assert place_of("ComfyUI-Pack", tmp_path).name == "comfyui-pack"
    with pytest.raises(pytest.skip.Exception, match="no-such-pack"):
        place_of("no-such-pack", tmp_path)
