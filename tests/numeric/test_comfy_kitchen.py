"""ComfyUI's INT8 attention, from comfy-kitchen: what it refuses or does otherwise than SDPA, and what we do about it.

Through a fake with its checks; where the real package is installed, its signature and its answer without a card.
"""

from __future__ import annotations

import inspect
import weakref
from importlib import metadata

import pytest
from attention_backends.backends.values.platform import Platform
from attention_backends.backends.values.request import AttentionCall, AttentionRequest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_calls import as_comfyui_runs, call_for, copied  # noqa: E402
from fakes import comfy_kitchen, machine  # noqa: E402
from tolerance import allowed, error, truth  # noqa: E402

PLAIN = AttentionRequest(1, 2, 130, 192, 64, "float16")
PACKAGE = "comfy-kitchen==0.2.31"


@pytest.fixture(autouse=True)
def inference():
    with as_comfyui_runs():
        yield


def right(output: torch.Tensor, call: AttentionCall) -> bool:
    return error(output, truth(call)).within(allowed(call, "int8"))


def ran(router: Router, call: AttentionCall) -> torch.Tensor:
    assert router.reasons_against("comfy_kitchen_int8", call.request()) == ()
    return router.kernel("comfy_kitchen_int8")(call)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("fault", ["start", "row"])
def test_rows_that_are_not_aligned_are_an_error_there_and_copied_here(monkeypatch, name, fault):
    router, call = machine(monkeypatch, PACKAGE), call_for(PLAIN)
    tensor = getattr(call, name)
    wider = torch.zeros(*tensor.shape[:3], 64 + (8 if fault == "start" else 1), dtype=tensor.dtype)
    shifted = wider[..., 1:65] if fault == "start" else wider[..., :64]
    setattr(call, name, shifted.copy_(tensor))
    with pytest.raises(RuntimeError, match="alignment"):
        comfy_kitchen.int8_attention(call.query, call.key, call.value)
    assert right(ran(router, call), call)


def test_tensors_that_nobody_else_holds_are_freed_before_the_second_step(monkeypatch):
    router, given = machine(monkeypatch, PACKAGE), call_for(PLAIN)
    expected = given.query.clone(), given.key.clone(), given.value.clone()
    monkeypatch.setattr(comfy_kitchen, "FREED", [])
    for owned in (True, False):
        call = copied(given)
        call.owned = owned
        references = [weakref.ref(tensor) for tensor in (call.query, call.key, call.value)]
        monkeypatch.setattr(comfy_kitchen, "WATCHED", references)
        output = router.kernel("comfy_kitchen_int8")(call)
        assert right(output, AttentionCall(*expected))
        assert (call.query is None) is owned
    assert comfy_kitchen.FREED == [True]


def test_aligned_tensors_and_those_it_pads_itself_are_not_copied(monkeypatch):
    given = []
    monkeypatch.setattr(comfy_kitchen, "int8_attention", lambda *tensors, **options: given.append(tensors))
    kernel = machine(monkeypatch, PACKAGE).kernel("comfy_kitchen_int8")
    for head_dim in (64, 100):
        rows = torch.zeros(1, 192, 3, 2, head_dim, dtype=torch.float16).transpose(1, 3)
        call = AttentionCall(*(rows[:, :, index] for index in range(3)))
        kernel(call)
        assert all(a is b for a, b in zip(given.pop(), (call.query, call.key, call.value), strict=True))


@pytest.mark.parametrize("as_bias", [False, True])
def test_a_row_without_a_key_is_zero(monkeypatch, as_bias):
    router, call = machine(monkeypatch, PACKAGE), call_for(PLAIN._replace(mask="bool"))
    call.attn_mask[:, :, 5] = False
    if as_bias:
        call.attn_mask = torch.zeros(call.attn_mask.shape).masked_fill(~call.attn_mask, float("-inf"))
    output = ran(router, call)
    assert output[:, :, 5].count_nonzero() == 0
    assert right(output, call)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_masks_of_other_dtypes_are_converted(monkeypatch, dtype):
    router, call = machine(monkeypatch, PACKAGE), call_for(PLAIN._replace(mask="bool"))
    if dtype == torch.uint8:  # numbers are added to scores, integers too
        call.attn_mask = call.attn_mask.to(dtype) * 2
    else:
        call.attn_mask = torch.zeros(call.attn_mask.shape, dtype=dtype).masked_fill(~call.attn_mask, float("-inf"))
    expected = copied(call)
    assert right(ran(router, call), expected)


def test_a_wheel_whose_compiled_part_does_not_load(monkeypatch, snapshot: SnapshotAssertion):
    monkeypatch.setattr(comfy_kitchen, "EXTENSION", False)
    (reason,) = machine(monkeypatch, PACKAGE).unavailable("comfy_kitchen_int8")
    assert reason == snapshot


def test_amd_cards():
    for gfx, reasons in (
        ("gfx1100", ()),
        ("gfx1201", ()),
        ("gfx1030", ("does not support gfx1030, only (gfx1100, ",)),
        ("gfx942", ("does not support gfx942, only (gfx1100, ",)),
    ):
        platform = Platform("rocm", gfx=gfx, packages=(("comfy-kitchen", "0.2.31"),), described=True)
        found = Router(platform).unavailable("comfy_kitchen_int8")
        assert len(found) == len(reasons)
        assert all(text.startswith(start) for text, start in zip(found, reasons, strict=True))


def test_float32_comes_back_as_exact_as_bfloat16(monkeypatch):
    call = call_for(PLAIN._replace(dtype="float32"))
    output = ran(machine(monkeypatch, PACKAGE), call)
    assert output.dtype == torch.float32
    assert torch.equal(output, output.bfloat16().float())


def test_a_scale_reaches_the_kernel(monkeypatch):
    router, call = machine(monkeypatch, PACKAGE), call_for(PLAIN._replace(scale=0.05))
    assert right(ran(router, call), call)
    assert not right(comfy_kitchen.int8_attention(call.query, call.key, call.value), call)


@pytest.fixture
def installed():
    """The real package and its version."""
    real = pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
    return real, metadata.version("comfy-kitchen")


@pytest.mark.parametrize("name", ["int8_attention", "int8_attention_is_available"])
def test_the_fake_has_the_signature_of_the_package(installed, name):
    real, fake = (inspect.signature(getattr(module, name)).parameters for module in (installed[0], comfy_kitchen))
    assert [(one.name, one.kind, one.default) for one in real.values()] == [
        (one.name, one.kind, one.default) for one in fake.values()
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPU: there is a card, on which it is available")
def test_without_a_card_the_package_itself_says_no(installed, snapshot: SnapshotAssertion):
    router = Router(Platform("cuda", capability=(8, 9), packages=(("comfy-kitchen", installed[1]),)))
    (reason,) = router.unavailable("comfy_kitchen_int8")
    assert reason == snapshot
