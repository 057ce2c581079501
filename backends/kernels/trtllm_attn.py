"""`trtllm_attn`: TensorRT-LLM's attention kernel for Blackwell data centre cards, through FlashInfer."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING

from ..values.aliases import VLLM_OMNI, Alias
from ..values.limits import NO_MASK, Batch, HeadDimIn, Heads
from ..values.package import Symbols
from ..values.platform import Platform
from ..values.reasons import Reason, template
from ..values.request import AttentionCall, AttentionRequest
from .backend import Backend, Kernel, Limits
from .support.flashinfer import FLASHINFER
from .support.layout import GRID, Elements, on_device_of
from .support.ragged import WORKSPACE_BYTES, lengths, offsets, stream_of, to_bhsd, to_thd, workspace
from .support.workspace import item_bytes, query_size

if TYPE_CHECKING:
    import torch

NO_CUBINS = template("package.cubins", "{reason}, and downloads are off (ATTENTION_BACKENDS_HUB=1 allows them)")


class TRTLLMAttn(Backend):
    """trtllm_ragged_attention_deepseek (flashinfer/prefill.py, csrc/trtllm_fmha_kernel_launcher.cu).

    It gets the strides of key and value but not of the query, which is therefore made contiguous. `causal`
    is taken for equal lengths only. Its kernels are prebuilt files, which FlashInfer fetches at the first call where
    the package flashinfer-cubin has not brought them: that needs the person's permission, and `auto` never takes it.
    """

    id = "trtllm_attn"
    summary = "TensorRT-LLM's kernel for B200 and B300, through FlashInfer, which fetches it once. Exact; no masks."
    aliases = (Alias(VLLM_OMNI, "TRTLLM_ATTN", "only where it is named; auto does not take it, as vLLM may on sm_10x"),)
    kinds = ("cuda",)
    requires = ("flashinfer-python>=0.6",)
    packages = (FLASHINFER,)
    asks_for = ("flashinfer-cubin",)
    symbols = (Symbols("flashinfer.prefill", ("trtllm_ragged_attention_deepseek",)),)
    tested_on = (
        "cuda:10.0,packages=flashinfer-python==0.7.2.post1;flashinfer-cubin==0.6.13",
        "cuda:10.3,packages=flashinfer-python==0.6.0;flashinfer-cubin==0.6.0",
    )
    remarks = ("needs flashinfer-cubin, or downloads allowed by ATTENTION_BACKENDS_HUB=1",)
    limits = Limits(HeadDimIn((128,)), NO_MASK, Elements(), Batch(GRID), Heads(GRID))

    def capabilities(self, platform: Platform) -> tuple[tuple[int, int], ...]:
        return ((10, 0), (10, 3))

    def unavailable_reasons(self, platform: Platform) -> list[Reason]:
        reasons = super().unavailable_reasons(platform)
        if platform.kind in self.kinds and platform.version("flashinfer-cubin") is None and not platform.hub:
            reasons.append(Reason(NO_CUBINS, reason=Reason("package.missing", package="flashinfer-cubin")))
        return reasons

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """The package's workspace, and the query where its memory is not in the kernel's order."""
        return WORKSPACE_BYTES + query_size(request) * item_bytes(request)

    def load(self, platform: Platform) -> Kernel:
        import torch
        from flashinfer.prefill import trtllm_ragged_attention_deepseek as attend

        # Newer versions read the lengths back from the device at each call unless they get them on the host as well.
        takes_lengths = "q_seq_lens_cpu" in signature(attend).parameters
        host = torch.device("cpu")

        def run(call: AttentionCall) -> torch.Tensor:
            batch, _, q_len, head_dim = call.query.shape
            kv_len, device = call.key.shape[2], call.query.device
            options: dict[str, object] = {}
            if takes_lengths:
                options["q_seq_lens_cpu"] = lengths(batch, q_len, host)
                options["kv_seq_lens_cpu"] = lengths(batch, kv_len, host)
            with on_device_of(call.query):
                output: torch.Tensor = attend(
                    query=to_thd(call.query).contiguous(),
                    key=to_thd(call.key),
                    value=to_thd(call.value),
                    workspace_buffer=workspace(self.id, device, stream_of(call.query)),
                    seq_lens=lengths(batch, kv_len, device),
                    max_q_len=q_len,
                    max_kv_len=kv_len,
                    bmm1_scale=float(head_dim**-0.5) if call.scale is None else call.scale,
                    bmm2_scale=1.0,
                    o_sf_scale=1.0,
                    batch_size=batch,
                    window_left=-1,
                    cum_seq_lens_q=offsets(batch, q_len, device),
                    cum_seq_lens_kv=offsets(batch, kv_len, device),
                    enable_pdl=False,
                    is_causal=call.is_causal,
                    return_lse=False,
                    **options,
                )
            return to_bhsd(output, batch)

        return run


BACKENDS = (TRTLLMAttn(),)
