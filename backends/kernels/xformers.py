"""`xformers`: memory_efficient_attention of xformers, which takes masks and float32 and runs on old cards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..values.aliases import COMFYUI, DIFFUSERS, Alias
from ..values.limits import NO_MASK, Batch, Dtypes, HeadDim, HeadDimMultiple, Heads
from ..values.masks import as_additive, without_keys
from ..values.package import Package, Symbols
from ..values.platform import Platform
from ..values.request import AttentionCall, AttentionRequest
from ..values.versions import meets
from .backend import HALF, Backend, Kernel, Limits, LseKernel
from .support.layout import GRID, Elements, indexable, on_device_of, to_bshd
from .support.lse import checked
from .support.sdpa import expanded
from .support.workspace import expanded_bytes, item_bytes, mask_size

if TYPE_CHECKING:
    import torch

ALIGNMENT = 16
"""Required alignment in bytes of every stride of query, key, value and bias."""

BIAS_STEP = 8
"""A row of the bias has a multiple of this many elements in memory, for every dtype."""


def _pip_arguments(platform: Platform, machine: str) -> tuple[str, ...]:
    # PyPI's wheels are built with CUDA 12.8; up to 0.0.34 each declares one exact torch.
    if not (platform.cuda or "").startswith("12.") or machine not in ("linux_x86_64", "win_amd64"):
        return ()
    declared = (("==2.8.0", "0.0.32.post2"), ("==2.9.1", "0.0.33.post2"), (">=2.10", "0.0.35"))
    fitting = [version for torch, version in declared if meets(platform.torch, torch)]
    return ("--no-deps", f"xformers=={fitting[0]}") if fitting else ()


class Xformers(Backend):
    """Limits as in xformers/ops/fmha of 0.0.29 to 0.0.35 (https://github.com/facebookresearch/xformers).

    Two operators matter here: `cutlass` (masks, float32, any head size, cards up to sm90) and `flash` (half precision
    without masks, head sizes up to 256, from sm80). So Blackwell has no operator with a mask, and older cards have no
    bfloat16. Head sizes fill 16 bytes where tensor cores are used. A bias has the full (batch, heads, q_len, kv_len),
    which need not take memory: dimensions may be views of one, but a row begins at a multiple of 8 numbers. Flash may
    be the flash-attn package, so its limit on elements holds. The operators for AMD cards are left out.
    """

    id = "xformers"
    summary = "xformers' memory-efficient attention. Exact; takes masks and float32, and runs on cards before Ampere."
    aliases = (Alias(DIFFUSERS, "xformers"), Alias(COMFYUI, "xformers"))
    kinds = ("cuda",)
    min_capability = (5, 0)
    requires = ("xformers>=0.0.29",)
    packages = (
        Package(
            "xformers",
            "xformers",
            "0.0.35",
            "https://github.com/facebookresearch/xformers",
            how="see {page} for the wheel whose declared torch is yours; the tags are {tags}; then: {pip} --no-deps "
            "WHEEL",
            arguments=_pip_arguments,
        ),
    )
    symbols = (
        Symbols("xformers.ops", ("memory_efficient_attention", "LowerTriangularMask")),
        Symbols("xformers._cpp_lib", ("_built_with_cuda",)),
    )
    tested_on = (
        "cuda:6.1,packages=xformers==0.0.29",
        "cuda:7.5,packages=xformers==0.0.35",
        "cuda:8.6,packages=xformers==0.0.35",
        "cuda:9.0,packages=xformers==0.0.35",
        "cuda:12.0,packages=xformers==0.0.35",
    )
    lse = True
    limits = Limits(
        Dtypes(("float16", "bfloat16", "float32")),
        HeadDim(),
        HeadDimMultiple(8, HALF),
        HeadDimMultiple(4, ("float32",)),
        Elements(),
        Batch(GRID),
        Heads(GRID),
    )
    turing_limits = limits.but(Dtypes(("float16", "float32")), HeadDimMultiple(8, ("float16",)))
    old_limits = turing_limits.without(HeadDimMultiple)
    blackwell_limits = limits.but(Dtypes(HALF), HeadDim(max=256), HeadDimMultiple(8, HALF), NO_MASK)

    def limits_on(self, platform: Platform) -> Limits:
        """Head sizes fill 16 bytes where tensor cores load them; those before sm80 know no float32."""
        if platform.architecture == "Blackwell":
            return self.blackwell_limits
        capability = platform.capability or (0, 0)
        if capability >= (8, 0):
            return self.limits
        return self.turing_limits if capability >= (7, 0) else self.old_limits

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """The mask as a bias, twice: when it is made and when it is copied into the required layout (`bias_of`)."""
        return expanded_bytes(request) + 2 * mask_size(request) * item_bytes(request)

    def load(self, platform: Platform) -> Kernel:
        ops, _ = _imported(platform)
        attention, causal = ops.memory_efficient_attention, ops.LowerTriangularMask

        def run(call: AttentionCall) -> torch.Tensor:
            call = expanded(call)
            query, key, value = (_aligned(to_bshd(tensor)) for tensor in (call.query, call.key, call.value))
            bias = causal() if call.is_causal else bias_of(call)
            with on_device_of(query):
                output: torch.Tensor = attention(query, key, value, attn_bias=bias, scale=call.scale)
            output = to_bshd(output)
            return output if call.attn_mask is None else output.masked_fill(without_keys(call.attn_mask), 0.0)

        return run

    def load_lse(self, platform: Platform) -> LseKernel:
        """What is kept for a backward pass: the natural logarithm, (batch, num_heads, q_len to the next 32).

        The operator is named, so that it is one of the two whose log-sum-exp was read in the sources.
        """
        ops, operator = _imported(platform)
        attention, causal = ops.memory_efficient_attention_forward_requires_grad, ops.LowerTriangularMask

        def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
            call = expanded(call)
            query, key, value = (_aligned(to_bshd(tensor)) for tensor in (call.query, call.key, call.value))
            bias = causal() if call.is_causal else bias_of(call)
            with on_device_of(query):
                output, lse = attention(query, key, value, attn_bias=bias, scale=call.scale, op=operator)
            output = to_bshd(output)
            return output if call.attn_mask is None else output.masked_fill(without_keys(call.attn_mask), 0.0), lse

        return checked(run)


def _imported(platform: Platform) -> tuple[Any, Any]:
    """xformers.ops, and the operator that takes what the limits of a card allow.

    Raises:
        ImportError: xformers does not work here; with the reason.
    """
    try:
        from xformers import _cpp_lib, ops
        from xformers.ops import fmha
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("flash_attn"):
            raise ImportError(f"xformers takes what flash-attn-4 left for version 2 ({error})") from error
        raise
    # Importing succeeds, with a warning, where the compiled part fits another torch; nothing runs then.
    if not _cpp_lib._built_with_cuda:
        why = " ".join(str(_cpp_lib._cpp_library_load_exception or "built without CUDA").split())
        raise ImportError(why.partition(" Please ")[0])
    operator = fmha.flash.FwOp if platform.architecture == "Blackwell" else fmha.cutlass.FwOp
    if not operator.is_available():
        raise ImportError(f"operator {operator.NAME} of xformers does not work with torch {platform.torch}")
    return ops, operator


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy where one of its steps is not a multiple of 16 bytes."""
    import torch

    tensor = indexable(tensor)
    if all(stride * tensor.element_size() % ALIGNMENT == 0 for stride in tensor.stride()[:-1]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def bias_of(call: AttentionCall) -> torch.Tensor | None:
    """The mask as xformers takes it, (batch, heads, q_len, kv_len), finite, in the query's dtype; None without one."""
    import torch

    if call.attn_mask is None:
        return None
    dtype, kv_len = call.query.dtype, call.key.shape[2]
    additive = as_additive(call.attn_mask, dtype)
    rows = additive.new_zeros((*additive.shape[:-1], -(-kv_len // BIAS_STEP) * BIAS_STEP), dtype=dtype)
    bias = rows[..., :kv_len]
    bias.copy_(additive).clamp_(min=torch.finfo(dtype).min / 2)  # rows of -inf alone are not left to the kernel
    return bias.expand(*call.query.shape[:3], kv_len)


BACKENDS = (Xformers(),)
