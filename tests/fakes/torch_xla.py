"""torch_xla: flash_attention of torch_xla/experimental/custom_kernel.py over the Pallas kernel of JAX.

The checks are those of jax/experimental/pallas/ops/tpu/flash_attention.py: the wrapper skips the outer ones.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import arithmetic

DEVICE = "TPU"
"""What PJRT runs on."""

MASK_VALUE = -0.7 * torch.finfo(torch.float32).max


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    q_segment_ids: torch.Tensor | None = None,
    kv_segment_ids: torch.Tensor | None = None,
    sm_scale: float = 1.0,
    *,
    ab: torch.Tensor | None = None,
    partition_spec: object = None,
    mesh: object = None,
) -> torch.Tensor:
    """From 2.4 on."""
    arithmetic.CALLS.append("flash_attention")
    kv_len, head_dim = k.shape[2], q.shape[-1]
    block_k = min(512, kv_len)
    if kv_len % block_k:
        raise ValueError(f"kv_seq_len={kv_len} should be divisible by block_k_major={block_k}")
    if k.shape[1] != q.shape[1] or v.shape != k.shape:
        raise ValueError(f"Head count mismatch: got {q.shape[1]}, {k.shape[1]}, {v.shape[1]}")
    if kv_len > block_k and head_dim > 128 and head_dim % 128:
        raise NotImplementedError(f"{head_dim=} should be a multiple of 128 if larger")
    if q.dtype is torch.float16:
        raise RuntimeError("Mosaic failed to compile TPU kernel: unsupported type f16")
    scores = q.float() @ k.float().transpose(-2, -1)
    if q.dtype is torch.float32:  # the matrix unit multiplies bfloat16
        scores = (q.bfloat16() @ k.bfloat16().transpose(-2, -1)).float()
    if ab is not None:
        scores = scores + ab.float()
    scores = scores * sm_scale
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise AssertionError("Both q_segment_ids and kv_segment_ids should be provided.")
    if q_segment_ids is not None and kv_segment_ids is not None:
        if block_k % 128:
            raise NotImplementedError("kv block size must be a multiple of 128")
        same = q_segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :]
        scores = scores + torch.where(same, 0.0, MASK_VALUE)
    if causal:
        visible = arithmetic.causal_mask(*scores.shape[-2:], bottom_right=False)
        scores = scores + torch.where(visible, 0.0, MASK_VALUE)
    weights = torch.softmax(scores, dim=-1).to(v.dtype).float()
    return (weights @ v.float()).to(q.dtype)


def first_flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segment_ids: tuple[torch.Tensor, torch.Tensor] | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """2.3: no scale, and both segments in one argument, which nothing here passes."""
    if segment_ids is not None:
        raise NotImplementedError("the fake knows no segments of 2.3")
    return flash_attention(q, k, v, causal)


def modules(version: str) -> dict[str, ModuleType]:
    """The package with its kernel, as of `version`."""
    names = ("torch_xla", "torch_xla.runtime", "torch_xla.experimental", "torch_xla.experimental.custom_kernel")
    package, runtime, experimental, kernel = (ModuleType(name) for name in names)
    first = version.startswith("2.3")
    kernel.flash_attention = first_flash_attention if first else flash_attention  # type: ignore[attr-defined]
    runtime.device_type = lambda: DEVICE  # type: ignore[attr-defined]
    package.runtime, package.experimental = runtime, experimental  # type: ignore[attr-defined]
    experimental.custom_kernel = kernel  # type: ignore[attr-defined]
    return dict(zip(names, (package, runtime, experimental, kernel), strict=True))
