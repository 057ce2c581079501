"""Rules by which methods choose key blocks from scores; ties go to the block that comes first."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def count_of_share(share: float, blocks: int) -> int:
    """ceil(share * blocks), at least 1 and at most all; a product that is whole but for rounding is not rounded up."""
    return min(max(ceil(share * blocks - 1e-9), 1), blocks)


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` highest scores of each row, as bool of the shape of `scores`, (..., blocks)."""
    import torch

    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def until_share(scores: torch.Tensor, share: float, *, least: int = 1) -> torch.Tensor:
    """The highest blocks of each row until their softmax weights sum to `share`; the one that reaches it is kept.

    Args:
        scores: (..., blocks), float32; -inf: never chosen.
        least: blocks kept at least.
    """
    import torch

    weights, order = torch.sort(torch.softmax(scores, -1), dim=-1, descending=True, stable=True)
    before = weights.cumsum(-1) - weights
    keep = before < share
    keep[..., :least] = True
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def passed_share(scores: torch.Tensor, share: float, *, least: int = 1) -> torch.Tensor:
    """The highest blocks of each row, as long as the softmax weights before one sum to at most `share`.

    Unlike `until_share` it keeps one more where the sum is `share` itself.
    """
    import torch

    weights, order = torch.sort(torch.softmax(scores, -1), dim=-1, descending=True, stable=True)
    keep = torch.ones_like(weights, dtype=torch.bool)
    keep[..., 1:] = weights.cumsum(-1)[..., :-1] <= share
    keep[..., :least] = True
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def descending(values: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` highest values of each row, highest first, without their places.

    On a CPU NumPy sorts: `torch.topk`, which keeps each value with its place, takes ten times as long there.

    Args:
        values: (rows, entries).
    """
    import torch

    if values.is_cpu and values.dtype == torch.float32:
        ordered = values.detach().neg()
        try:
            ordered.numpy().sort(axis=-1)
        except RuntimeError:  # torch was built for another NumPy, or there is none
            pass
        else:
            return ordered[:, :count].neg()
    return torch.topk(values, count, -1).values


def exactly(values: torch.Tensor, best: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The `count` highest values of each row. May wait for the device.

    Args:
        values: (rows, entries).
        best: (rows, at least count + 1, or entries), the highest values of each row, highest first.
        count: (rows, 1), of 1 to entries.
    """
    least = best.gather(-1, count - 1)
    found = values >= least
    after = best.gather(-1, count.clamp(max=best.shape[-1] - 1))  # for all entries of a row it is the last of them
    if not bool(((after == least) & (count < values.shape[-1])).any()):
        return found
    above, equal = values > least, values == least
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
