"""How a caller's tensors become views for kernels: right for whatever strides, offsets and shapes they come in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.config.timetable import Window  # noqa: E402
from attention_calls import as_comfyui_runs  # noqa: E402
from hook_side import exact, host, nodes_module, sampling  # noqa: E402

HEADS, HEAD_DIM, LENGTH, BATCH = 4, 16, 12, 2
INNER = HEADS * HEAD_DIM

layouts = nodes_module("hook.layouts")


@pytest.fixture(autouse=True)
def _as_comfyui() -> Iterator[None]:
    with as_comfyui_runs():
        yield


def forms() -> dict[str, Any]:
    """One (B, S, H*D) tensor in different memory: alone, in a fused projection, in a longer buffer, and so on."""
    fused = torch.randn(BATCH, LENGTH, 3 * INNER)
    longer = torch.randn(BATCH, 2 * LENGTH, INNER)
    return {
        "alone": torch.randn(BATCH, LENGTH, INNER),
        "first of a fused projection": fused[..., :INNER],
        "last of a fused projection": fused[..., 2 * INNER :],
        "end of a longer buffer": longer[:, LENGTH:],
        "every second token": longer[:, ::2],
        "one token for all": torch.randn(BATCH, 1, INNER).expand(-1, LENGTH, -1),
        "tokens first": torch.randn(LENGTH, BATCH, INNER).transpose(0, 1),
        "every second feature": torch.randn(BATCH, LENGTH, 2 * INNER)[..., ::2],
        "batch of equal samples": torch.randn(1, LENGTH, INNER).expand(BATCH, -1, -1),
    }


def test_calls_of_one_plan_may_come_in_any_strides() -> None:
    override = host.Override((AttentionConfig(default=AttentionSpec("torch_sdpa")),))
    run = sampling.Run(override)
    options = {sampling.KEY: override, sampling.OVERRIDE: override, sampling.RUN_KEY: run}
    tensors = list(forms().items())
    for _ in range(3):  # strides that were seen before, and in another order
        for shift in range(3):
            for number, (name, query) in enumerate(tensors):
                key, value = (tensors[(number + step * shift) % len(tensors)][1] for step in (1, 2))
                apart = (tensor.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2) for tensor in (query, key, value))
                expected = torch.nn.functional.scaled_dot_product_attention(*apart).transpose(1, 2).flatten(2)
                found = override(exact, query, key, value, HEADS, transformer_options=options)
                assert torch.equal(found, expected), name
        tensors.reverse()
    (plan,) = run.model_call(torch.device("cpu")).session.plans.values()
    assert plan.slot.plan.row.calls == 3 * 3 * len(tensors)


@pytest.mark.parametrize("form", forms())
def test_a_view_known_by_its_strides_is_the_same_view_without_a_copy(form: str) -> None:
    tensor = forms()[form]
    layout = layouts.Layout(tensor, tensor, tensor, {"heads": HEADS})
    first, again = (layout.call(tensor, tensor, tensor, None) for _ in range(2))
    wanted = tensor.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)
    for call in (first, again):
        for view in (call.query, call.key, call.value):
            assert (view.shape, view.stride(), view.data_ptr()) == (wanted.shape, wanted.stride(), wanted.data_ptr())
            assert torch.equal(view, wanted)
    assert [list(views.known) for views in layout.views] == [[tensor.stride()]] * 3


def test_values_that_have_their_heads_apart_already() -> None:
    """SD3's values are (B, S, H, D)."""
    query = torch.randn(BATCH, LENGTH, INNER)
    value = torch.randn(BATCH, LENGTH, HEADS, HEAD_DIM)
    layout = layouts.Layout(query, query, value, {"heads": HEADS})
    for _ in range(2):
        assert torch.equal(layout.call(query, query, value, None).value, value.transpose(1, 2))


def test_gradients_pass_through_known_views() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        layout = layouts.Layout(*(torch.randn(BATCH, LENGTH, INNER) for _ in range(3)), {"heads": HEADS})
        for _ in range(2):
            fused = torch.randn(BATCH, LENGTH, 3 * INNER, requires_grad=True)
            call = layout.call(*fused.chunk(3, dim=-1), None)
            weights = torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM)
            ((call.query + 2 * call.key) * weights + 3 * call.value).sum().backward()
            flat = weights.transpose(1, 2).flatten(2)
            assert torch.allclose(fused.grad, torch.cat([flat, 2 * flat, torch.full_like(flat, 3)], dim=-1))


def test_places_that_differ_share_their_layout() -> None:
    """What each call reads is then in few places of memory, however many blocks a model has."""
    override = host.Override((AttentionConfig(default=AttentionSpec("torch_sdpa")),))
    run = sampling.Run(override)
    options = {sampling.KEY: override, sampling.OVERRIDE: override, sampling.RUN_KEY: run}
    model_call = run.model_call(torch.device("cpu"))
    query = torch.randn(BATCH, LENGTH, INNER)
    for number in range(3):
        for tensor in (query, query[:, :4]):
            sites = nodes_module("hook.attention_modules")
            previous = sites.set_model_call(model_call)
            model_call.begin({})
            model_call.window = Window(frozenset({number}))
            override(exact, tensor, query, query, HEADS, transformer_options=options)
            sites.set_model_call(previous)
    plans = list(model_call.session.plans.values())
    assert (len(plans), len({id(plan.slot) for plan in plans}), len({id(plan.layout) for plan in plans})) == (6, 6, 2)
    shapes = {id(key[0]) for key in model_call.session.plans}
    assert len(shapes) == 2
