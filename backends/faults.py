"""Errors of kernels: which of them leave nothing to retry, in the call or in the whole process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .call_checks import CheckError
from .names import COMFY

if TYPE_CHECKING:
    from .plan import Plan

CUDA_FAULTS = (
    "illegal memory access",
    "illegal instruction",
    "illegal address",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "hardware stack error",
)
"""Words of errors after which a GPU's context is unusable: nothing can be retried in this process."""

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""Words of out-of-memory errors that reach Python as another type than torch.OutOfMemoryError."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for an error that says so by its type or in words."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)


def is_cuda_fault(error: BaseException) -> bool:
    """True for an error after which the GPU's context is unusable."""
    return any(words in str(error).lower() for words in CUDA_FAULTS)


class KernelFaultError(RuntimeError):
    """A kernel left the device in a state in which nothing further can run."""


def stop_if_hopeless(plan: Plan, error: Exception) -> None:
    """Raise where no other kernel may be tried after `error`."""
    failed = plan.decision.backend
    if failed == COMFY or isinstance(error, CheckError) or is_out_of_memory(error):
        raise error
    if is_cuda_fault(error):
        raise KernelFaultError(
            f"the attention kernel {failed} left the GPU unusable: {error}\n"
            f"  call: {plan.request.describe()}\n"
            "  what to do: restart ComfyUI and choose another backend for this role"
        ) from error
