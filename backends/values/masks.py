"""The kind of a mask, and exact conversions between forms of masks, without synchronisation.

Kernels get masks with four dimensions, each of which may be 1. Boolean: True shows a key; numbers, integers too, are
added to scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def mask_kind(mask: torch.Tensor | None) -> str:
    """The kind of a four-dimensional mask, one of `request.MASK_KINDS`, by dtype, shape and strides."""
    if mask is None:
        return "none"
    if _is_bool(mask):
        same_for_heads = mask.shape[1] == 1 or mask.stride(1) == 0
        same_for_queries = mask.shape[2] == 1 or mask.stride(2) == 0
        return "key_padding" if same_for_heads and same_for_queries else "bool"
    return "bias"


def _is_bool(mask: torch.Tensor) -> bool:
    import torch

    return mask.dtype == torch.bool


def for_kernels(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask in a dtype that kernels accept with a query of `dtype`: bool, `dtype`, or float32 on the CPU for halves.

    Integers are added to scores, as in ComfyUI's `attention_sub_quad` and `attention_split`. Integers and other float
    dtypes are cast to `dtype`, clamped to its range.
    PyTorch's CUDA kernels refuse float32 with half-precision queries ("invalid dtype for bias"), and its CPU kernel
    reads a float32 mask of float64 queries as if it were float64 (torch 2.13).
    """
    import torch

    if mask.dtype in (torch.bool, dtype):
        return mask
    if dtype == torch.float64:
        return mask.to(dtype)
    if mask.dtype == torch.float32 and mask.device.type == "cpu":
        return mask
    wide = mask if mask.dtype == torch.float64 else mask.to(torch.float32)
    limits = torch.finfo(dtype)
    return torch.where(wide.isinf(), wide, wide.clamp(limits.min, limits.max)).to(dtype)


def stored_once(tensor: torch.Tensor) -> torch.Tensor:
    """A view without what the first three dimensions only repeat (stride 0): those have size 1."""
    return tensor[tuple(slice(0, 1 if stride == 0 else None) for stride in tensor.stride()[:3])]


def as_4d(mask: torch.Tensor) -> torch.Tensor:
    """The mask with four dimensions, from (kv_len,), (q_len or 1, kv_len), (batch, q_len or 1, kv_len) or all four.

    Raises:
        ValueError: the mask has another number of dimensions.
    """
    if mask.ndim == 4:
        return mask
    if not 1 <= mask.ndim <= 3:
        raise ValueError(f"attention mask of shape {tuple(mask.shape)}: expected 1 to 4 dimensions")
    return mask.unsqueeze(1) if mask.ndim == 3 else mask[(None,) * (4 - mask.ndim)]


def without_keys(mask: torch.Tensor) -> torch.Tensor:
    """(..., q_len or 1, 1): True for query rows without a visible key, all False or -inf.

    SDPA gives zeros there; a kernel that adds a finite number to hidden scores gives a mean of hidden values.
    """
    visible = mask if _is_bool(mask) else mask > float("-inf")
    return visible.any(dim=-1, keepdim=True).logical_not()


def as_additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask (True: visible) as an additive one; a numeric mask is returned unchanged.

    Hidden keys get half of the dtype's most negative number: the weight underflows to 0, and neither the sum with a
    score nor a row without a visible key becomes infinite or NaN.
    """
    import torch

    if mask.dtype != torch.bool:
        return mask
    hidden = torch.finfo(dtype).min / 2
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask.logical_not(), hidden)


def visible_keys(mask: torch.Tensor) -> torch.Tensor:
    """Boolean mask of visible keys, of the same shape."""
    import torch

    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
