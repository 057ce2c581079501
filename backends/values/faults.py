"""Errors of kernels: which of them allow no retry, in the call or in the whole process."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .request import AttentionCall

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
    """True for an error that says so by its type or in words, of the device or of the computer."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error).lower() for words in OUT_OF_MEMORY
    )


def is_cuda_fault(error: BaseException) -> bool:
    """True for an error after which the GPU's context is unusable."""
    return any(words in str(error).lower() for words in CUDA_FAULTS)


class KernelFaultError(RuntimeError):
    """A kernel left the device in a state in which nothing further can run."""


class KernelOutputError(RuntimeError):
    """A kernel returned something else than the output of its call: that kernel failed, and another one may run."""


def check_output(output: object, call: AttentionCall) -> None:
    """`check_output_is` with what `call` must give; the call must still hold its tensors."""
    query = call.query
    check_output_is(output, (*query.shape[:3], call.value.shape[3]), query.dtype, query.get_device())


def check_output_is(output: object, shape: tuple[int, ...], dtype: torch.dtype, index: int) -> None:
    """Refuse what is no tensor of this shape, dtype and device. Reads no values, so it costs no synchronisation.

    `index` is that of the device, -1 for the CPU. Under autocast its dtype is right too, as PyTorch's own attention
    returns it there.

    Raises:
        KernelOutputError: with what was returned and what was expected.
    """
    import torch

    expected = f"{tuple(shape)} {_name(dtype)} on {'cpu' if index < 0 else f'device {index}'}"
    if not isinstance(output, torch.Tensor):
        raise KernelOutputError(f"returned {type(output).__name__}, not a tensor {expected}")
    kind = output.device.type
    dtypes = {dtype, torch.get_autocast_dtype(kind)} if _autocasts(kind) else {dtype}
    elsewhere = kind != "cpu" if index < 0 else output.get_device() != index
    if output.shape != shape or output.dtype not in dtypes or elsewhere:
        raise KernelOutputError(
            f"returned {tuple(output.shape)} {_name(output.dtype)} on {output.device}, not {expected}"
        )


def _autocasts(kind: str) -> bool:
    import torch

    try:
        return torch.is_autocast_enabled(kind)
    except (RuntimeError, TypeError):  # a device without autocast; torch before 2.4 asks without a device
        return False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
