"""Backends that are wrong on purpose, under ids that nothing else uses, and a router that has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from attention_backends.backends.engine.router import Router
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.backend import FLOATING, Backend, Kernel, Limits
from attention_backends.backends.kernels.registry import detect
from attention_backends.backends.kernels.support.sdpa import plain_sdpa
from attention_backends.backends.values.limits import Causal, Dtypes, ValueHeadDim
from attention_backends.backends.values.platform import KINDS, Platform
from attention_backends.backends.values.request import AttentionCall

WRONG_SCALE, DROPPED_MASK, NAN, RAISING = "sol_attn", "radial_attn", "vmoba_attn", "aiter"
MEMORY, FAULT, AGAIN, MEMBER = "sparge_attn", "video_sparse_attn", "flex_attn", "xformers"
CALLS = 8
"""Attention calls of one model evaluation: two roles in four blocks."""


class Wrong(Backend):
    """PyTorch's attention with something done to it."""

    summary = "For a test."
    kinds = KINDS
    limits = Limits(Dtypes(FLOATING), Causal("any"), ValueHeadDim(may_differ=True))
    runs: ClassVar[str | None] = None

    def __init__(self, backend: str, kernel: Kernel, member: str | None = None) -> None:
        self.id = backend  # type: ignore[misc]
        self._kernel = kernel
        self._member = member

    def load(self, platform: Platform) -> Kernel:
        return self._kernel

    def kernel_name(self, request: object, platform: Platform) -> str | None:
        return self._member


def wrong_scale(call: AttentionCall) -> torch.Tensor:
    return plain_sdpa()(AttentionCall(call.query, call.key, call.value, call.attn_mask, scale=1.0))


def dropped_mask(call: AttentionCall) -> torch.Tensor:
    return plain_sdpa()(AttentionCall(call.query, call.key, call.value, scale=call.scale))


def nan_in_block_2() -> Kernel:
    """One row of NaN in the self-attention of one block, counted by calls."""
    seen = 0

    def run(call: AttentionCall) -> torch.Tensor:
        nonlocal seen
        output = plain_sdpa()(call).clone()
        if seen % CALLS == 4:
            output[:, :, 3] = float("nan")
        seen += 1
        return output

    return run


def failing_after(calls: int, error: Callable[[], Exception]) -> Kernel:
    """Right for so many calls, then it raises."""
    seen = 0

    def run(call: AttentionCall) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen > calls:
            raise error()
        return plain_sdpa()(call)

    return run


def no_memory() -> Exception:
    """What torch's allocator on the CPU raises."""
    return RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes")


def fault() -> Exception:
    return RuntimeError("CUDA error: an illegal memory access was encountered")


def router(*backends: Backend) -> Router:
    """A router of the CPU in which these stand in for what has their ids."""
    return Router(detect(torch.device("cpu")), {**BACKENDS, **{backend.id: backend for backend in backends}})
