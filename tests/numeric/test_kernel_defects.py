"""Each known defect of a kernel package: shown on the package's function, then refused or corrected by its backend.

The packages are fakes that have the defects (fakes/); test_sage_interpreter.py shows some of them on real code.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from attention_backends.backends.values.request import AttentionCall, AttentionRequest
from kernel_machines import SAGE_1, SAGE_2, SAGE_FORK, TRITON
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.kernels.support import layout  # noqa: E402
from attention_calls import as_comfyui_runs, call_for, copied  # noqa: E402
from fakes import (  # noqa: E402
    arithmetic,
    flash_attn_2,
    flash_attn_3,
    flashinfer,
    machine,
    sageattention_1,
    sageattention_2,
    sageattn3,
)
from tolerance import allowed, error, truth  # noqa: E402

PLAIN = AttentionRequest(1, 2, 130, 192, 64, "float16")
SAGE_3 = f"sageattn3==1.0.0 {TRITON}"


@pytest.fixture(autouse=True)
def inference():
    with as_comfyui_runs():
        yield


def right(output: torch.Tensor, call: AttentionCall, arithmetic_class: str) -> bool:
    return error(output, truth(call)).within(allowed(call, arithmetic_class))


def ran(router, backend: str, call: AttentionCall) -> torch.Tensor:
    assert router.reasons_against(backend, call.request()) == ()
    return router.kernel(backend)(call)


class TestSage1:
    @pytest.mark.parametrize("kv_len", [77, 200, 226])
    def test_keys_that_fill_the_last_block_are_counted(self, monkeypatch, kv_len, snapshot: SnapshotAssertion):
        call = call_for(PLAIN._replace(kv_len=kv_len))
        output = sageattention_1.sageattn(call.query, call.key.clone(), call.value)
        assert not right(output, call, "int8")
        smoothed = call.key - call.key.mean(dim=2, keepdim=True)
        tail = (0, 0, 0, -kv_len % 64)
        zero_keys = AttentionCall(
            call.query, torch.nn.functional.pad(smoothed, tail), torch.nn.functional.pad(call.value, tail)
        )
        assert right(output, zero_keys, "int8")

        router = machine(monkeypatch, SAGE_1)
        assert router.reasons_against("sage_attn", call.request()) == snapshot

    def test_whole_blocks_and_causal_calls_are_right(self, monkeypatch):
        router = machine(monkeypatch, SAGE_1)
        for request in (PLAIN, PLAIN._replace(q_len=77, kv_len=77, is_causal=True)):
            call = call_for(request)
            assert right(ran(router, "sage_attn", call), call, "int8")

    def test_key_is_changed_in_place(self, monkeypatch):
        call = call_for(PLAIN)
        key = call.key.clone()
        sageattention_1.sageattn(call.query, key, call.value)
        assert not torch.equal(key, call.key)

        router, before = machine(monkeypatch, SAGE_1), copied(call)
        assert right(ran(router, "sage_attn", call), before, "int8")
        for name in ("query", "key", "value"):
            assert torch.equal(getattr(call, name), getattr(before, name))

    def test_smoothing_is_the_packages_own(self, monkeypatch):
        """Subtracting the mean outside gives the very bits that the package gives."""
        for dtype in ("float16", "bfloat16", "float32"):
            call = call_for(PLAIN._replace(dtype=dtype))
            own = sageattention_1.sageattn(call.query, call.key.clone(), call.value)
            assert torch.equal(ran(machine(monkeypatch, SAGE_1), "sage_attn", call), own)


@pytest.mark.parametrize(
    ("packages", "function"), [(SAGE_1, sageattention_1.sageattn), (SAGE_2, sageattention_2.sageattn)]
)
class TestSwallowedKeywords:
    def test_scale(self, monkeypatch, packages, function):
        router = machine(monkeypatch, packages)
        call = call_for(PLAIN._replace(scale=0.3))
        assert not right(function(call.query, call.key.clone(), call.value, scale=0.3), call, "fp8")
        assert right(ran(router, "sage_attn", call), call, "fp8")

    @pytest.mark.parametrize("kind", ["key_padding", "bool", "bias"])
    def test_mask(self, monkeypatch, packages, function, kind):
        router = machine(monkeypatch, packages)
        call = call_for(PLAIN._replace(mask=kind))
        swallowed = function(call.query, call.key.clone(), call.value, attn_mask=call.attn_mask)
        assert not right(swallowed, call, "fp8")
        assert router.reasons_against("sage_attn", call.request()) == (f"does not support a {kind} mask",)


class TestSage2Triton:
    def test_a_bias_is_added_in_log2_units(self, monkeypatch):
        router = machine(monkeypatch, SAGE_2)
        call = call_for(PLAIN._replace(mask="bias"))
        as_it_is = sageattention_2.sageattn_qk_int8_pv_fp16_triton(
            call.query, call.key, call.value, attn_mask=call.attn_mask
        )
        assert not right(as_it_is, call, "int8")
        assert right(ran(router, "sage_fp16_triton", call), call, "int8")

    def test_a_first_block_of_minus_infinity_gives_nan(self, monkeypatch):
        router = machine(monkeypatch, SAGE_2)
        call = call_for(PLAIN)
        call.attn_mask = torch.zeros(1, 1, 1, 192, dtype=torch.float16)
        call.attn_mask[..., :64] = float("-inf")
        as_it_is = sageattention_2.sageattn_qk_int8_pv_fp16_triton(
            call.query, call.key, call.value, attn_mask=call.attn_mask
        )
        assert as_it_is.isnan().all()
        assert right(ran(router, "sage_fp16_triton", call), call, "int8")

    @pytest.mark.parametrize("as_bias", [False, True])
    def test_a_row_without_a_key_gets_a_mean(self, monkeypatch, as_bias):
        router = machine(monkeypatch, SAGE_2)
        call = call_for(PLAIN._replace(mask="bool"))
        call.attn_mask[:, :, 5] = False
        as_it_is = sageattention_2.sageattn_qk_int8_pv_fp16_triton(
            call.query, call.key, call.value, attn_mask=call.attn_mask
        )
        assert as_it_is[0, 0, 5].norm() > 0.1
        if as_bias:
            call.attn_mask = torch.zeros(call.attn_mask.shape).masked_fill(~call.attn_mask, float("-inf")).half()
        output = ran(router, "sage_fp16_triton", call)
        assert output[:, :, 5].count_nonzero() == 0
        assert right(output, call, "int8")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("hidden", [-1e4, -3.0e38])
    def test_a_bias_in_another_dtype_stays_finite(self, monkeypatch, dtype, hidden):
        router = machine(monkeypatch, SAGE_2)
        call = call_for(PLAIN._replace(dtype=dtype))
        call.attn_mask = torch.zeros(1, 1, 130, 192)
        call.attn_mask[..., 100:] = hidden
        assert right(ran(router, "sage_fp16_triton", call), call, "int8")

    def test_what_fills_the_last_block_outweighs_the_lowest_bfloat16(self, monkeypatch):
        router = machine(monkeypatch, SAGE_2)
        call = call_for(PLAIN._replace(kv_len=77, dtype="bfloat16"))
        call.attn_mask = torch.zeros(1, 1, 130, 77, dtype=torch.bfloat16)
        call.attn_mask[:, :, 5] = torch.finfo(torch.bfloat16).min
        as_it_is = sageattention_2.sageattn_qk_int8_pv_fp16_triton(
            call.query, call.key, call.value, attn_mask=call.attn_mask
        )
        assert as_it_is[:, :, 5].count_nonzero() == 0
        assert right(ran(router, "sage_fp16_triton", call), call, "int8")

    def test_a_build_without_masks_raises_instead_of_dropping_one(self, monkeypatch):
        def older(
            q, k, v, tensor_layout="HND", quantization_backend="triton", is_causal=False, sm_scale=None, **kwargs
        ):
            raise AssertionError("called")

        router = machine(monkeypatch, SAGE_2)
        monkeypatch.setattr(sageattention_2, "sageattn_qk_int8_pv_fp16_triton", older)
        with pytest.raises(NotImplementedError, match="takes no mask"):
            ran(router, "sage_fp16_triton", call_for(PLAIN._replace(mask="bool")))


class TestSage2Cuda:
    @pytest.mark.parametrize(("packages", "capability"), [(SAGE_2, (8, 0)), (SAGE_FORK, (8, 6)), (SAGE_FORK, (8, 7))])
    def test_an_unfilled_last_block_may_give_nan(self, monkeypatch, packages, capability):
        router = machine(monkeypatch, packages, capability)
        call = call_for(PLAIN._replace(kv_len=77))
        assert sageattention_2.sageattn(call.query, call.key, call.value).isnan().any()
        arithmetic.CALLS.clear()
        assert right(ran(router, "sage_attn", call), call, "int8")
        assert arithmetic.CALLS == ["sageattn_qk_int8_pv_fp16_triton"]
        backend = router.backends["sage_attn"]
        assert backend.kernel_name(call.request(), router.platform) == "sage_fp16_triton"
        assert backend.kernel_name(PLAIN, router.platform) == "sage_fp16_cuda"

    def test_long_sequences_are_noise_on_sm12x(self, monkeypatch):
        router = machine(monkeypatch, SAGE_2, (12, 0))
        monkeypatch.setattr(sageattention_2, "NOISE_FROM", 160)
        call = call_for(PLAIN)
        assert not right(sageattention_2.sageattn(call.query, call.key, call.value), call, "fp8")
        assert router.reasons_against("sage_attn", PLAIN._replace(kv_len=160_000)) == ("kv_len 160000 > 150000",)
        assert machine(monkeypatch, SAGE_2, (8, 9)).reasons_against("sage_attn", PLAIN._replace(kv_len=160_000)) == ()

    def test_a_build_that_returns_unwritten_memory_on_sm90(self, monkeypatch):
        def hides_the_operator() -> None: ...

        name = "qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf"
        monkeypatch.setattr(sageattention_2.core.sm90_compile, name, hides_the_operator)
        router = machine(monkeypatch, SAGE_2, (9, 0))
        call = call_for(PLAIN)
        assert not right(sageattention_2.sageattn(call.query, call.key, call.value), call, "fp8")
        (reason,) = router.unavailable("sage_attn")
        assert "unwritten memory on sm90" in reason
        assert machine(monkeypatch, SAGE_2, (8, 9)).unavailable("sage_attn") == ()

    def test_a_build_without_the_cards_kernel(self, monkeypatch):
        monkeypatch.setattr(sageattention_2.core, "SM89_ENABLED", False)
        (reason,) = machine(monkeypatch, SAGE_2, (8, 9)).unavailable("sage_attn")
        assert "SM89_ENABLED is false" in reason

    @pytest.mark.parametrize(
        "request_", [PLAIN._replace(kv_len=77), PLAIN._replace(q_len=77, kv_len=77, is_causal=True)]
    )
    def test_by_its_name_the_fp16_kernel_refuses_an_unfilled_last_block(
        self, monkeypatch, request_, snapshot: SnapshotAssertion
    ):
        router = machine(monkeypatch, SAGE_2, (8, 0))
        call = call_for(request_)
        kernel = sageattention_2.sageattn_qk_int8_pv_fp16_cuda
        assert kernel(call.query, call.key, call.value, is_causal=request_.is_causal).isnan().any()
        assert router.reasons_against("sage_fp16_cuda", request_) == snapshot
        assert router.reasons_against("sage_fp8_cuda", request_) != ()  # that card has no FP8
        assert machine(monkeypatch, SAGE_2, (8, 9)).reasons_against("sage_fp8_cuda", request_) == ()

    def test_by_its_name_the_fp8_kernel_refuses_what_is_noise_on_sm12x(self, monkeypatch):
        router = machine(monkeypatch, SAGE_2, (12, 0))
        monkeypatch.setattr(sageattention_2, "NOISE_FROM", 160)
        call = call_for(PLAIN)
        noise = sageattention_2.sageattn_qk_int8_pv_fp8_cuda(call.query, call.key, call.value)
        assert not right(noise, call, "fp8")
        assert router.reasons_against("sage_fp8_cuda", PLAIN._replace(kv_len=160_000)) == ("kv_len 160000 > 150000",)
        assert router.reasons_against("sage_fp16_cuda", PLAIN._replace(kv_len=160_000)) == ()


class TestOneNameTwoLibraries:
    @pytest.mark.parametrize(
        ("packages", "module", "words"),
        [
            (SAGE_1, sageattention_2, "metadata says sageattention 1.x"),
            (SAGE_2, sageattention_1, "metadata says sageattention 2.x"),
        ],
    )
    def test_files_and_metadata_disagree(self, monkeypatch, packages, module, words):
        router = machine(monkeypatch, packages)
        monkeypatch.setitem(sys.modules, "sageattention", module)
        (reason,) = router.unavailable("sage_attn")
        assert words in reason

    def test_each_version_reports_what_runs(self, monkeypatch):
        expected = {
            (SAGE_1, (8, 9)): ("sageattention 1.0.6", "sageattention_1.sageattn"),
            (SAGE_2, (8, 6)): ("sage_fp16_triton", "sageattn_qk_int8_pv_fp16_triton"),
            (SAGE_2, (8, 9)): ("sage_fp8_cuda", "sageattn_qk_int8_pv_fp8_cuda"),
            (SAGE_2, (9, 0)): ("sage_fp8_sm90", "sageattn_qk_int8_pv_fp8_cuda_sm90"),
            (SAGE_2, (12, 0)): ("sage_fp8_cuda", "sageattn_qk_int8_pv_fp8_cuda"),
            (SAGE_FORK, (8, 6)): ("sage_fp16_cuda", "sageattn_qk_int8_pv_fp16_cuda"),
        }
        for (packages, capability), (member, function) in expected.items():
            router = machine(monkeypatch, packages, capability)
            ran(router, "sage_attn", call_for(PLAIN))
            assert router.backends["sage_attn"].kernel_name(PLAIN, router.platform) == member
            assert arithmetic.CALLS[-1] == function


class TestSage3:
    def test_mask_and_scale_are_ignored(self, monkeypatch, snapshot: SnapshotAssertion):
        router = machine(monkeypatch, SAGE_3, (12, 0))
        masked = call_for(PLAIN._replace(mask="key_padding"))
        ignored = sageattn3.sageattn3_blackwell(masked.query, masked.key.clone(), masked.value, masked.attn_mask)
        assert not right(ignored, masked, "fp4")
        assert router.reasons_against("sage_attn_3", masked.request()) == snapshot
        scaled = call_for(PLAIN._replace(scale=0.3))
        ignored = sageattn3.sageattn3_blackwell(scaled.query, scaled.key.clone(), scaled.value, scale=0.3, sm_scale=0.3)
        assert not right(ignored, scaled, "fp4")
        assert router.reasons_against("sage_attn_3", scaled.request()) == snapshot

    def test_grouped_heads_fail_in_a_product(self, monkeypatch, snapshot: SnapshotAssertion):
        router = machine(monkeypatch, SAGE_3, (12, 0))
        call = call_for(PLAIN._replace(num_heads=6, num_kv_heads=2))
        with pytest.raises(RuntimeError):
            sageattn3.sageattn3_blackwell(call.query, call.key.clone(), call.value)
        assert router.reasons_against("sage_attn_3", call.request()) == snapshot

    def test_key_is_changed_in_place(self, monkeypatch):
        call = call_for(PLAIN)
        key = call.key.clone()
        sageattn3.sageattn3_blackwell(call.query, key, call.value)
        assert not torch.equal(key, call.key)
        router, before = machine(monkeypatch, SAGE_3, (12, 0)), copied(call)
        assert right(ran(router, "sage_attn_3", call), before, "fp4")
        assert torch.equal(call.key, before.key)

    def test_wide_heads_run_something_else(self, monkeypatch, snapshot: SnapshotAssertion):
        router = machine(monkeypatch, SAGE_3, (12, 0))
        call = call_for(PLAIN._replace(head_dim=256))
        assert right(sageattn3.sageattn3_blackwell(call.query, call.key, call.value), call, "exact")
        assert router.reasons_against("sage_attn_3", call.request()) == snapshot


class TestFlash:
    def test_causal_is_aligned_to_the_bottom_right(self, monkeypatch, snapshot: SnapshotAssertion):
        router = machine(monkeypatch, "flash-attn==2.8.3", (8, 0))
        call = call_for(PLAIN._replace(is_causal=True))
        bshd = [tensor.transpose(1, 2) for tensor in (call.query, call.key, call.value)]
        assert not right(flash_attn_2.flash_attn_func(*bshd, causal=True).transpose(1, 2), call, "exact")
        assert router.reasons_against("flash_attn_2", call.request()) == snapshot
        square = call_for(PLAIN._replace(kv_len=130, is_causal=True))
        assert right(ran(router, "flash_attn_2", square), square, "exact")

    def test_version_4_alone_leaves_a_folder_without_the_function(self, monkeypatch, snapshot: SnapshotAssertion):
        router = machine(monkeypatch, "flash-attn-4==4.0.0b36", (9, 0))
        import flash_attn

        assert not hasattr(flash_attn, "flash_attn_func")
        assert router.unavailable("flash_attn_2")[0] == snapshot
        assert router.unavailable("flash_attn_4") == ()

    def test_metadata_without_the_function_is_a_reason(self, monkeypatch, snapshot: SnapshotAssertion):
        router = machine(monkeypatch, "flash-attn==2.8.3", (9, 0))
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        (reason,) = router.unavailable("flash_attn_2")
        assert reason == snapshot

    def test_betas_of_version_3_return_two_things(self, monkeypatch):
        router = machine(monkeypatch, "flash-attn-3==3.0.0b1", (9, 0))
        monkeypatch.setattr(flash_attn_3, "RETURNS_LSE", True)
        call = call_for(PLAIN)
        assert right(ran(router, "flash_attn_3", call), call, "exact")

    def test_flashinfer_drops_causal_beside_a_mask_and_misreads_a_bias(self, monkeypatch, snapshot: SnapshotAssertion):
        router = machine(monkeypatch, "flashinfer-python==0.7.2", (9, 0))
        both = call_for(PLAIN._replace(q_len=192, mask="bool", is_causal=True))
        assert router.reasons_against("flashinfer_attn", both.request()) == snapshot
        one = [tensor[0].transpose(0, 1) for tensor in (both.query, both.key, both.value)]
        dropped = flashinfer.single_prefill_with_kv_cache(*one, custom_mask=both.attn_mask[0, 0], causal=True)
        assert not right(dropped.transpose(0, 1)[None], both, "exact")
        biased = call_for(PLAIN._replace(mask="bias"))
        one = [tensor[0].transpose(0, 1) for tensor in (biased.query, biased.key, biased.value)]
        misread = flashinfer.single_prefill_with_kv_cache(*one, custom_mask=biased.attn_mask[0, 0])
        assert not right(misread.transpose(0, 1)[None], biased, "exact")
        assert router.reasons_against("flashinfer_attn", biased.request())[0] == snapshot

    def test_flashinfer_with_a_mask_for_each_head(self, monkeypatch):
        router = machine(monkeypatch, "flashinfer-python==0.7.2", (9, 0))
        call = call_for(PLAIN._replace(batch=2, num_heads=4, num_kv_heads=2))
        call.attn_mask = torch.rand(2, 4, 130, 192, generator=torch.Generator().manual_seed(1)) > 0.5
        assert right(ran(router, "flashinfer_attn", call), call, "exact")


class TestOffsetsOf32Bits:
    """Fused projections have long rows: an offset wraps although the tensor itself is small enough."""

    @pytest.mark.parametrize(
        ("backend", "packages", "capability", "arithmetic_class"),
        [
            ("flash_attn_2", "flash-attn==2.8.3", (8, 0), "exact"),
            ("flash_attn_4", "flash-attn-4==4.0.0b36", (9, 0), "exact"),
            ("flashinfer_attn", "flashinfer-python==0.7.2", (9, 0), "exact"),
            ("sage_attn", SAGE_1, (8, 9), "int8"),
            ("sage_attn", SAGE_2, (8, 9), "fp8"),
            ("sage_fp16_triton", SAGE_2, (8, 9), "int8"),
            ("sage_fp16_cuda", SAGE_2, (8, 0), "int8"),
            ("sage_fp8_cuda", SAGE_2, (8, 9), "fp8"),
            ("sage_fp8_sm90", SAGE_2, (9, 0), "fp8"),
        ],
    )
    def test_long_rows_are_copied(self, monkeypatch, backend, packages, capability, arithmetic_class):
        router = machine(monkeypatch, packages, capability)
        fused = call_for(PLAIN._replace(q_len=192, kv_len=192, num_heads=6))
        rows = torch.cat([fused.query, fused.key, fused.value], dim=1).transpose(1, 2).contiguous().transpose(1, 2)
        call = AttentionCall(*rows.split(6, dim=1))
        # As many elements as one of the three has: reading it by 32-bit offsets just works, from a copy.
        monkeypatch.setattr(arithmetic, "INT32", fused.query.numel())
        monkeypatch.setattr(layout, "INT32_ELEMENTS", 2**31 - 1)
        assert not right(ran(router, backend, call), call, arithmetic_class)
        monkeypatch.setattr(layout, "INT32_ELEMENTS", fused.query.numel())
        assert right(ran(router, backend, call), call, arithmetic_class)

    def test_the_row_of_the_report_upstream(self):
        """56 heads of 128 in a fused projection: row 99,864 is the first that is out of reach."""
        for rows, fits in ((99_864, True), (99_866, False)):
            fused = torch.empty(1, rows, 3, 56, 128, device="meta")
            query = fused[:, :, 0]
            assert (layout.indexable(query) is query) is fits
            assert layout.indexable(query).stride(1) == (3 * 56 * 128 if fits else 56 * 128)

    def test_a_last_dimension_with_gaps_is_copied(self):
        assert layout.indexable(torch.empty(1, 2, 8, 32).transpose(2, 3)).stride(-1) == 1


class TestFamily:
    ALL = "flash-attn==2.8.3 flash-attn-3==3.0.0 flash-attn-4==4.0.0b36"

    @pytest.mark.parametrize(
        ("packages", "capability", "member"),
        [
            (ALL, (9, 0), "flash_attn_3"),
            ("flash-attn==2.8.3 flash-attn-4==4.0.0b36", (9, 0), "flash_attn_4"),
            ("flash-attn==2.8.3", (9, 0), "flash_attn_2"),
            (ALL, (10, 0), "flash_attn_4"),
            (ALL, (12, 1), "flash_attn_4"),
            (ALL, (8, 0), "flash_attn_2"),
            (ALL, (8, 9), "flash_attn_2"),
        ],
    )
    def test_the_best_member_for_the_card(self, monkeypatch, packages, capability, member):
        router = machine(monkeypatch, packages, capability)
        call = call_for(PLAIN)
        assert right(ran(router, "flash_attn", call), call, "exact")
        backend = router.backends["flash_attn"]
        assert backend.kernel_name(PLAIN, router.platform) == member
        assert backend.limits_on(router.platform) == router.backends[member].limits_on(router.platform)

    def test_a_broken_member_gives_way(self, monkeypatch):
        router = machine(monkeypatch, self.ALL, (9, 0))
        monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
        call = call_for(PLAIN)
        assert right(ran(router, "flash_attn", call), call, "exact")
        assert router.backends["flash_attn"].kernel_name(PLAIN, router.platform) == "flash_attn_4"
        assert router.unavailable("flash_attn_3")[0].startswith("could not be loaded: ")

    def test_all_broken_says_each_reason(self, monkeypatch):
        router = machine(monkeypatch, "flash-attn==2.8.3 flash-attn-4==4.0.0b36", (9, 0))
        monkeypatch.setitem(sys.modules, "flash_attn", None)
        monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
        (reason,) = router.unavailable("flash_attn")
        assert "flash_attn_4: import of " in reason
        assert "flash_attn_2: import of " in reason


@pytest.mark.parametrize("raised", [ImportError, OSError, RuntimeError, AssertionError, AttributeError, KeyError])
@pytest.mark.parametrize(
    ("backend", "packages", "capability", "module"),
    [
        ("flash_attn_2", "flash-attn==2.8.3", (8, 0), "flash_attn"),
        ("flash_attn_3", "flash-attn-3==3.0.0", (9, 0), "flash_attn_interface"),
        ("flash_attn_4", "flash-attn-4==4.0.0b36", (9, 0), "flash_attn.cute"),
        ("flashinfer_attn", "flashinfer-python==0.7.2", (9, 0), "flashinfer"),
        ("sage_attn", SAGE_1, (8, 9), "sageattention"),
        ("sage_attn", SAGE_2, (8, 9), "sageattention"),
        ("sage_fp16_triton", SAGE_2, (8, 9), "sageattention"),
        ("sage_fp8_cuda", SAGE_2, (8, 9), "sageattention"),
        ("comfy_kitchen_int8", "comfy-kitchen==0.2.31", (8, 9), "comfy_kitchen"),
        ("trtllm_attn", "flashinfer-python==0.7.2 flashinfer-cubin==0.6.13", (10, 0), "flashinfer.prefill"),
        ("sage_attn_3", SAGE_3, (12, 0), "sageattn3"),
    ],
)
def test_whatever_a_broken_package_raises_is_a_reason(monkeypatch, backend, packages, capability, module, raised):
    class Broken(ModuleType):
        def __getattr__(self, name):
            raise raised("undefined symbol: _ZN3c104cuda9SetDeviceEi")

    router = machine(monkeypatch, packages, capability)
    monkeypatch.setitem(sys.modules, module, Broken(module))
    (reason,) = router.unavailable(backend)
    assert reason.startswith("could not be loaded: ")
    assert router.reasons_against(backend, PLAIN) == (reason,)
