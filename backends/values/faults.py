"""Classifies errors of kernels: out of memory, device faults, wrong outputs."""

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
"""Texts of errors after which a GPU's context is unusable in this process."""

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""Texts of out-of-memory errors of other types than torch.OutOfMemoryError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the computer is out of memory, by type or text of the error."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        phrase in str(error).lower() for phrase in OUT_OF_MEMORY
    )


def is_cuda_fault(error: BaseException) -> bool:
    """Whether the GPU's context is unusable after this error."""
    return any(phrase in str(error).lower() for phrase in CUDA_FAULTS)


class KernelFaultError(RuntimeError):
    """A kernel left the device unusable."""


class KernelOutputError(RuntimeError):
    """The output of a kernel has a wrong type, shape, dtype or device; another kernel may run the call."""


def check_output(output: object, call: AttentionCall) -> None:
    """`check_output_is` for `call`, which must still have its tensors."""
    query = call.query
    check_output_is(output, (*query.shape[:3], call.value.shape[3]), query.dtype, query.get_device())


def check_output_is(output: object, shape: tuple[int, ...], dtype: torch.dtype, index: int) -> None:
    """Check type, shape, dtype and device of an output, without synchronisation.

    `index`: of the device, -1 for the CPU. Under autocast its dtype is accepted too, as PyTorch's attention returns it.

    Raises:
        KernelOutputError: has the actual and the expected.
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
    except (RuntimeError, TypeError):  # a device without autocast; torch before 2.4 takes no device
        return False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
