"""What FlashInfer's kernels for batches take: packed tokens (THD), the offset of each sample, a workspace.

THD names the layout: (tokens of all samples, heads, head_dim). A BHSD tensor whose memory is BSHD, as models make it,
becomes THD without a copy.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from .layout import indexable

if TYPE_CHECKING:
    import torch

WORKSPACE_BYTES = 128 * 1024 * 1024
"""What FlashInfer's documentation recommends, and the size that its tests use."""


def to_thd(tensor: torch.Tensor) -> torch.Tensor:
    """A BHSD tensor as THD, addressable with 32-bit offsets."""
    batch, heads, length, head_dim = tensor.shape
    return indexable(tensor.transpose(1, 2).reshape(batch * length, heads, head_dim))


def to_bhsd(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """A THD tensor of samples of equal length as BHSD: a view."""
    return tensor.reshape(batch, -1, *tensor.shape[1:]).transpose(1, 2)


@lru_cache(maxsize=64)
def offsets(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Where each of `batch` samples of this length begins, and where the last one ends: (batch + 1,), int32."""
    import torch

    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def offsets_of(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The same for samples of these lengths; made once, as it takes a copy to the device."""
    import torch

    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def lengths(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """The length of each sample: (batch,), int32."""
    import torch

    return torch.full((batch,), length, dtype=torch.int32, device=device)


@lru_cache(maxsize=16)
def workspace(owner: str, device: torch.device, stream: int) -> torch.Tensor:
    """A backend's scratch memory for its calls on one stream of a device, which run one by one; zero at first."""
    import torch

    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def stream_of(tensor: torch.Tensor) -> int:
    """The CUDA stream on which a kernel for this tensor is launched; 0 on a device without streams."""
    if tensor.device.type != "cuda":
        return 0
    import torch

    stream: int = torch.cuda.current_stream(tensor.device).cuda_stream
    return stream
