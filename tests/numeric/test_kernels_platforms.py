"""xformers and the kernels of ROCm, Ascend NPUs and TPUs: every cell right or refused, and each trap of the library.

The fakes have the real signatures and refusals; none of these kernels has run on its device.
"""

from __future__ import annotations

import sys
from itertools import product
from types import ModuleType

import pytest
from attention_backends.backends.config.layers import Choice
from attention_backends.backends.engine.router import Router
from attention_backends.backends.values.platform import Platform, parse_platform
from attention_backends.backends.values.request import AttentionCall, AttentionRequest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.kernels.xformers import bias_of  # noqa: E402
from attention_calls import as_comfyui_runs, call_for  # noqa: E402
from fakes import amd_aiter, arithmetic, machine, on_platform, torch_npu, torch_xla, xformers  # noqa: E402
from tolerance import allowed, error, truth  # noqa: E402

PLAIN = AttentionRequest(2, 4, 33, 77, 64, "bfloat16")
HALF = PLAIN._replace(dtype="float16")
AUTO = Choice(None, "platform route")
XFORMERS = "xformers==0.0.35"

AITER = Platform("rocm", gfx="gfx942", torch="2.11.0", packages=(("amd-aiter", "0.1.7"),))
NPU = Platform("npu", torch="2.13.0", packages=(("torch-npu", "2.13.0"),))
TPU = Platform("xla", torch="2.9.0", packages=(("torch-xla", "2.9.0"),))
OLD_TPU = Platform("xla", torch="2.3.0", packages=(("torch-xla", "2.3.0"),))

LENGTHS = ((64, 64), (33, 77), (40, 512), (33, 600), (64, 1024))
GRID = [
    AttentionRequest(2, 4, *lengths, head_dim, dtype, num_kv_heads=kv_heads, mask=mask)
    for dtype, head_dim, mask, kv_heads, lengths in product(
        ("float16", "bfloat16", "float32"), (40, 64, 128, 160), ("none", "key_padding", "bool", "bias"), (4, 2), LENGTHS
    )
]
GRID += [
    AttentionRequest(2, 4, *lengths, 64, dtype, is_causal=is_causal, scale=scale)
    for dtype, lengths in product(("float16", "bfloat16"), LENGTHS)
    for is_causal, scale in ((True, None), (False, 0.06), (True, 0.06))
]


@pytest.fixture(autouse=True)
def inference():
    with as_comfyui_runs():
        yield


def right(output: torch.Tensor, call: AttentionCall) -> bool:
    return error(output, truth(call)).within(allowed(call, "exact"))


def ran(router: Router, backend: str, call: AttentionCall) -> torch.Tensor:
    assert router.reasons_against(backend, call.request()) == ()
    return router.kernel(backend)(call)


def with_mask(request: AttentionRequest, mask: torch.Tensor) -> AttentionCall:
    call = call_for(request._replace(mask="none"))
    call.attn_mask = mask
    return call


def bshd(call: AttentionCall) -> list[torch.Tensor]:
    return [tensor.transpose(1, 2) for tensor in (call.query, call.key, call.value)]


@pytest.mark.parametrize(
    ("backend", "platform", "cells"),
    [("aiter", AITER, 80), ("npu_fusion", NPU, 150), ("xla_flash", TPU, 50), ("xla_flash", OLD_TPU, 20)],
    ids=["aiter", "npu_fusion", "xla_flash", "xla_flash 2.2"],
)
def test_every_cell_is_right_or_refused(
    monkeypatch: pytest.MonkeyPatch, backend: str, platform: Platform, cells: int
) -> None:
    router = on_platform(monkeypatch, platform)
    assert router.unavailable(backend) == ()
    taken = [request for request in GRID if not router.reasons_against(backend, request)]
    assert arithmetic.CALLS == []
    assert len(taken) >= cells
    wrong = [call.request() for call in map(call_for, taken) if not right(router.kernel(backend)(call), call)]
    assert wrong == []
    assert arithmetic.CALLS


class TestXformers:
    @pytest.mark.parametrize("kind", ["key_padding", "bool", "bias"])
    @pytest.mark.parametrize("kv_len", [64, 77])
    def test_a_mask_needs_its_full_shape_and_aligned_rows(self, monkeypatch, kind, kv_len, snapshot: SnapshotAssertion):
        router = machine(monkeypatch, XFORMERS, (8, 6))
        call = call_for(HALF._replace(mask=kind, kv_len=kv_len))
        as_it_comes = call.attn_mask if kind == "bias" else torch.where(call.attn_mask, 0.0, -1e4).half()
        with pytest.raises(ValueError) as caught:
            xformers.memory_efficient_attention(*bshd(call), attn_bias=as_it_comes[:1, :1])
        assert str(caught.value) == snapshot
        full = as_it_comes.expand(2, 4, 33, kv_len).contiguous()
        if kv_len % 8:
            with pytest.raises(NotImplementedError) as caught:
                xformers.memory_efficient_attention(*bshd(call), attn_bias=full)
            assert str(caught.value) == snapshot
        assert right(ran(router, "xformers", call), call)
        assert xformers.OPERATORS[-1] == "cutlassF-pt"

    def test_a_padding_mask_takes_the_memory_of_one_row(self, monkeypatch):
        call = call_for(HALF._replace(mask="key_padding", q_len=4000))
        bias = bias_of(call)
        assert bias.shape == (2, 4, 4000, 77)
        assert bias.untyped_storage().nbytes() == 2 * 80 * 2

    def test_grouped_heads_are_spelt_out(self, monkeypatch):
        router = machine(monkeypatch, XFORMERS, (8, 6))
        call = call_for(HALF._replace(num_kv_heads=2))
        with pytest.raises(ValueError, match="We don't support broadcasting"):
            xformers.memory_efficient_attention(*bshd(call))
        assert right(ran(router, "xformers", call), call)
        assert xformers.OPERATORS[-1].startswith("fa2F")

    def test_a_bias_of_another_dtype_is_converted(self, monkeypatch):
        router = machine(monkeypatch, XFORMERS, (7, 5))
        call = call_for(HALF._replace(mask="bias"))
        call.attn_mask = call.attn_mask.float()
        assert right(ran(router, "xformers", call), call)

    @pytest.mark.parametrize("hidden", [False, float("-inf")])
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_a_query_without_keys_gets_zeros(self, monkeypatch, hidden, dtype):
        router = machine(monkeypatch, XFORMERS, (7, 5))
        mask = torch.ones(2, 1, 33, 77, dtype=torch.bool)
        if hidden is not False:
            mask = torch.zeros(2, 1, 33, 77)
        mask[0, :, 5:9] = hidden
        mask[1, :, 3, 10:] = hidden  # some of its keys
        call = with_mask(HALF._replace(dtype=dtype), mask)
        output = ran(router, "xformers", call)
        assert output[0, :, 5:9].abs().max() == 0
        assert right(output, call)

    def test_tensors_that_start_at_odd_places_are_copied(self, monkeypatch, snapshot: SnapshotAssertion):
        router = machine(monkeypatch, XFORMERS, (8, 6))
        call = call_for(HALF)
        for name in ("query", "key", "value"):
            tensor = getattr(call, name)
            setattr(call, name, torch.nn.functional.pad(tensor.transpose(1, 2), (0, 1))[..., :-1].transpose(1, 2))
        with pytest.raises(NotImplementedError) as caught:
            xformers.memory_efficient_attention(*bshd(call))
        assert str(caught.value) == snapshot
        assert right(ran(router, "xformers", call), call)

    def test_a_single_head_with_an_odd_step_is_copied_too(self, monkeypatch, snapshot: SnapshotAssertion):
        """torch calls such a tensor contiguous, because the step of a dimension of 1 is never taken."""
        router = machine(monkeypatch, XFORMERS, (8, 6))
        call = call_for(HALF._replace(num_heads=1))
        call.query = call.query.contiguous().as_strided(call.query.shape, (33 * 64, 3, 64, 1))
        with pytest.raises(NotImplementedError) as caught:
            xformers.memory_efficient_attention(*bshd(call))
        assert str(caught.value) == snapshot
        assert right(ran(router, "xformers", call), call)

    def test_causal_is_a_class_of_its_own(self, monkeypatch):
        router = machine(monkeypatch, XFORMERS, (8, 6))
        call = call_for(HALF._replace(kv_len=33, is_causal=True))
        assert right(ran(router, "xformers", call), call)

    def test_a_part_that_did_not_load_is_a_reason_in_its_words(self, monkeypatch, snapshot: SnapshotAssertion):
        words = (
            "xFormers can't load C++/CUDA extensions. xFormers was built for:\n"
            "    PyTorch 2.10.0+cu128 with CUDA 1208 (you have 2.11.0+cu130)\n"
            "    Python  3.10.19 (you have 3.12.3)\n"
            "  Please reinstall xformers (see https://github.com/facebookresearch/xformers#installing-xformers)\n"
        )
        monkeypatch.setattr(xformers._cpp_lib, "_built_with_cuda", False)
        monkeypatch.setattr(xformers._cpp_lib, "_cpp_library_load_exception", ImportError(words))
        router = machine(monkeypatch, XFORMERS, (7, 5))
        (reason,) = router.unavailable("xformers")
        assert reason == snapshot
        assert "\n" not in reason
        assert not reason.endswith(".")
        assert router.select(HALF, AUTO).backend == "torch_sdpa"

    def test_flash_attn_4_alone_stands_in_its_way(self, monkeypatch, snapshot: SnapshotAssertion):
        """xformers finds a folder `flash_attn` and imports version 2 from it, which is not there."""

        def missing(name: str) -> object:
            error = "No module named 'flash_attn.flash_attn_interface'"
            raise ModuleNotFoundError(error, name="flash_attn.flash_attn_interface")

        router = machine(monkeypatch, f"{XFORMERS} flash-attn-4==4.0.0b36", (8, 6))
        package = ModuleType("xformers")
        package.__getattr__ = missing
        monkeypatch.setitem(sys.modules, "xformers", package)
        assert router.unavailable("xformers") == snapshot

    @pytest.mark.parametrize(("capability", "operator"), [((7, 5), "_Cutlass"), ((12, 0), "_Flash")])
    def test_the_operator_that_a_card_needs_must_work_with_this_torch(
        self, monkeypatch, capability, operator, snapshot: SnapshotAssertion
    ):
        monkeypatch.setattr(getattr(xformers, operator), "AVAILABLE", False)
        (reason,) = machine(monkeypatch, XFORMERS, capability).unavailable("xformers")
        assert reason == snapshot

    def test_cards_before_ampere_start_with_it(self, monkeypatch):
        router = machine(monkeypatch, XFORMERS, (7, 5))
        for mask in ("none", "key_padding", "bool", "bias"):
            assert router.select(HALF._replace(mask=mask), AUTO).backend == "xformers"
        assert router.select(PLAIN, AUTO).backend == "torch_sdpa"


class TestAiter:
    def test_causal_is_aligned_to_the_bottom_right(self, monkeypatch, snapshot: SnapshotAssertion):
        router = on_platform(monkeypatch, AITER)
        call = call_for(PLAIN._replace(is_causal=True))
        assert not right(amd_aiter.flash_attn_func(*bshd(call), causal=True).transpose(1, 2), call)
        assert router.reasons_against("aiter", call.request()) == snapshot

    def test_versions_that_return_a_tuple_of_one(self, monkeypatch):
        router = on_platform(monkeypatch, AITER)
        monkeypatch.setattr(amd_aiter, "RETURNS_TUPLE", True)
        call = call_for(PLAIN)
        assert right(ran(router, "aiter", call), call)

    def test_the_package_for_asyncio_is_another_one(self, monkeypatch, snapshot: SnapshotAssertion):
        other = Platform("rocm", gfx="gfx942", torch="2.11.0", packages=(("aiter", "0.13.20191203"),))
        assert on_platform(monkeypatch, other).unavailable("aiter") == snapshot
        both = Platform("rocm", gfx="gfx942", packages=(("amd-aiter", "0.1.7"), ("aiter", "0.13.20191203")))
        router = on_platform(monkeypatch, both)
        assert router.unavailable("aiter") == ()  # amd-aiter was installed over it
        monkeypatch.delattr(amd_aiter, "flash_attn_func")
        (reason,) = on_platform(monkeypatch, both).unavailable("aiter")
        assert reason.partition("amd_aiter.py ")[2] == snapshot

    @pytest.mark.parametrize(
        "machine_text",
        [
            "rocm:gfx1100,packages=amd-aiter==0.1.7",
            "rocm,packages=amd-aiter==0.1.7",
            "rocm:gfx942,packages=amd-aiter==0.1.4",
            "cuda:9.0,packages=amd-aiter==0.1.7;aiter==0.13",
        ],
    )
    def test_cards_and_versions(self, machine_text, snapshot: SnapshotAssertion):
        (found,) = Router(parse_platform(machine_text)).unavailable("aiter")
        assert found == snapshot

    def test_a_route_takes_it_where_it_can_and_something_else_for_masks(self, monkeypatch, snapshot: SnapshotAssertion):
        router = on_platform(monkeypatch, AITER)
        assert router.select(PLAIN, AUTO).backend == "aiter"
        masked = router.select(PLAIN._replace(mask="bool"), AUTO)
        assert masked.backend == "torch_sdpa"
        assert str(masked.rejected[0]) == snapshot


class TestNpuFusion:
    @pytest.mark.parametrize("kind", ["key_padding", "bool"])
    def test_its_mask_says_what_is_hidden(self, monkeypatch, kind):
        router = on_platform(monkeypatch, NPU)
        call = call_for(PLAIN._replace(mask=kind))
        tensors = [tensor.contiguous() for tensor in bshd(call)]
        as_sdpa_has_it = call.attn_mask.expand(2, 1, 33, 77).contiguous()
        wrong = torch_npu.npu_fusion_attention(*tensors, 4, "BSND", atten_mask=as_sdpa_has_it, scale=0.125)[0]
        assert not right(wrong.transpose(1, 2), call)
        assert right(ran(router, "npu_fusion", call), call)

    def test_its_own_scale_is_one(self, monkeypatch):
        router = on_platform(monkeypatch, NPU)
        call = call_for(PLAIN)
        tensors = [tensor.contiguous() for tensor in bshd(call)]
        assert not right(torch_npu.npu_fusion_attention(*tensors, 4, "BSND")[0].transpose(1, 2), call)
        assert right(ran(router, "npu_fusion", call), call)

    @pytest.mark.parametrize("shape", [(2, 1, 1, 77), (1, 1, 1, 77), (1, 1, 33, 77), (1, 4, 33, 77), (2, 4, 33, 77)])
    def test_masks_of_every_shape_reach_it_in_one_that_it_takes(self, monkeypatch, shape):
        router = on_platform(monkeypatch, NPU)
        call = with_mask(PLAIN, torch.rand(shape) > 0.4)
        call.attn_mask[..., 0] = True
        assert right(ran(router, "npu_fusion", call), call)

    def test_a_query_without_keys_gets_zeros(self, monkeypatch):
        router = on_platform(monkeypatch, NPU)
        mask = torch.ones(2, 1, 33, 77, dtype=torch.bool)
        mask[0, :, 5:9] = False
        call = with_mask(PLAIN, mask)
        output = ran(router, "npu_fusion", call)
        assert output[0, :, 5:9].abs().max() == 0
        assert right(output, call)

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({"mask": "bias"}, id="mask"),
            pytest.param({"head_dim": 40}, id="head_dim of no multiple"),
            pytest.param({"head_dim": 528}, id="head_dim"),
            pytest.param({"dtype": "float32"}, id="dtype"),
            pytest.param({"is_causal": True}, id="is_causal"),
            pytest.param({"num_heads": 257}, id="num_heads"),
        ],
    )
    def test_refusals(self, changes, snapshot: SnapshotAssertion):
        router = Router(parse_platform("npu,packages=torch-npu==2.13.0"))
        assert router.reasons_against("npu_fusion", PLAIN._replace(**changes)) == snapshot

    def test_only_by_name_and_only_on_npus(self, monkeypatch, snapshot: SnapshotAssertion):
        router = on_platform(monkeypatch, NPU)
        assert router.select(PLAIN, AUTO).backend == "torch_sdpa"
        assert router.select(PLAIN, Choice("npu_fusion", "node"), strict=True).backend == "npu_fusion"
        assert Router(parse_platform("cpu")).unavailable("npu_fusion") == snapshot
        assert Router(parse_platform("npu")).unavailable("npu_fusion") == snapshot


class TestXlaFlash:
    @pytest.mark.parametrize("platform", [TPU, OLD_TPU], ids=["2.9", "2.2"])
    def test_its_own_scale_is_one(self, monkeypatch, platform):
        router = on_platform(monkeypatch, platform)
        call = call_for(PLAIN)
        assert not right(torch_xla.flash_attention(call.query, call.key, call.value), call)
        assert right(ran(router, "xla_flash", call), call)

    @pytest.mark.parametrize("kv_len", [513, 600, 1000])
    def test_a_last_block_that_is_not_full_is_filled_and_hidden(self, monkeypatch, kv_len, snapshot: SnapshotAssertion):
        router = on_platform(monkeypatch, TPU)
        call = call_for(PLAIN._replace(kv_len=kv_len))
        with pytest.raises(ValueError) as caught:
            torch_xla.flash_attention(call.query, call.key, call.value, sm_scale=0.125)
        assert str(caught.value) == snapshot
        assert right(ran(router, "xla_flash", call), call)
        old = Router(parse_platform("xla,packages=torch-xla==2.3.0"))
        assert old.reasons_against("xla_flash", call.request()) == snapshot

    @pytest.mark.parametrize("kv_len", [77, 128, 600])
    def test_a_padding_mask_is_a_segment(self, monkeypatch, kv_len):
        router = on_platform(monkeypatch, TPU)
        call = call_for(PLAIN._replace(kv_len=kv_len, mask="key_padding"))
        output = ran(router, "xla_flash", call)
        assert right(output, call)
        call.attn_mask = None
        assert not right(output, call)
        old = Router(parse_platform("xla,packages=torch-xla==2.3.0"))
        refused = old.reasons_against("xla_flash", PLAIN._replace(mask="key_padding"))
        assert any("key_padding mask" in reason for reason in refused)

    def test_a_sample_without_keys_gets_zeros(self, monkeypatch):
        router = on_platform(monkeypatch, TPU)
        mask = torch.ones(2, 1, 1, 77, dtype=torch.bool)
        mask[1] = False
        call = with_mask(PLAIN, mask)
        output = ran(router, "xla_flash", call)
        assert output[1].abs().max() == 0
        assert right(output, call)

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({"mask": "bool"}, id="mask"),
            pytest.param({"dtype": "float32"}, id="float32"),
            pytest.param({"dtype": "float16"}, id="float16"),
            pytest.param({"head_dim": 160}, id="head_dim"),
        ],
    )
    def test_refusals(self, changes, snapshot: SnapshotAssertion):
        router = Router(parse_platform("xla,packages=torch-xla==2.9.0"))
        assert router.reasons_against("xla_flash", PLAIN._replace(**changes)) == snapshot

    def test_float32_would_be_multiplied_in_bfloat16(self, monkeypatch):
        call = call_for(PLAIN._replace(dtype="float32"))
        assert not right(torch_xla.flash_attention(call.query, call.key, call.value, sm_scale=0.125), call)

    def test_the_route_starts_with_it_on_a_tpu_alone(self, monkeypatch, snapshot: SnapshotAssertion):
        assert on_platform(monkeypatch, TPU).select(PLAIN, AUTO).backend == "xla_flash"
        monkeypatch.setattr(torch_xla, "DEVICE", "CPU")
        router = on_platform(monkeypatch, TPU)
        assert router.select(PLAIN, AUTO).backend == "torch_sdpa"
        assert router.unavailable("xla_flash") == snapshot
        old = Router(parse_platform("xla,packages=torch-xla==2.1.0"))
        assert old.unavailable("xla_flash") == snapshot
