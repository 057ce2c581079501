"""`sage_attn`: SageAttention 1.0.6, or the kernel of 2.x that `sageattn` picks for the card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from ..values.aliases import (
    COMFYUI,
    DIFFUSERS,
    FASTVIDEO,
    KJNODES,
    LENGTHS,
    SGLANG,
    SMART_DIFFUSION,
    VLLM_OMNI,
    WAN_WRAPPER,
    XFUSER,
    YUNCHANG,
    Alias,
)
from ..values.limits import NO_MASK, Batch, Dtypes, HeadDimIn, Heads
from ..values.options import Option
from ..values.package import Package, Symbols
from ..values.platform import Platform
from ..values.reasons import Reason, template
from ..values.request import AttentionCall, AttentionRequest
from .backend import Kernel, Limits
from .registry import find
from .support import sage
from .support.layout import GRID, Elements, indexable, on_device_of, to_bshd

if TYPE_CHECKING:
    import torch

    from .support.varlen import VarlenKernel

FIRST_CARDS = ((7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1))
"""1.0.6 is Triton alone, which compiles for all of them."""

TRITON, FP16_CUDA, FP8_CUDA, FP8_SM90 = "sage_fp16_triton", "sage_fp16_cuda", "sage_fp8_cuda", "sage_fp8_sm90"
"""The kernels of 2.x that `sageattn` picks from."""


def _pip_arguments(platform: Platform, machine: str) -> tuple[str, ...]:
    # Pure Python over Triton, without declared needs. On Windows version 2 has wheels and is the better choice.
    on_linux = platform.os == "linux" and platform.version("triton") is not None
    return ("--no-deps", "sageattention==1.0.6") if on_linux else ()


FIRST = Package(
    "sageattention",
    "sageattention",
    "1.0.6",
    sage.SOURCES,
    note=f"version 1, in Triton; version 2 is faster and is built from {sage.SOURCES} with nvcc",
    systems=("linux",),
    arguments=_pip_arguments,
    needs_triton=True,
)

DOCUMENTED = (
    Option("quant_bits", int, 8, "Of query and key. Every release has INT8 alone.", choices=(8,)),
    Option("quant_symmetric", bool, True, "Zero stands for zero. No release has another form.", choices=(True,)),
)
"""Of Smart-Diffusion's page on attention backends, which its code does not read: what the kernels do anyway."""

NO_SMOOTH_K = template(
    "sage.smooth_k",
    "sageattention {found}: sageattn has no option smooth_k; {kernel}, which it runs here, has one",
)


class SageAttn(sage.SageBackend):
    """`sageattn` takes any keyword and drops those it does not know: only names that it has are passed, never a mask.

    1.0.6: keys that fill the last block of 64 are counted with score 0, so without is_causal other lengths are
    refused (77 keys: 28 % error); it subtracts the keys' mean in place, so that is done here, on new memory.
    2.x, FP16 CUDA kernel: the unread end of the last block may hold NaN
    (https://github.com/thu-ml/SageAttention/pull/377); the Triton kernel of the same package runs instead.
    2.x on sm12x: noise from 167,000 keys on, none at 151,000 (https://github.com/thu-ml/SageAttention/issues/388).
    2.x on sm90: builds before https://github.com/thu-ml/SageAttention/pull/307 return unwritten memory; not loaded.
    """

    id = "sage_attn"
    summary = "SageAttention, the kernel its installed version picks for the card. INT8 scores; takes no masks."
    aliases = (
        Alias(VLLM_OMNI, "SAGE_ATTN"),
        Alias(SGLANG, "sage_attn"),
        Alias(DIFFUSERS, "sage"),
        Alias(
            DIFFUSERS,
            "sage_hub",
            "the installed package only, never the Hub's build: which of its kernels runs on which card is not "
            "published for the version that Diffusers pins",
        ),
        Alias(DIFFUSERS, "sage_varlen", LENGTHS),
        Alias(SMART_DIFFUSION, "sage"),
        Alias(COMFYUI, "sage"),
        Alias(KJNODES, "auto", "the kernel that the package picks for the card; under other names auto is this pack's"),
        Alias(WAN_WRAPPER, "sageattn"),
        Alias(WAN_WRAPPER, "sageattn_compiled", "there torch.compile sees it; here each call is one opaque op anyway"),
        Alias(WAN_WRAPPER, "sageattn_varlen", LENGTHS),
        Alias(YUNCHANG, "SAGE_AUTO"),
        Alias(YUNCHANG, "SAGE_AUTO_DETECT"),
        Alias(XFUSER, "SAGE"),
        Alias(FASTVIDEO, "SAGE_ATTN"),
    )
    comfy_function = "attention_sage"
    requires = (sage.REQUIREMENT,)
    packages = (FIRST, *sage.SAGE2_PACKAGES)
    symbols = (
        Symbols("sageattention", ("sageattn",), "sageattention<2", foreign=(sage.SAGE2_ONLY,)),
        sage.sage2_symbols("sageattn", "sageattn_qk_int8_pv_fp16_triton"),
    )
    tested_on = (
        "cuda:7.5,packages=sageattention==1.0.6;triton==3.2.0",
        "cuda:8.9,packages=sageattention==1.0.6;triton==3.6.0",
        "cuda:8.9,packages=sageattention==2.1.1;triton==3.6.0",
        "cuda:8.0,packages=sageattention==2.2.0;triton==3.6.0",
        "cuda:8.6,packages=sageattention==2.2.0;triton==3.6.0",
        "cuda:8.9,packages=sageattention==2.2.0;triton==3.6.0",
        "cuda:9.0,packages=sageattention==2.2.0;triton==3.6.0",
        "cuda:12.0,packages=sageattention==2.2.0;triton==3.6.0",
        "cuda:8.6,packages=sageattention==2.2.0+cu130torch2.10.0andhigher.post6;triton==3.6.0",
        "cuda:9.0,packages=sageattention==2.2.0+cu130torch2.10.0andhigher.post6;triton==3.6.0",
        "cuda:10.0,packages=sageattention==2.2.0+cu130torch2.10.0andhigher.post6;triton==3.6.0",
    )
    options = (sage.SMOOTH_K, *DOCUMENTED)  # smooth_k: of 1.x; `sageattn` of 2.x has none that changes what it computes
    limits = Limits(
        Dtypes(("float16", "bfloat16", "float32")),
        HeadDimIn((64, 96, 128)),
        NO_MASK,
        sage.KeyBlock(sage.TAIL_BLOCK),
        Elements(),
        Batch(GRID),
        Heads(GRID),
    )

    def capabilities(self, platform: Platform) -> tuple[tuple[int, int], ...]:
        return sage.build(platform).attn if sage.is_sage2(platform) else FIRST_CARDS

    def limits_on(self, platform: Platform) -> Limits:
        if not sage.is_sage2(platform):
            return self.limits
        hopper = platform.capability == (9, 0)  # there it runs the sm90 kernel
        return sage.without_noise(sage.SAGE2_LIMITS if hopper else sage.build(platform).limits(), platform)

    def arithmetic_on(self, platform: Platform) -> str:
        """That of the kernel that it runs; version 1 keeps values in a half type."""
        return kernel_of(platform).arithmetic if sage.is_sage2(platform) else self.arithmetic

    def kernel_name(self, request: AttentionRequest, platform: Platform) -> str | None:
        if not sage.is_sage2(platform):
            return f"sageattention {sage.installed(platform).public}"
        kernel = kernel_of(platform)
        return TRITON if kernel.reads_tail and request.kv_len % sage.TAIL_BLOCK else kernel.id

    def option_reasons(self, platform: Platform, options: Mapping[str, object]) -> list[Reason]:
        if options.get("smooth_k", True) or not sage.is_sage2(platform):
            return []
        return [Reason(NO_SMOOTH_K, found=str(sage.installed(platform)), kernel=dispatched_kernel(platform))]

    def load(
        self, platform: Platform, *, smooth_k: bool = True, quant_bits: int = 8, quant_symmetric: bool = True
    ) -> Kernel:
        return _second(platform) if sage.is_sage2(platform) else _first(smooth_k)

    def varlen_limits(self, platform: Platform) -> Limits | None:
        return sage.varlen_limits(platform)

    def load_varlen(
        self, platform: Platform, *, smooth_k: bool = True, quant_bits: int = 8, quant_symmetric: bool = True
    ) -> VarlenKernel:
        return sage.load_varlen(smooth_k)


def dispatched_kernel(platform: Platform) -> str:
    """The kernel that `sageattn` of 2.x runs on this card, by its id."""
    if platform.capability in sage.build(platform).triton_on:
        return TRITON
    if platform.capability in ((8, 0), (8, 6), (8, 7)):
        return FP16_CUDA
    return FP8_SM90 if platform.capability == (9, 0) else FP8_CUDA


def kernel_of(platform: Platform) -> sage.SageBackend:
    return cast("sage.SageBackend", find(dispatched_kernel(platform)))


def _first(smooth_k: bool) -> Kernel:
    import sageattention

    if hasattr(sageattention, sage.SAGE2_ONLY):
        raise ImportError(f"metadata says sageattention 1.x, but {sageattention.__file__} has {sage.SAGE2_ONLY}")
    sageattn = sageattention.sageattn

    def run(call: AttentionCall) -> torch.Tensor:
        query, value = indexable(to_bshd(call.query)), indexable(to_bshd(call.value))
        key = to_bshd(call.key)
        key = indexable(key - key.mean(dim=1, keepdim=True) if smooth_k else key)
        with on_device_of(query):
            output: torch.Tensor = sageattn(
                query,
                key,
                value,
                tensor_layout="NHD",
                is_causal=call.is_causal,
                sm_scale=sage.scale_of(call),
                smooth_k=False,
            )
        return to_bshd(output)

    return run


def _second(platform: Platform) -> Kernel:
    module, picks = sage.import_sage2(), kernel_of(platform)
    picks.check(module)
    reads_tail = picks.reads_tail
    sageattn, triton = module.sageattn, module.sageattn_qk_int8_pv_fp16_triton

    def run(call: AttentionCall) -> torch.Tensor:
        query, key, value = (indexable(to_bshd(tensor)) for tensor in (call.query, call.key, call.value))
        kernel = triton if reads_tail and call.key.shape[2] % sage.TAIL_BLOCK else sageattn
        with on_device_of(query):
            output: torch.Tensor = kernel(
                query, key, value, tensor_layout="NHD", is_causal=call.is_causal, sm_scale=sage.scale_of(call)
            )
        return to_bshd(output)

    return run


BACKENDS = (SageAttn(),)
