"""torch's scaled_dot_product_attention as a kernel: free to dispatch, or pinned to one of its implementations."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..backend import Backend, Kernel
from ..platform import Platform
from ..request import AttentionCall

if TYPE_CHECKING:
    import torch


def expand_kv(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value with each key head repeated for the query heads that share it."""
    repeats = call.query.shape[1] // call.key.shape[1]
    if repeats == 1:
        return call.key, call.value
    return call.key.repeat_interleave(repeats, dim=1), call.value.repeat_interleave(repeats, dim=1)


def plain_sdpa() -> Kernel:
    """A kernel that is one call of scaled_dot_product_attention, every argument passed on."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def run(call: AttentionCall) -> torch.Tensor:
        return sdpa(
            call.query,
            call.key,
            call.value,
            attn_mask=call.attn_mask,
            is_causal=call.is_causal,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
        )

    return run


def expanded(call: AttentionCall) -> AttentionCall:
    """The same call with key heads repeated, for kernels that do not group query heads."""
    key, value = expand_kv(call)
    return AttentionCall(call.query, key, value, call.attn_mask, is_causal=call.is_causal, scale=call.scale)


def without_gaps(call: AttentionCall) -> AttentionCall:
    """The same call with head_dim contiguous, which all fused kernels of torch require; usually the call itself."""
    if call.query.stride(-1) == 1 and call.key.stride(-1) == 1 and call.value.stride(-1) == 1:
        return call
    return AttentionCall(
        call.query.contiguous(),
        call.key.contiguous(),
        call.value.contiguous(),
        call.attn_mask,
        is_causal=call.is_causal,
        scale=call.scale,
        enable_gqa=call.enable_gqa,
    )


SWITCHES = {
    "CUDNN_ATTENTION": "cudnn_sdp",
    "FLASH_ATTENTION": "flash_sdp",
    "EFFICIENT_ATTENTION": "mem_efficient_sdp",
    "MATH": "math_sdp",
}
"""What torch.backends.cuda calls the members of torch.nn.attention.SDPBackend; they hold on the CPU too."""


def held(kernel: Kernel, pin: str, platform: Platform) -> Kernel:
    """A kernel that calls torch's attention, held to one of its implementations.

    By the switches that torch.nn.attention.sdpa_kernel sets, too, but 3 us a call instead of 12 (CPU, torch 2.13). They
    are the process's, as with that context; each is put back as it was.
    """
    from torch.backends import cuda
    from torch.nn.attention import SDPBackend, sdpa_kernel

    pinned = [getattr(SDPBackend, pin)]
    known = all(hasattr(cuda, f"{name}_enabled") for name in SWITCHES.values())  # cuDNN's came with torch 2.5
    if not known or platform.kind not in ("cuda", "rocm", "cpu"):  # others have an implementation without a switch

        def in_context(call: AttentionCall) -> torch.Tensor:
            with sdpa_kernel(pinned):
                return kernel(call)

        return in_context
    switches = [
        (getattr(cuda, f"{name}_enabled"), getattr(cuda, f"enable_{name}"), member == pin)
        for member, name in SWITCHES.items()
    ]

    def run(call: AttentionCall) -> torch.Tensor:
        before = [is_on() for is_on, _, _ in switches]
        try:
            for _, switch, on in switches:
                switch(on)
            return kernel(call)
        finally:
            for (_, switch, _), was in zip(switches, before, strict=True):
                switch(was)

    return run


class PinnedSDPA(Backend):
    """scaled_dot_product_attention held to one member of torch.nn.attention.SDPBackend.

    A single pin, never a priority list: with a list and a mask, torch has been seen to fall to its slowest
    implementation although the first one listed runs alone (https://github.com/pytorch/pytorch/pull/114689
    introduced the context).
    """

    pin: ClassVar[str]
    expands_gqa: ClassVar[bool] = False
    """The implementation has no grouped form: key heads are repeated before the call."""

    def load(self, platform: Platform) -> Kernel:
        expands = self.expands_gqa
        sdpa = held(plain_sdpa(), self.pin, platform)

        def run(call: AttentionCall) -> torch.Tensor:
            call = without_gaps(call)
            return sdpa(expanded(call) if expands and call.enable_gqa else call)

        return run
