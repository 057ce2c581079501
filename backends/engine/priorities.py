"""The ordered backends that `auto` tries on a platform: a table, each row with its source.

Limits are declared in each kernel's file: a backend of a row that is unavailable or refuses the call is rejected with
its reasons. Every row ends in `torch_sdpa`, which runs everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

from ..kernels.registry import BACKENDS
from ..values.platform import Platform


class Priority(NamedTuple):
    """One row: its machines, the order, and the evidence for it."""

    title: str
    kinds: tuple[str, ...]
    capabilities: tuple[tuple[int, int], tuple[int, int]] | None
    """Lowest and highest CUDA compute capability of the row; None for any."""
    order: tuple[str, ...]
    """Exact backends, best first."""
    evidence: str
    """`measured` by this project, `reported` by others, or `assumed`."""
    source: str
    lossy: tuple[str, ...] = ()
    """Tried before `order` where inexact backends are allowed."""


LAST_RESORT = "torch_sdpa"
"""Runs everywhere; the last of every row."""

PRIORITIES: tuple[Priority, ...] = (
    Priority(
        "Blackwell",
        ("cuda",),
        ((10, 0), (12, 9)),
        ("cudnn_attn", "flashinfer_attn", "flash_attn_4", "torch_sdpa"),
        "reported",
        "vLLM-Omni's table (measured there on sm_120); reports against cuDNN on sm_103 and sm_121 exist",
        ("sage_attn", "sage_fp16_triton"),
    ),
    Priority(
        "Hopper",
        ("cuda",),
        ((9, 0), (9, 9)),
        ("flash_attn", "torch_sdpa"),
        "reported",
        "vLLM-Omni's and SGLang's tables",
        ("sage_attn", "sage_fp16_triton"),
    ),
    Priority(
        "Ampere and Ada",
        ("cuda",),
        ((8, 0), (8, 9)),
        ("flash_attn", "torch_sdpa"),
        "reported",
        "vLLM-Omni's and SGLang's tables",
        ("sage_attn", "sage_fp16_triton"),
    ),
    Priority(
        "Turing and older",
        ("cuda",),
        ((0, 0), (7, 9)),
        ("xformers", "torch_sdpa"),
        "assumed",
        "FlashAttention 2 needs sm80; xformers' CUTLASS kernel supports older cards",
        ("sage_attn", "sage_fp16_triton"),
    ),
    Priority("CUDA, card unknown", ("cuda",), None, ("torch_sdpa",), "assumed", "no capability to go by"),
    Priority(
        "ROCm", ("rocm",), None, ("aiter", "flash_attn", "torch_sdpa"), "reported", "SGLang's and vLLM-Omni's tables"
    ),
    Priority("XLA", ("xla",), None, ("xla_flash", "torch_sdpa"), "reported", "Diffusers' XLA backend"),
    Priority("CPU, MPS, XPU, NPU", ("cpu", "mps", "xpu", "npu"), None, ("torch_sdpa",), "reported", "SGLang's table"),
)


def priority_for(platform: Platform) -> Priority:
    """The first row that fits `platform`; a row with capabilities fits only a card whose capability is known."""
    for row in PRIORITIES:
        if platform.kind not in row.kinds:
            continue
        if row.capabilities is None:
            return row
        lowest, highest = row.capabilities
        if platform.capability is not None and lowest <= platform.capability <= highest:
            return row
    raise AssertionError(f"no priority for platform kind {platform.kind!r}")  # PRIORITIES covers every kind


def default_line(platform: Platform, backend: str) -> str:
    """The log line about the default backend, worded as vLLM-Omni's."""
    if backend == LAST_RESORT:
        return "Defaulting to diffusion attention backend SDPA"
    card = " ".join(filter(None, (platform.architecture, platform.sm or platform.gfx)))
    known = ", ".join(filter(None, (card, BACKENDS[backend].library(platform))))
    return f"Defaulting to diffusion attention backend {backend.upper()}" + (f" ({known})" if known else "")
