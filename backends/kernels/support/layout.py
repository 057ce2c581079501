"""What kernels ask of their tensors: another order of dimensions, offsets that fit 32 bits, the right device.

Layouts are named by their dimensions: BHSD (batch, heads, length, head_dim) is what an AttentionCall holds; BSHD
is what FlashAttention takes, Sage calls it NHD and xformers BMHK. Views are kept wherever a kernel reads them right.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

INT32_ELEMENTS = 2**31 - 1
"""The largest offset, in elements, that a signed 32-bit index reaches."""


def to_bshd(tensor: torch.Tensor) -> torch.Tensor:
    """A BHSD tensor as BSHD, and back: a view."""
    return tensor.transpose(1, 2)


def indexable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a contiguous copy where a kernel that counts in 32 bits would read elsewhere.

    Views into a fused projection have long rows: with 3 x 56 heads of 128, row 99,864 is 2**31 elements away,
    and a kernel that wraps there reads other rows without an error
    (https://github.com/thu-ml/SageAttention/issues/386). The last dimension is made contiguous for the same price.
    """
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor if tensor.stride(-1) == 1 and reach <= INT32_ELEMENTS else tensor.contiguous()


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make the tensor's CUDA device the current one, and restore the old one after it.

    Triton launches on the current device, and some packages change it and leave it changed.
    """
    if tensor.device.type != "cuda":
        return nullcontext()
    import torch

    return torch.cuda.device(tensor.device)
