"""`flex_attn`: PyTorch's FlexAttention, compiled by Inductor and never run uncompiled.

What a mask hides in whole blocks of 128 x 128 is skipped, so it is worth its compilation where masks hide much;
without one SDPA is faster. Nothing is kept between calls: ComfyUI samples under inference_mode, where a tensor has
no version counter, so nobody can know that a mask seen before still has the same values. The lists of blocks are
made anew from the mask of each call, in a few operations on the device and without a synchronisation.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import FunctionType, MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from ..backend import Backend, Kernel, Limits, package_reason
from ..kernel_support.flex_blocks import causal_blocks, masked_blocks
from ..kernel_support.layout import INT32_ELEMENTS, indexable, on_device_of
from ..platform import Platform
from ..request import AttentionCall, AttentionRequest

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    Compiled = Callable[..., torch.Tensor]

MAX_VARIANTS = 24
"""Kinds of call that one loaded kernel compiles; a model at one size takes one to three."""

GPU_KINDS = ("cuda", "rocm", "xpu")

MAX_HEADS = 65535
"""Most heads of all samples on a card: one dimension of the grid in older versions of torch."""


class FlexAttn(Backend):
    """flex_attention of torch.nn.attention (arXiv:2412.05496), forward only.

    Limits from torch 2.13, nn/attention/flex_attention.py and _inductor/kernel/flex. On cards: head_dim from 16, the
    least that Triton multiplies (pull request 147765), to 256, the most that Inductor has block sizes for. Before 2.7
    only powers of two (pull request 133495). On the CPU: x86 with AVX2, a C++ compiler, and not macOS. Rows without a
    visible key give zeros, as in SDPA.
    """

    id = "flex_attn"
    summary = "PyTorch's FlexAttention, compiled. Skips what masks hide; the first call of each kind takes long."
    kinds = (*GPU_KINDS, "cpu")
    requires = ("torch>=2.5",)
    torch_of_kind: ClassVar[Mapping[str, str]] = MappingProxyType({"cpu": "torch>=2.6", "xpu": "torch>=2.9"})
    """Kinds that came later than the first release."""
    limits = Limits(
        dtypes=("float16", "bfloat16", "float32"),
        causal_cross=True,
        mixed_head_dims=True,
        max_mask_elements=INT32_ELEMENTS,
    )
    card_limits = replace(
        limits,
        min_head_dim=16,
        max_head_dim=256,
        max_elements=INT32_ELEMENTS,
        max_batch=MAX_HEADS,
        max_heads=MAX_HEADS,
        max_heads_of_all=MAX_HEADS,
    )
    powers_of_two = (16, 32, 64, 128, 256)

    def unavailable_reasons(self, platform: Platform) -> list[str]:
        reasons = super().unavailable_reasons(platform)
        if platform.kind not in self.kinds:
            return reasons
        later = self.torch_of_kind.get(platform.kind)
        if later and (reason := package_reason(later, platform)):
            reasons = [known for known in reasons if not known.startswith("package torch ")]
            reasons.append(f"{reason}, which {platform.kind} needs")
        if platform.kind == "cuda" and not (platform.version("triton") or platform.version("triton-windows")):
            reasons.append(f"package {'triton-windows' if platform.os == 'win32' else 'triton'} is not installed")
        if platform.kind == "cpu":
            if platform.os == "darwin":
                reasons.append("os darwin: FlexAttention has no kernel for the CPU there")
            elif not platform.described and not (compiler := cpp_compiler(platform.os))[1]:
                reasons.append(f"no C++ compiler: {compiler[0]} is not on the path (CXX names another one)")
        return reasons

    def limits_on(self, platform: Platform) -> Limits:
        limits = self.card_limits if platform.kind in GPU_KINDS else self.limits
        return replace(limits, head_dims=self.powers_of_two) if package_reason("torch>=2.7", platform) else limits

    def avoid_reasons(self, request: AttentionRequest, platform: Platform) -> list[str]:
        reasons = ["the first call of each kind is compiled, which takes seconds to tens of seconds"]
        if request.mask in ("none", "bias") and not request.is_causal:
            reasons.append(f"mask kind {request.mask} not in (key_padding, bool): no block is skipped, SDPA is faster")
        return reasons

    def load(self, platform: Platform) -> Kernel:
        import torch

        if platform.kind == "cpu" and not (has := torch.backends.cpu.get_cpu_capability()).startswith("AVX"):
            raise RuntimeError(f"the CPU's vector instructions are {has}, FlexAttention needs AVX2")
        variants = Variants()

        def run(call: AttentionCall) -> torch.Tensor:
            with on_device_of(call.query):
                return variants.of(call)(*arguments(call))

        return run


def cpp_compiler(os_name: str) -> tuple[str, str | None]:
    """The C++ compiler that Inductor starts on this system (CXX, else its default), and where it is."""
    name = os.environ.get("CXX") or ("cl" if os_name == "win32" else "g++")
    return name, shutil.which(name)


class Variants:
    """One compiled function per kind of call, and a bound on how many there are.

    Dynamo keeps what it compiled with the code object of a function and past its limit (8) goes on uncompiled, in
    some versions without an error. So each kind of call has a code object of its own, and the traced function raises
    where Python itself executes it. Shapes are compiled as constants: with dynamic=True torch 2.13 checks a mask's
    indices against the wrong size on the CPU ("index out of bounds: 0 <= tmp < cur_kvSplitSize").
    """

    def __init__(self, most: int = MAX_VARIANTS) -> None:
        self.most = most
        self._compiled: dict[object, Compiled] = {}

    def of(self, call: AttentionCall) -> Compiled:
        """The function for calls like this one: the same facts, device and strides.

        Raises:
            RuntimeError: there are as many as allowed, and none for this call.
        """
        tensors = (call.query, call.key, call.value, call.attn_mask)
        strides = tuple(None if tensor is None else (tensor.stride(), tensor.dtype) for tensor in tensors)
        kind = (call.request(), call.query.device, strides)
        if kind not in self._compiled:
            if len(self._compiled) >= self.most:
                raise RuntimeError(
                    f"{len(self._compiled)} kinds of call are compiled >= {self.most}, until the restart"
                )
            self._compiled[kind] = self._new()
        return self._compiled[kind]

    def _new(self) -> Compiled:
        import torch

        own = FunctionType(traced.__code__.replace(), traced.__globals__, f"flex_attn_{len(self._compiled)}")
        compiled: Compiled = torch.compile(own, fullgraph=True, dynamic=False)
        return compiled


def traced(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    blocks: BlockMask | None,
    scale: float | None,
) -> torch.Tensor:
    """`attend` for the compiler; an error where it would run uncompiled, slowly and with all scores in memory."""
    import torch

    if not torch.compiler.is_compiling():
        raise RuntimeError("torch.compile is switched off or gave up; flex_attn does not run uncompiled")
    return attend(query, key, value, bias, blocks, scale)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    blocks: BlockMask | None,
    scale: float | None,
) -> torch.Tensor:
    """flex_attention with these arguments; query is (batch, num_heads, q_len, head_dim), bias as large as the scores.

    On cards the main kernel is always taken: the decoding one for short queries has limits of its own, such as
    groups of 2, 4, 8 heads (https://github.com/pytorch/pytorch/issues/143117).
    """
    from torch.nn.attention.flex_attention import flex_attention

    score_mod = None if bias is None else adds(bias)
    on_card = query.device.type != "cpu"
    output: torch.Tensor = flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=blocks,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True} if on_card else None,
    )
    return output


def adds(bias: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A score_mod that adds `bias`.

    Scores are scaled by log2(e) after it, so a bias near float32's lowest number would become -inf and clear a row
    that SDPA does not clear; it is held at half of that. A true -inf stays.
    """
    import torch

    lowest = torch.finfo(torch.float32).min / 2

    def score_mod(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        added = bias[b, h, q, k].to(torch.float32)
        return score + torch.where(added == float("-inf"), added, added.clamp(min=lowest))

    return score_mod


def arguments(call: AttentionCall) -> tuple[object, ...]:
    """What `attend` takes for this call: a boolean mask becomes lists of blocks, a bias a view as large as the scores.

    Raises:
        ValueError: a mask reaches further than 32-bit offsets.
    """
    query, key, value = indexable(call.query), indexable(call.key), indexable(call.value)
    mask, bias, blocks = call.attn_mask, None, None
    if mask is not None:
        reach = sum((size - 1) * stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
        if reach > INT32_ELEMENTS:
            raise ValueError(f"mask of {reach} elements > {INT32_ELEMENTS}, the reach of 32-bit offsets")
        whole = mask.expand(*query.shape[:3], key.shape[2])
        if mask.dtype == torch.bool:
            blocks = masked_blocks(whole)
        else:
            bias = whole
    elif call.is_causal:
        blocks = causal_blocks(query.shape[2], key.shape[2], query.device)
    return query, key, value, bias, blocks, call.scale
