"""Exact rows and errors of outputs, for probes, the benchmark and comparisons.

The guard computes them in `observe/guard/rows.py`: in float32, by head, without synchronisation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..kernels.reference import reference_attention
from ..values.request import AttentionCall

if TYPE_CHECKING:
    import torch


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices without float64."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def exact_rows(call: AttentionCall, most: int, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to `most` query rows, evenly spread and with the last one, and their exact attention.

    All rows of a causal call. Computed head by head, to bound memory, in the widest dtype of `device` (default: of the
    call).

    Returns:
        rows (rows,) on the CPU, and (batch, num_heads, rows, v_head_dim).
    """
    import torch

    at = device or call.query.device
    wide = widest(at)
    batch, num_heads, q_len = call.query.shape[:3]
    rows = torch.linspace(0, q_len - 1, q_len if call.is_causal else min(q_len, most), dtype=torch.float64)
    rows = rows.round().long()
    drawn = rows.to(call.query.device)
    mask, group = call.attn_mask, num_heads // call.key.shape[1]
    mask = None if mask is None else mask.expand(batch, num_heads, q_len, call.key.shape[2])
    heads = []
    for head in range(num_heads):
        of_query, of_key = slice(head, head + 1), slice(head // group, head // group + 1)
        one_head = call.changed(
            query=call.query[:, of_query, drawn].to(at, wide),
            key=call.key[:, of_key].to(at, wide),
            value=call.value[:, of_key].to(at, wide),
            attn_mask=None if mask is None else mask[:, of_query, drawn].to(at),
            enable_gqa=False,
        )
        heads.append(reference_attention(one_head))
    return rows, torch.cat(heads, dim=1)


def finite(*tensors: torch.Tensor) -> bool:
    """True when no element is NaN or infinite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def relative_l2(tensor: torch.Tensor, reference: torch.Tensor) -> float:
    """||tensor - reference|| / ||reference|| over all elements; NaN where either is not finite.

    Raises:
        ValueError: the shapes differ.
    """
    wide, wanted = _wide(tensor, reference)
    if not finite(wide, wanted):
        return math.nan
    size, error = float(wanted.norm()), float((wide - wanted).norm())
    return error / size if size else math.inf if error else 0.0


def cosine(tensor: torch.Tensor, reference: torch.Tensor) -> float:
    """Cosine of the angle between two tensors taken as vectors; NaN where either is all zeros or not finite.

    Raises:
        ValueError: the shapes differ.
    """
    wide, wanted = _wide(tensor, reference)
    sizes = float(wide.norm() * wanted.norm())
    return float(wide.flatten() @ wanted.flatten()) / sizes if sizes and finite(wide, wanted) else math.nan


def _wide(tensor: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if tensor.shape != reference.shape:
        raise ValueError(f"shapes {tuple(tensor.shape)} and {tuple(reference.shape)} differ")
    dtype = widest(reference.device)
    return tensor.to(dtype), reference.to(dtype)
