"""`torch_sdpa`: PyTorch's attention with the dispatch that ComfyUI's own PyTorch attention uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..backend import FLOATING, Backend, Kernel, Limits
from ..kernel_support.sdpa import expanded, plain_sdpa
from ..memory import expanded_bytes
from ..platform import KINDS, Platform
from ..request import AttentionCall, AttentionRequest

if TYPE_CHECKING:
    import torch

SMALL_QUERY = 128 * 1024
"""Query elements below which torch's own order is kept, as ComfyUI does: cuDNN is slower on small inputs."""

MAX_BATCH = 2**15
"""Larger batches fail in torch's CUDA kernels, so they are split, as in ComfyUI."""


class TorchSDPA(Backend):
    """Priority on CUDA above `SMALL_QUERY`: flash, cuDNN, efficient, math; elsewhere torch decides."""

    id = "torch_sdpa"
    summary = "PyTorch's own attention, dispatched as ComfyUI does it. Runs everywhere; the reference to compare with."
    kinds = KINDS
    limits = Limits(dtypes=FLOATING, causal_cross=True, mixed_head_dims=True)

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Nothing of its own where torch has a fused kernel for grouped heads with a mask, which is on CUDA only."""
        return expanded_bytes(request) if request.mask != "none" and platform.kind != "cuda" else 0

    def load(self, platform: Platform) -> Kernel:
        if platform.kind == "cuda":
            return _cuda_kernel()
        if platform.kind == "rocm":
            return _prioritised(split=False, native_masked_gqa=False)
        return _portable()


def _portable() -> Kernel:
    from torch.nn.functional import scaled_dot_product_attention

    sdpa = plain_sdpa()

    def run(call: AttentionCall) -> torch.Tensor:
        if call.enable_gqa:
            # Grouped heads with a mask have no fused kernel outside CUDA; torch would materialise the scores.
            return sdpa(expanded(call) if call.attn_mask is not None else call)
        if call.attn_mask is None and call.scale is None and not call.is_causal:  # each argument takes torch 0.1 us
            return scaled_dot_product_attention(call.query, call.key, call.value)
        return scaled_dot_product_attention(
            call.query, call.key, call.value, attn_mask=call.attn_mask, is_causal=call.is_causal, scale=call.scale
        )

    return run


def _cuda_kernel() -> Kernel:
    run = _prioritised(split=True, native_masked_gqa=True)

    def in_batches(call: AttentionCall) -> torch.Tensor:
        if call.query.shape[0] <= MAX_BATCH:
            return run(call)
        import torch

        parts = []
        for start in range(0, call.query.shape[0], MAX_BATCH):
            rows = slice(start, start + MAX_BATCH)
            mask = call.attn_mask
            if mask is not None and mask.shape[0] > 1:
                mask = mask[rows]
            parts.append(
                run(
                    AttentionCall(
                        call.query[rows],
                        call.key[rows],
                        call.value[rows],
                        mask,
                        is_causal=call.is_causal,
                        scale=call.scale,
                        enable_gqa=call.enable_gqa,
                    )
                )
            )
        return torch.cat(parts)

    return in_batches


def _prioritised(*, split: bool, native_masked_gqa: bool) -> Kernel:
    import inspect

    from torch.nn.attention import SDPBackend, sdpa_kernel

    if "set_priority" not in inspect.signature(sdpa_kernel).parameters:
        return _portable()  # torch before 2.6 has no order to set
    order = [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]

    sdpa = plain_sdpa()

    def run(call: AttentionCall) -> torch.Tensor:
        if call.query.numel() < SMALL_QUERY:
            return sdpa(call)
        masked_gqa = call.enable_gqa and call.attn_mask is not None
        if masked_gqa and not native_masked_gqa:
            call = expanded(call)
        with sdpa_kernel(order, set_priority=True):
            if masked_gqa and native_masked_gqa and not _fused_gqa(call):
                call = expanded(call)
            return sdpa(call)

    return run


def _fused_gqa(call: AttentionCall) -> bool:
    """True when one of torch's fused CUDA kernels takes this grouped call as it is, inside the current order."""
    from torch.backends import cuda

    params = cuda.SDPAParams(call.query, call.key, call.value, call.attn_mask, 0.0, call.is_causal, True)
    return (
        cuda.can_use_flash_attention(params)
        or cuda.can_use_cudnn_attention(params)
        or cuda.can_use_efficient_attention(params)
    )
