"""`torch_sdpa`: PyTorch's attention with the dispatch that ComfyUI's own PyTorch attention uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..values.aliases import (
    COMFYUI,
    DIFFUSERS,
    FASTVIDEO,
    SGLANG,
    VLLM_OMNI,
    WAN_WRAPPER,
    XFUSER,
    YUNCHANG,
    Alias,
)
from ..values.limits import Batch, Causal, Dtypes, ValueHeadDim
from ..values.platform import KINDS, Platform
from ..values.request import AttentionCall, AttentionRequest
from .backend import FLOATING, Backend, Kernel, Limits, LseKernel
from .support.lse import checked
from .support.sdpa import CHECKS, WITH_LSE, expanded, facts_for_torch, implementation, plain_sdpa, without_gaps
from .support.textbook import in_full_precision
from .support.workspace import expanded_bytes

if TYPE_CHECKING:
    import torch

SMALL_QUERY = 128 * 1024
"""Query elements below which torch's own order is kept, as ComfyUI does: cuDNN is slower on small inputs."""

MAX_BATCH = 2**15
"""Larger batches fail in torch's CUDA kernels, so they are split, as in ComfyUI."""


CPU_FUSED = Limits(Dtypes(FLOATING))
"""What torch's fused kernel on the CPU takes, which is asked for the log-sum-exp."""


class TorchSDPA(Backend):
    """Priority on CUDA above `SMALL_QUERY`: flash, cuDNN, efficient, math; elsewhere torch decides."""

    id = "torch_sdpa"
    summary = "PyTorch's own attention, dispatched as ComfyUI does it. Runs everywhere; the reference to compare with."
    aliases = (
        Alias(VLLM_OMNI, "TORCH_SDPA"),
        Alias(VLLM_OMNI, "SDPA"),
        Alias(SGLANG, "torch_sdpa"),
        Alias(DIFFUSERS, "native"),
        Alias(COMFYUI, "pytorch"),
        Alias(COMFYUI, "pytorch attention"),
        Alias(WAN_WRAPPER, "sdpa"),
        Alias(YUNCHANG, "TORCH", "of older versions, which took PyTorch's efficient kernel; here PyTorch picks"),
        Alias(XFUSER, "SDPA"),
        Alias(FASTVIDEO, "TORCH_SDPA"),
    )
    kinds = KINDS
    limits = Limits(Dtypes(FLOATING), Causal("any"), ValueHeadDim(may_differ=True))
    lse = True

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """0 where torch has a fused kernel for grouped heads with a mask, which is on CUDA only."""
        return expanded_bytes(request) if request.mask != "none" and platform.kind != "cuda" else 0

    def load(self, platform: Platform) -> Kernel:
        if platform.kind == "cuda":
            return _cuda_kernel(platform)
        if platform.kind == "rocm":
            return _in_order(platform)
        return _portable()

    def lse_limits(self, platform: Platform) -> Limits:
        return self.limits.but(Batch(MAX_BATCH)) if platform.kind == "cuda" else self.limits

    def load_lse(self, platform: Platform) -> LseKernel:
        return checked(with_lse(platform))


def with_lse(platform: Platform) -> LseKernel:
    """torch's fused kernels that give an LSE, where they take the call; else the whole matrix of scores.

    scaled_dot_product_attention itself gives none, on any device.
    """
    import torch

    fused: list[tuple[Callable[[AttentionCall], bool], Kernel]] = []
    if platform.kind == "cpu":
        kernel = implementation("FLASH_ATTENTION", platform, WITH_LSE)
        fused = [(lambda call: not CPU_FUSED.reasons(call.request()), kernel)]
    elif platform.kind == "cuda":
        for pin in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
            can_use = getattr(torch.backends.cuda, f"can_use_{CHECKS[pin]}_attention")
            kernel = implementation(pin, platform, WITH_LSE)
            fused.append((lambda call, can_use=can_use: can_use(facts_for_torch(call)), kernel))  # type: ignore[misc]

    def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        for takes, kernel in fused:
            if takes(call := without_gaps(call)):
                return kernel(call)  # type: ignore[return-value]  # WITH_LSE
            if call.enable_gqa and platform.kind == "cuda":  # the efficient kernel has no grouped form
                call = expanded(call)
        return in_full_precision(call)

    return run


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


def _cuda_kernel(platform: Platform) -> Kernel:
    run = _in_order(platform)

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
                run(call.changed(query=call.query[rows], key=call.key[rows], value=call.value[rows], attn_mask=mask))
            )
        return torch.cat(parts)

    return in_batches


def _in_order(platform: Platform) -> Kernel:
    """The first of flash, cuDNN, efficient and math that takes a call, by torch's own checks, as
    sdpa_kernel(order, set_priority=True) would choose.

    That context is not used: it sets switches and order of the whole process during the call, which other threads see.
    """
    import inspect

    from torch.backends import cuda
    from torch.nn.attention import sdpa_kernel

    if "set_priority" not in inspect.signature(sdpa_kernel).parameters:
        return _portable()  # torch before 2.6 has no order, so ComfyUI sets none there

    fused = [
        (getattr(cuda, f"can_use_{check}_attention"), implementation(pin, platform)) for pin, check in CHECKS.items()
    ]
    math, sdpa = implementation("MATH", platform), plain_sdpa()

    def run(call: AttentionCall) -> torch.Tensor:
        if call.query.numel() < SMALL_QUERY:
            return sdpa(call)
        masked_gqa = call.enable_gqa and call.attn_mask is not None
        if masked_gqa and platform.kind == "rocm":
            call = expanded(call)
        facts = facts_for_torch(call)
        for can_use, kernel in fused:
            if can_use(facts):
                return kernel(call)
        # No fused kernel takes grouped heads with this mask: one may once they are repeated.
        return run(expanded(call)) if masked_gqa and call.enable_gqa else math(call)

    return run


BACKENDS = (TorchSDPA(),)
