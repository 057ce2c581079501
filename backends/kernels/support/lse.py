"""The log-sum-exp (LSE) of a call's rows as every kernel here gives it, in one form for all libraries.

Libraries differ: rows are padded to a multiple of 32, the LSE comes in the dtype of the query, and a row without a
visible key gets 0, +inf or nothing written. Some end the process on a length of zero. Each `load_lse` returns its
kernel through `checked`, which handles all of this; the base of the logarithm is converted in the kernel's file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ...values.faults import KernelOutputError
from ...values.masks import without_keys
from ...values.platform import Platform
from ...values.request import AttentionCall, LseCall
from ..backend import Kernel, Limits, LseKernel
from .sdpa import WITH_LSE, PinnedSDPA, computes, nothing, pinned, without_gaps

if TYPE_CHECKING:
    import torch


def checked(kernel: LseKernel) -> LseKernel:
    """`kernel`, its result as `backend.LseKernel` says; calls without a key or a query never reach it.

    `kernel` may return a longer LSE, (batch, num_heads, q_len or more), of any floating dtype, and any value
    for a row whose mask hides all keys. The LSE that comes out has no gradient.

    Raises:
        ValueError: in a call: its shapes or dtypes disagree.
        KernelOutputError: in a call: the kernel gave no LSE, or one of another shape.
    """

    def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        rows = call.query.shape[:3]
        if not computes(call):
            return nothing(call), call.query.new_full(rows, float("-inf"), dtype=torch.float32)
        output, lse = kernel(call)
        if not isinstance(lse, torch.Tensor) or lse.ndim != 3 or lse[..., : rows[2]].shape != rows:
            given = tuple(lse.shape) if isinstance(lse, torch.Tensor) else type(lse).__name__
            raise KernelOutputError(f"returned {given} as the log-sum-exp, not {tuple(rows)}")
        lse = lse.detach()[..., : rows[2]].float()
        if call.attn_mask is not None:
            lse = lse.masked_fill(without_keys(call.attn_mask).squeeze(-1), float("-inf"))
        return output, lse

    return run


def kept(kernel: LseKernel) -> Kernel:
    """A kernel for plans, which hand on outputs alone: it takes an `LseCall`, and leaves the LSE in that."""

    def run(call: AttentionCall) -> torch.Tensor:
        if not isinstance(call, LseCall):
            raise TypeError(f"the plan of an LseCall was given {type(call).__name__}")
        output, call.lse = kernel(call)
        return output

    return run


class PinnedWithLse(PinnedSDPA):
    """FLASH_ATTENTION or EFFICIENT_ATTENTION, whose operators also return the log-sum-exp."""

    lse = True

    def lse_limits(self, platform: Platform) -> Limits | None:
        """None on ROCm: whether its kernels return natural or base-2 logarithms was not checked."""
        return None if platform.kind == "rocm" else super().lse_limits(platform)

    def load_lse(self, platform: Platform) -> LseKernel:
        kernel = cast("LseKernel", pinned(self.pin, platform, WITH_LSE))
        return checked(lambda call: kernel(without_gaps(call)))
