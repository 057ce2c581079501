"""`flex_attn`: PyTorch's FlexAttention, compiled by Inductor and never run uncompiled.

What a mask hides in whole blocks of 128 x 128 is skipped, so it is worth its compilation where masks hide much;
without one SDPA is faster. Nothing is kept between calls: ComfyUI samples under inference_mode, where a tensor has
no version counter, so it is unknown whether a mask seen before still has the same values. The block lists
are made from the mask of each call, in a few operations on the device and without a synchronisation.

Shapes are compiled as constants, so lengths are padded to buckets of whole blocks and the padding keys are
hidden: prompts of all lengths up to 1,024 tokens are 8 kinds of call. That also keeps the kernel away from lengths that
torch gets wrong (`FlexAttn`).
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType, MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from ..values.aliases import DIFFUSERS, Alias
from ..values.limits import Batch, Causal, Dtypes, HeadDim, HeadDimIn, Heads, Rule, ValueHeadDim
from ..values.package import Symbols
from ..values.platform import Platform
from ..values.reasons import Reason, template
from ..values.request import AttentionCall, AttentionRequest
from .backend import Backend, Kernel, Limits, package_reason
from .support.flex_blocks import BLOCK, bucket, causal_blocks, filled, masked_blocks, seen_keys
from .support.layout import INT32_ELEMENTS, Elements, indexable, on_device_of, power
from .support.sdpa import computes, nothing
from .support.workspace import item_bytes, key_size, mask_size, output_size, query_size, value_size

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    Compiled = Callable[..., torch.Tensor]
    Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, BlockMask | None, float | None]
    """query, key, value, bias, blocks, scale: those of `attend`."""

MAX_VARIANTS = 64
"""Kinds of call that one loaded kernel keeps compiled; a model at one size takes one to three, with prompts of several
lengths a few more. Beyond it the least recently used one is dropped, and compiled again when needed."""

GPU_KINDS = ("cuda", "rocm", "xpu")

MAX_HEADS = 65535
"""Most heads of all samples on a card: one dimension of the grid in older versions of torch."""


MASK_ELEMENTS = template("mask.elements", "{elements} elements in the mask of one head > {max}")


@dataclass(frozen=True)
class MaskElements(Rule):
    """The most elements, q_len * kv_len, of a mask with a row for each query."""

    max: int = INT32_ELEMENTS

    order = Elements.order + 1

    def reason(self, request: AttentionRequest) -> Reason | None:
        elements = request.q_len * request.kv_len
        if request.mask not in ("bool", "bias") or elements <= self.max:
            return None
        return Reason(MASK_ELEMENTS, elements=elements, max=self.max)

    def describe(self) -> str:
        return f"{power(self.max)} elements in the mask of one head"


HEADS_OF_ALL = template("heads.all", "{heads} heads in all samples > {max}")


@dataclass(frozen=True)
class HeadsOfAll(Rule):
    """The most heads of all samples together, batch * num_heads."""

    max: int

    order = Heads.order

    def reason(self, request: AttentionRequest) -> Reason | None:
        heads = request.batch * request.num_heads
        return None if heads <= self.max else Reason(HEADS_OF_ALL, heads=heads, max=self.max)

    def describe(self) -> str:
        return f"batch times heads to {self.max}"


NOT_ON_MACOS = template("flex.macos", "FlexAttention has no CPU kernel on macOS")
NO_COMPILER = template("flex.compiler", "no C++ compiler: {compiler} is not on the path (CXX names another one)")
COMPILES = template("flex.compiles", "the first call of each kind is compiled, which takes seconds to tens of seconds")
SKIPS_NOTHING = template("flex.skips_nothing", "with mask kind {mask} no block is skipped, and SDPA is faster")
FILLED = template("filled", "{reason}, filled up to {q_len} queries and {kv_len} keys")


class FlexAttn(Backend):
    """flex_attention of torch.nn.attention (arXiv:2412.05496), forward only.

    Limits from torch 2.13, nn/attention/flex_attention.py and _inductor/kernel/flex. On cards: head_dim from 16, the
    least that Triton multiplies (pull request 147765), to 256, the most that Inductor has block sizes for. Before 2.7
    only powers of two (pull request 133495). On the CPU: x86 with AVX2, a C++ compiler, and not macOS. Rows without a
    visible key give zeros, as in SDPA.

    With AVX2 (8 numbers to a vector) torch 2.13 is wrong or gives NaN at head_dim 8 and 16 where kv_len leaves 8 modulo
    16: the micro-kernel for the last keys (_inductor/codegen/cpp_micro_gemm.py, the transposed form for
    K % 8 == 0 and N % 8 == 0) writes a whole block of 16 scores for 8 keys. With AVX-512 it is right. Padded to
    whole blocks of 128 keys there is no such end; test_cpu_operators.py sweeps lengths, head sizes and masks.
    """

    id = "flex_attn"
    summary = "PyTorch's FlexAttention, compiled. Skips what masks hide; the first call of each kind takes long."
    aliases = (Alias(DIFFUSERS, "flex"),)
    kinds = (*GPU_KINDS, "cpu")
    by_name_only = True
    compiled = True
    requires = ("torch>=2.5",)
    asks_for = ("triton", "triton-windows")
    symbols = (Symbols("torch.nn.attention.flex_attention", ("flex_attention",)),)
    tested_on = ("cuda:8.9,packages=triton==3.6.0",)
    torch_of_kind: ClassVar[Mapping[str, str]] = MappingProxyType({"cpu": "torch>=2.6", "xpu": "torch>=2.9"})
    """Oldest torch of each kind of device that came after the first release."""
    limits = Limits(
        Dtypes(("float16", "bfloat16", "float32")), Causal("any"), ValueHeadDim(may_differ=True), MaskElements()
    )
    card_limits = limits.but(
        HeadDim(min=16, max=256), Elements(), Batch(MAX_HEADS), Heads(MAX_HEADS), HeadsOfAll(MAX_HEADS)
    )
    powers_of_two = (16, 32, 64, 128, 256)
    remarks = ("lengths are filled up to multiples of 128, above 1,024 tokens by up to an eighth",)

    def unavailable_reasons(self, platform: Platform) -> list[Reason]:
        reasons = super().unavailable_reasons(platform)
        if platform.kind not in self.kinds:
            return reasons
        later = self.torch_of_kind.get(platform.kind)
        if later and (reason := package_reason(later, platform)):
            reasons = [known for known in reasons if known != package_reason(self.requires[0], platform)]
            reasons.append(Reason("package.needed", reason=reason, by=platform.kind))
        if platform.kind == "cuda" and not (platform.version("triton") or platform.version("triton-windows")):
            triton = "triton-windows" if platform.os == "win32" else "triton"
            reasons.append(Reason("package.missing", package=triton))
        if platform.kind == "cpu":
            if platform.os == "darwin":
                reasons.append(Reason(NOT_ON_MACOS))
            elif not platform.described and not (compiler := cpp_compiler(platform.os))[1]:
                reasons.append(Reason(NO_COMPILER, compiler=compiler[0]))
        return reasons

    def limits_on(self, platform: Platform) -> Limits:
        limits = self.card_limits if platform.kind in GPU_KINDS else self.limits
        old = package_reason("torch>=2.7", platform)
        return limits.but(HeadDimIn(self.powers_of_two)) if old else limits

    def unsupported_reasons(self, request: AttentionRequest, platform: Platform) -> list[Reason]:
        limits, padded = self.limits_on(platform), _filled(request)
        return limits.reasons(request) or [
            Reason(FILLED, reason=reason, q_len=padded.q_len, kv_len=padded.kv_len) for reason in limits.reasons(padded)
        ]

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Copies of what is padded: query and output, key and value, and the mask."""
        padded, numbers, mask = _filled(request), 0, 0
        if padded.q_len != request.q_len:
            numbers += query_size(padded) + output_size(padded)
        if padded.kv_len != request.kv_len:
            numbers += key_size(padded) + value_size(padded)
        if padded != request:
            mask = mask_size(padded) * (item_bytes(request) if request.mask == "bias" else 1)
        return numbers * item_bytes(request) + mask

    def avoid_reasons(self, request: AttentionRequest, platform: Platform) -> list[Reason]:
        reasons = [Reason(COMPILES)]
        if request.mask in ("none", "bias") and not request.is_causal:
            reasons.append(Reason(SKIPS_NOTHING, mask=request.mask))
        return reasons

    def load(self, platform: Platform) -> Kernel:
        check_cpu(platform)
        variants = Variants()

        def run(call: AttentionCall) -> torch.Tensor:
            if not computes(call):
                return nothing(call)
            with on_device_of(call.query):
                given = arguments(call)
                return variants.of(given)(*given)[:, :, : call.query.shape[2]]

        return run


def check_cpu(platform: Platform) -> None:
    """Whether FlexAttention's kernel for CPUs runs on this one.

    Raises:
        RuntimeError: it lacks the vector instructions.
    """
    import torch

    if platform.kind == "cpu" and not (has := torch.backends.cpu.get_cpu_capability()).startswith("AVX"):
        raise RuntimeError(f"the CPU's vector instructions are {has}, FlexAttention needs AVX2")


def cpp_compiler(os_name: str) -> tuple[str, str | None]:
    """The C++ compiler that Inductor starts on this system (CXX, else its default), and where it is."""
    name = os.environ.get("CXX") or ("cl" if os_name == "win32" else "g++")
    return name, shutil.which(name)


def _filled(request: AttentionRequest) -> AttentionRequest:
    return request._replace(q_len=bucket(request.q_len), kv_len=bucket(request.kv_len))


class Variants:
    """One compiled function per kind of call, and a bound on how many there are.

    Dynamo keeps what it compiled with the code object of a function and past its limit (8) runs uncompiled, in
    some versions without an error. So each kind of call has its own code object, and the traced function raises
    where Python itself executes it. Shapes are compiled as constants: with dynamic=True torch 2.13 checks a mask's
    indices against the wrong size on the CPU ("index out of bounds: 0 <= tmp < cur_kvSplitSize").
    """

    def __init__(self, most: int = MAX_VARIANTS) -> None:
        self.made = 0
        self._function = lru_cache(maxsize=most)(lambda kind: self._new())
        self._lock = threading.Lock()

    def of(self, given: Arguments) -> Compiled:
        """The function for calls like this one, by what `arguments` made of it: shapes, strides, types, device."""
        with self._lock:
            return self._function(kind_of(given))

    def _new(self) -> Compiled:
        import torch

        own = FunctionType(traced.__code__.replace(), traced.__globals__, f"flex_attn_{self.made}")
        self.made += 1
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

    On cards the main kernel is always taken: the decoding kernel for short queries has other limits, such as
    groups of 2, 4, 8 heads (https://github.com/pytorch/pytorch/issues/143117).
    """
    from torch.nn.attention.flex_attention import flex_attention

    score_mod = None if bias is None else adds(bias)
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
    if blocks is not None:  # the kernel's own blocks must divide those of the lists; its defaults divide 128
        sizes = zip(("BLOCK_M", "BLOCK_N"), blocks.BLOCK_SIZE, strict=True)
        options |= {name: size for name, size in sizes if size < BLOCK}
    output: torch.Tensor = flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=blocks,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=None if query.device.type == "cpu" else options,  # type: ignore[arg-type]  # a TypedDict
    )
    return output


def adds(bias: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A score_mod that adds `bias`.

    Scores are scaled by log2(e) after it, so a bias near float32's lowest number would become -inf and clear a row
    that SDPA does not clear; it is clamped to half of that. A true -inf stays.
    """
    import torch

    lowest = torch.finfo(torch.float32).min / 2

    def score_mod(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        added = bias[b, h, q, k].to(torch.float32)
        return score + torch.where(added == float("-inf"), added, added.clamp(min=lowest))

    return score_mod


def arguments(call: AttentionCall) -> Arguments:
    """The arguments of `attend` for this call, with lengths padded to buckets.

    A boolean mask becomes lists of blocks, a bias a view as large as the scores. Padding keys are hidden; the caller
    drops padding rows from the output.

    Raises:
        ValueError: a mask exceeds 32-bit offsets.
    """
    import torch
    from torch.nn.functional import pad

    q_len, kv_len = call.query.shape[2], call.key.shape[2]
    rows, keys = bucket(q_len), bucket(kv_len)
    query, key, value = (
        pad(tensor, (0, 0, 0, length - tensor.shape[2])) if tensor.shape[2] != length else indexable(tensor)
        for tensor, length in ((call.query, rows), (call.key, keys), (call.value, keys))
    )
    mask, bias, blocks = call.attn_mask, None, None
    if mask is not None:
        whole = filled(mask.expand(*query.shape[:2], q_len, kv_len), rows, keys)
        if mask.dtype is torch.bool:
            blocks = masked_blocks(_in_reach(whole), q_len)
        else:
            bias = _in_reach(whole)
    if call.is_causal:
        blocks = causal_blocks(q_len, kv_len, query.device)
    elif blocks is None and keys != kv_len:
        seen = seen_keys(kv_len, keys, query.device)
        blocks = masked_blocks(seen.expand(*query.shape[:2], rows, keys), q_len)
    return query, key, value, bias, blocks, call.scale


def _in_reach(mask: torch.Tensor) -> torch.Tensor:
    reach = sum((size - 1) * stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    if reach > INT32_ELEMENTS:
        raise ValueError(f"mask of {reach} elements > {INT32_ELEMENTS}, the reach of 32-bit offsets")
    return mask


def kind_of(given: Arguments) -> object:
    """What the compiler takes as constant of these arguments of `attend`."""
    *tensors, blocks, scale = given
    facts = [_facts(tensor) for tensor in tensors]
    if blocks is not None:
        facts += [blocks.BLOCK_SIZE, _facts(blocks.kv_indices), blocks.mask_mod.__code__]
        facts += [_facts(cell.cell_contents) for cell in blocks.mask_mod.__closure__ or ()]
    return (*facts, scale)


def _facts(tensor: torch.Tensor | None) -> object:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


BACKENDS = (FlexAttn(),)
