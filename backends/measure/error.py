"""How far one tensor is from another: the figures that probes, the benchmark and comparisons share.

The guard has its own (`observe/guard/rows.py`): by head, and without waiting for the device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def finite(*tensors: torch.Tensor) -> bool:
    """True when no element is NaN or infinite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def relative_l2(tensor: torch.Tensor, reference: torch.Tensor) -> float:
    """||tensor - reference|| / ||reference|| over all elements; NaN where either is not finite.

    Raises:
        ValueError: the shapes differ.
    """
    found, wanted = _wide(tensor, reference)
    if not finite(found, wanted):
        return math.nan
    size, error = float(wanted.norm()), float((found - wanted).norm())
    return error / size if size else math.inf if error else 0.0


def cosine(tensor: torch.Tensor, reference: torch.Tensor) -> float:
    """Cosine of the angle between two tensors taken as vectors; NaN where either is all zeros or not finite.

    Raises:
        ValueError: the shapes differ.
    """
    found, wanted = _wide(tensor, reference)
    sizes = float(found.norm() * wanted.norm())
    return float(found.flatten() @ wanted.flatten()) / sizes if sizes and finite(found, wanted) else math.nan


def _wide(tensor: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if tensor.shape != reference.shape:
        raise ValueError(f"shapes {tuple(tensor.shape)} and {tuple(reference.shape)} differ")
    dtype = widest(reference.device)
    return tensor.to(dtype), reference.to(dtype)
