"""`sage_fp16_triton`: the Triton kernel of SageAttention 2.x, the only Sage kernel that takes masks."""

from __future__ import annotations

from inspect import signature
from math import log
from typing import TYPE_CHECKING

from ..values.aliases import DIFFUSERS, KJNODES, YUNCHANG, Alias
from ..values.limits import Masks
from ..values.masks import without_keys
from ..values.options import Option
from ..values.platform import Platform
from ..values.request import AttentionCall
from .backend import Kernel, Limits
from .support import sage
from .support.layout import indexable, on_device_of, to_bshd

if TYPE_CHECKING:
    import torch

    from .support.varlen import VarlenKernel

CARDS: sage.Capabilities = ((7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0))
"""Triton compiles for every card; SageAttention's own sources call this kernel unusable on sm12x."""

LOG2_E = 1 / log(2)


class SageFP16Triton(sage.SageBackend):
    """sageattn_qk_int8_pv_fp16_triton of 2.2.0; its masks came in August 2025, within that version.

    It computes softmax in powers of two and adds a float mask to scores that are in log2 units by then (triton/
    attn_qk_int8_per_block.py), so a bias is multiplied by log2(e) first. A first block of keys that are all -inf
    gives NaN, so -inf becomes the lowest finite number. A row without a visible key gets a mean over hidden keys,
    where SDPA gives zeros, so such rows are cleared. What fills the last block of keys has a bias of -1e6 there, more
    than the lowest bfloat16, so with a bias in bfloat16 that block is filled with keys of -inf.
    """

    id = "sage_fp16_triton"
    summary = "SageAttention 2 with INT8 scores and FP16 values, Triton kernel. The Sage kernel that takes masks."
    aliases = (
        Alias(DIFFUSERS, "_sage_qk_int8_pv_fp16_triton"),
        Alias(KJNODES, "sageattn_qk_int8_pv_fp16_triton"),
        Alias(YUNCHANG, "SAGE_FP16_TRITON"),
    )
    min_capability = (7, 5)
    requires = (sage.REQUIREMENT, "sageattention>=2")
    packages = sage.SAGE2_PACKAGES
    symbols = (sage.sage2_symbols("sageattn_qk_int8_pv_fp16_triton"),)
    tested_on = (
        "cuda:8.9,packages=sageattention==2.1.1;triton==3.6.0",
        "cuda:8.9,packages=sageattention==2.2.0;triton==3.6.0",
        "cuda:8.6,packages=sageattention==2.2.0+cu130torch2.10.0andhigher.post6;triton==3.6.0",
    )
    options = (
        sage.SMOOTH_K,
        Option(
            "quantization_backend",
            str,
            "triton",
            "What rounds query and key: the package's Triton kernel, or its CUDA kernel, which fuses more.",
            choices=("triton", "cuda"),
        ),
    )
    limits = sage.SAGE2_LIMITS

    def capabilities(self, platform: Platform) -> sage.Capabilities:
        return CARDS

    def limits_on(self, platform: Platform) -> Limits:
        build = sage.build(platform)
        return build.limits().but(Masks()) if build.masks else build.limits()

    def load(self, platform: Platform, *, smooth_k: bool = True, quantization_backend: str = "triton") -> Kernel:
        import torch

        kernel = sage.import_sage2().sageattn_qk_int8_pv_fp16_triton
        settings = {"smooth_k": smooth_k, "quantization_backend": quantization_backend}
        chosen = sage.supported_kwargs(kernel, platform, self.options, settings)
        # A build of 2.2.0 from before August 2025 has no such parameter, and drops a mask in **kwargs.
        takes_masks = "attn_mask" in signature(kernel).parameters

        def run(call: AttentionCall) -> torch.Tensor:
            options: dict[str, object] = dict(chosen)
            query, key, value = (indexable(to_bshd(tensor)) for tensor in (call.query, call.key, call.value))
            if call.attn_mask is not None:
                if not takes_masks:
                    raise NotImplementedError("this build of sageattention takes no mask; a newer 2.2.0 does")
                mask = in_log2_units(call.attn_mask, query.dtype)
                if mask.dtype == torch.bfloat16 and key.shape[1] % sage.TAIL_BLOCK:
                    key, value, mask = filled(key, value, mask)
                options["attn_mask"] = mask
            with on_device_of(query):
                output: torch.Tensor = kernel(
                    query,
                    key,
                    value,
                    tensor_layout="NHD",
                    is_causal=call.is_causal,
                    sm_scale=sage.scale_of(call),
                    **options,
                )
            output = to_bshd(output)
            return output if call.attn_mask is None else output.masked_fill(without_keys(call.attn_mask), 0.0)

        return run

    def varlen_limits(self, platform: Platform) -> Limits | None:
        return sage.varlen_limits(platform)

    def load_varlen(
        self, platform: Platform, *, smooth_k: bool = True, quantization_backend: str = "triton"
    ) -> VarlenKernel:
        if quantization_backend != "triton":
            raise NotImplementedError(f"sageattn_varlen has no quantization_backend {quantization_backend}")
        return sage.load_varlen(smooth_k)


def in_log2_units(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask unchanged; a bias times log2(e), finite, in the query's dtype, which the kernel requires."""
    import torch

    if mask.dtype == torch.bool:
        return mask
    return (mask.float() * LOG2_E).to(dtype).clamp(min=torch.finfo(dtype).min)


def filled(key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """BSHD key and value and a bias, padded with hidden keys to a full last block; the keys' mean does not change."""
    import torch

    kv_len = key.shape[1]
    tail = -kv_len % sage.TAIL_BLOCK
    mean = key.mean(dim=1, keepdim=True).expand(-1, tail, -1, -1)
    bias = bias.expand(*bias.shape[:3], kv_len)
    return (
        torch.cat([key, mean], dim=1),
        torch.nn.functional.pad(value, (0, 0, 0, 0, 0, tail)),
        torch.nn.functional.pad(bias, (0, tail), value=float("-inf")),
    )


BACKENDS = (SageFP16Triton(),)
