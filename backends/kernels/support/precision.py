"""Switches of torch that make float32 arithmetic less than float32, for kernels that others are compared with.

- `allow_tf32`, `set_float32_matmul_precision`, `fp32_precision` (process): products of float32 in TF32 or bfloat16. No
  product of float64 is concerned, so what has to be exact is computed in float64 then.
- `torch.autocast` (thread): products of float32 in half types. Switched off around the computation, for this thread.
- `allow_fp16_bf16_reduction_math_sdp` (process; ComfyUI sets it): torch's plain attention computes in half types.
  They are widened before it gets them.
- `set_flush_denormal` (thread): numbers under 1e-38 in float32 become 0; relative to any output that is no error.
- `use_deterministic_algorithms`, `allow_fp16_accumulation`, `allow_*_reduced_precision_reduction` (process): the order
  of a sum, an error that is raised, or products of half types, which are not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def wide_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """float32, or float64 where `dtype` is that or where torch is set to compute float32 less exactly now."""
    import torch

    if dtype == torch.float64 or not (device_type == "mps" or float32_is_full(device_type)):
        return torch.float64
    return torch.float32


def float32_is_full(device_type: str) -> bool:
    """Whether products of float32 on this kind of device are float32 now; MPS has nothing else."""
    import torch

    on_card = device_type in ("cuda", "rocm")
    switch = torch.backends.cuda.matmul if on_card else getattr(torch.backends.mkldnn, "matmul", None)
    try:
        return str(switch.fp32_precision) in ("ieee", "none")  # type: ignore[union-attr]  # since torch 2.9
    except (AttributeError, AssertionError):
        highest = torch.get_float32_matmul_precision() == "highest"
        return highest and not (on_card and torch.backends.cuda.matmul.allow_tf32)
