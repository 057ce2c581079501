"""FlashInfer: one sample or a batch, plans and packed masks that are made once and never serve another call.

The package is a fake with the traps of the real one: a wrapper keeps the mask of an earlier plan, and takes offsets
into packed bits for offsets into bytes; TensorRT-LLM's kernel reads a query as if it had no gaps.
"""

from __future__ import annotations

import pytest
from attention_backends.backends.engine.mask_reader import inspect
from attention_backends.backends.values.request import AttentionCall, AttentionRequest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.kernels.support import ragged  # noqa: E402
from attention_calls import as_comfyui_runs, call_for  # noqa: E402
from fakes import arithmetic, flashinfer, machine  # noqa: E402
from tolerance import allowed, error, truth  # noqa: E402

ONE = AttentionRequest(1, 4, 70, 96, 64, "bfloat16")
BATCH = ONE._replace(batch=3)
PACKAGES = "flashinfer-python==0.7.2 flashinfer-cubin==0.6.13"


@pytest.fixture
def router(monkeypatch):
    return machine(monkeypatch, PACKAGES, (9, 0))


def right(output: torch.Tensor, call: AttentionCall) -> bool:
    return error(output, truth(call)).within(allowed(call, "exact"))


def check(kernel, call: AttentionCall) -> list[str]:
    """Run a call, check its output, and return the library functions that were called for it."""
    arithmetic.CALLS.clear()
    with as_comfyui_runs():
        assert right(kernel(call), call)
    return list(arithmetic.CALLS)


SINGLE, WRAPPER = "single_prefill_with_kv_cache", "BatchPrefillWithRaggedKVCacheWrapper"


class TestBatches:
    def test_one_sample_takes_the_call_for_one_sample(self, router):
        assert check(router.kernel("flashinfer_attn"), call_for(ONE)) == [SINGLE]

    def test_a_batch_takes_one_call_and_its_plan_is_kept(self, router):
        kernel = router.kernel("flashinfer_attn")
        assert check(kernel, call_for(BATCH)) == [WRAPPER, "plan", "run"]
        assert check(kernel, call_for(BATCH, seed=1)) == ["run"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"batch": 2},
            {"q_len": 71},
            {"kv_len": 97},
            {"head_dim": 128},
            {"dtype": "float16"},
            {"num_kv_heads": 2},
            {"num_heads": 2},
            {"scale": 0.3},
            {"q_len": 96, "is_causal": True},
        ],
        ids=str,
    )
    def test_a_plan_serves_no_other_kind_of_call(self, router, changes):
        kernel = router.kernel("flashinfer_attn")
        check(kernel, call_for(BATCH))
        check(kernel, call_for(BATCH._replace(q_len=96)))
        assert check(kernel, call_for(BATCH._replace(**changes))) == [WRAPPER, "plan", "run"]
        assert check(kernel, call_for(BATCH)) == ["run"]

    def test_plans_are_bounded(self, router):
        kernel = router.kernel("flashinfer_attn")
        for length in range(20, 30):
            check(kernel, call_for(BATCH._replace(q_len=length)))
        assert check(kernel, call_for(BATCH._replace(q_len=29))) == ["run"]
        assert check(kernel, call_for(BATCH._replace(q_len=20))) == [WRAPPER, "plan", "run"]

    def test_the_workspace_is_allocated_once(self, router, monkeypatch):
        ragged.workspace.cache_clear()
        kernel, sizes, zeros = router.kernel("flashinfer_attn"), [], torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, **how: (sizes.append(size), zeros(*size, **how))[1])
        for length in (20, 21):
            kernel(call_for(BATCH._replace(q_len=length)))
        assert [size for size in sizes if size == (128 * 1024 * 1024,)] == [(128 * 1024 * 1024,)]

    def test_tensors_as_models_make_them_are_not_copied(self):
        rows = torch.randn(2, 7, 3, 16)
        assert ragged.to_thd(rows.transpose(1, 2)).data_ptr() == rows.data_ptr()
        assert torch.equal(ragged.to_bhsd(ragged.to_thd(rows.transpose(1, 2)), 2), rows.transpose(1, 2))

    def test_a_masked_call_after_a_planned_one_and_back(self, router):
        kernel = router.kernel("flashinfer_attn")
        check(kernel, call_for(BATCH))
        assert WRAPPER not in check(kernel, call_for(BATCH._replace(mask="bool")))
        assert check(kernel, call_for(BATCH)) == ["run"]


class TestTheTrapsAreThere:
    """Why masked batches don't go through the wrapper."""

    def _planned(self, call: AttentionCall, **mask: torch.Tensor) -> flashinfer.BatchPrefillWithRaggedKVCacheWrapper:
        batch, heads, q_len, head_dim = call.query.shape
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.zeros(128 * 1024 * 1024, dtype=torch.uint8))
        device = torch.device("cpu")
        lengths = (ragged.offsets(batch, q_len, device), ragged.offsets(batch, call.key.shape[2], device))
        wrapper.plan(*lengths, heads, heads, head_dim, q_data_type=call.query.dtype, **mask)
        return wrapper

    def _run(self, wrapper, call: AttentionCall) -> torch.Tensor:
        output = wrapper.run(*(ragged.to_thd(tensor) for tensor in (call.query, call.key, call.value)))
        return ragged.to_bhsd(output, call.query.shape[0])

    @pytest.fixture
    def masked(self) -> AttentionCall:
        return call_for(BATCH._replace(q_len=33, kv_len=77, mask="bool"))

    def test_bits_are_found_in_the_wrong_place(self, masked):
        flat = masked.attn_mask.flatten()
        assert right(self._run(self._planned(masked, custom_mask=flat), masked), masked)
        packed = torch.cat([flashinfer.packbits(sample.flatten(), "little") for sample in masked.attn_mask])
        padding = torch.zeros(flat.numel() - len(packed), dtype=torch.uint8)
        wrapper = self._planned(masked, packed_custom_mask=torch.cat([packed, padding]))
        assert not right(self._run(wrapper, masked), masked)

    def test_a_mask_stays_in_the_wrapper(self, masked):
        wrapper = self._planned(masked, custom_mask=masked.attn_mask.flatten())
        plain = call_for(BATCH._replace(q_len=33, kv_len=77))
        lengths = (ragged.offsets(3, 33, torch.device("cpu")), ragged.offsets(3, 77, torch.device("cpu")))
        wrapper.plan(*lengths, 4, 4, 64, q_data_type=plain.query.dtype)
        assert not right(self._run(wrapper, plain), plain)


def packings(calls: list[str]) -> int:
    return calls.count("packbits")


class TestPackedMasks:
    @pytest.mark.parametrize(
        ("shape", "distinct"),
        [
            ((1, 1, 70, 96), 1),
            ((1, 1, 1, 96), 1),
            ((3, 1, 70, 96), 3),
            ((1, 4, 70, 96), 4),
            ((3, 4, 70, 96), 12),
            ((3, 1, 1, 96), 3),
        ],
        ids=str,
    )
    def test_each_distinct_mask_of_a_call_is_packed_once(self, router, shape, distinct):
        call = call_for(BATCH)
        call.attn_mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
        assert packings(check(router.kernel("flashinfer_attn"), call)) == distinct
        call.attn_mask = call.attn_mask.expand(3, 4, 70, 96)  # memory that repeats is no other mask
        assert packings(check(router.kernel("flashinfer_attn"), call)) == distinct

    def test_the_same_mask_is_packed_once_where_somebody_vouches_for_it(self, router):
        """A memo says that the mask stays what it is; without one it is packed at each call."""
        kernel, call = router.kernel("flashinfer_attn"), call_for(BATCH._replace(mask="bool"))
        assert packings(check(kernel, call)) == 3
        assert packings(check(kernel, call)) == 3
        call.memo = {}
        assert packings(check(kernel, call)) == 3
        assert packings(check(kernel, call)) == 0

    def test_a_mask_over_other_lengths_is_packed_again(self, router):
        kernel, mask, memo = router.kernel("flashinfer_attn"), torch.ones(1, 1, 1, 1, dtype=torch.bool), {}
        for q_len in (70, 71):
            call = call_for(ONE._replace(q_len=q_len))
            call.attn_mask, call.memo = mask, memo
            assert packings(check(kernel, call)) == 1

    def test_the_plan_of_a_mask_gives_its_calls_one_memo(self, router):
        mask = torch.rand(1, 1, 70, 96, generator=torch.Generator().manual_seed(0)) > 0.4
        plan, made = inspect(mask, 96), []
        for _ in range(3):
            (part,) = plan.calls(call_for(ONE))
            made.append(packings(check(router.kernel("flashinfer_attn"), part)))
        assert made == [1, 0, 0]

    def test_bytes_that_stand_for_a_mask(self, router):
        call = call_for(ONE)
        call.attn_mask = (torch.rand(1, 1, 70, 96, generator=torch.Generator().manual_seed(1)) > 0.4).byte() * 4
        with as_comfyui_runs():
            output = router.kernel("flashinfer_attn")(call)
        call.attn_mask = call.attn_mask.bool()
        assert right(output, call)


class TestTRTLLM:
    REQUEST = AttentionRequest(2, 4, 70, 96, 128, "bfloat16")

    @pytest.fixture
    def router(self, monkeypatch):
        return machine(monkeypatch, PACKAGES, (10, 0))

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"batch": 1},
            {"dtype": "float16", "num_kv_heads": 2},
            {"scale": 0.3},
            {"q_len": 96, "is_causal": True},
            {"batch": 5, "q_len": 1, "kv_len": 1},
        ],
        ids=str,
    )
    def test_calls_are_right_and_nothing_is_read_back(self, router, changes):
        call = call_for(self.REQUEST._replace(**changes))
        assert check(router.kernel("trtllm_attn"), call) == ["trtllm_ragged_attention_deepseek"]

    def test_a_query_with_gaps_is_copied(self, router):
        fused = torch.randn(2, 96, 3, 4, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
        call = AttentionCall(*(fused[:, :, index].transpose(1, 2) for index in range(3)))
        device = torch.device("cpu")
        as_it_is = flashinfer.trtllm_ragged_attention_deepseek(
            *(ragged.to_thd(tensor) for tensor in (call.query, call.key, call.value)),
            torch.zeros(16, dtype=torch.uint8),
            ragged.lengths(2, 96, device),
            *(96, 96, 128**-0.5, 1.0, 1.0, 2, -1),
            ragged.offsets(2, 96, device),
            ragged.offsets(2, 96, device),
            *(False, False, False),
        )
        assert not right(ragged.to_bhsd(as_it_is, 2), call)
        check(router.kernel("trtllm_attn"), call)

    def test_an_older_version_takes_no_lengths_on_the_host(self, router, monkeypatch):
        new = flashinfer.trtllm_ragged_attention_deepseek

        def older(query, key, value, workspace_buffer, seq_lens, max_q_len, max_kv_len, bmm1_scale, bmm2_scale,
                  o_sf_scale, batch_size, window_left, cum_seq_lens_q, cum_seq_lens_kv, enable_pdl, is_causal,
                  return_lse, attention_sinks=None, out=None, lse=None):  # fmt: skip
            return new(query, key, value, workspace_buffer, seq_lens, max_q_len, max_kv_len, bmm1_scale, bmm2_scale,
                       o_sf_scale, batch_size, window_left, cum_seq_lens_q, cum_seq_lens_kv, enable_pdl, is_causal,
                       return_lse)  # fmt: skip

        monkeypatch.setattr(flashinfer, "trtllm_ragged_attention_deepseek", older)
        assert "read back" in check(router.kernel("trtllm_attn"), call_for(self.REQUEST))

    def test_no_route_takes_it_by_itself(self, router):
        assert "trtllm_attn" not in (*router.priority.order, *router.priority.lossy)
