"""What kernels ask of their tensors: another order of dimensions, offsets that fit 32 bits, the right device.

Layouts are named by their dimensions: BHSD (batch, heads, length, head_dim) is what an AttentionCall holds; BSHD
is what FlashAttention takes, Sage calls it NHD and xformers BMHK. Views are passed where a kernel reads them correctly.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...values.limits import Rule
from ...values.reasons import Reason, template
from ...values.request import AttentionRequest

if TYPE_CHECKING:
    import torch

INT32_ELEMENTS = 2**31 - 1
"""The largest offset, in elements, that a signed 32-bit index reaches."""

GRID = 65535
"""The most blocks in the second and third dimension of a CUDA grid."""


ELEMENTS = template("elements", "{elements} elements in one tensor > {max}")


@dataclass(frozen=True)
class Elements(Rule):
    """The most elements of query, key or value, for a kernel that counts in 32 bits; heads are padded to `padded`."""

    max: int = INT32_ELEMENTS
    padded: tuple[int, ...] = ()

    order = 60

    def reason(self, request: AttentionRequest) -> Reason | None:
        elements = self.of(request)
        return None if elements <= self.max else Reason(ELEMENTS, elements=elements, max=self.max)

    def of(self, request: AttentionRequest) -> int:
        """Elements of the largest of query, key and value, as the kernel sees them."""
        largest = max(request.head_dim, request.v_head_dim)
        head_dim = next((size for size in sorted(self.padded) if size >= largest), largest)
        rows = max(request.num_heads * request.q_len, (request.num_kv_heads or request.num_heads) * request.kv_len)
        return request.batch * rows * head_dim

    def describe(self) -> str:
        return f"{power(self.max)} elements per tensor"


def power(number: int) -> str:
    """A number in words, with 2^31 - 1 as such."""
    return "2^31 - 1" if number == INT32_ELEMENTS else str(number)


def to_bshd(tensor: torch.Tensor) -> torch.Tensor:
    """A BHSD tensor as BSHD, and back: a view."""
    return tensor.transpose(1, 2)


def indexable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a contiguous copy where 32-bit offsets would overflow.

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
