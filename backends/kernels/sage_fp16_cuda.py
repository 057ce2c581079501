"""`sage_fp16_cuda`: SageAttention 2 with INT8 scores and FP16 values, its CUDA kernel."""

from __future__ import annotations

from collections.abc import Mapping

from ..values.aliases import DIFFUSERS, KJNODES, YUNCHANG, Alias
from ..values.options import Option
from ..values.platform import Platform
from .backend import Kernel, Limits
from .support import sage


class SageFP16Cuda(sage.SageCuda):
    """sageattn_qk_int8_pv_fp16_cuda (sageattention/core.py).

    kv_len that is no multiple of 64 is refused, with is_causal too: the memory behind the last key may hold NaN, and
    NaN times weight 0 is NaN. Padding keys would be counted, since this kernel takes no mask to hide them.
    """

    id = "sage_fp16_cuda"
    summary = "SageAttention 2 with INT8 scores and FP16 values, CUDA kernel. Takes no masks."
    aliases = (
        Alias(DIFFUSERS, "_sage_qk_int8_pv_fp16_cuda"),
        Alias(KJNODES, "sageattn_qk_int8_pv_fp16_cuda"),
        Alias(YUNCHANG, "SAGE_FP16"),
        Alias(YUNCHANG, "SAGE_FP16_CUDA"),
    )
    function = "sageattn_qk_int8_pv_fp16_cuda"
    flag = "SM80_ENABLED"
    reads_tail = True
    symbols = (sage.sage2_symbols(function),)
    tested_on = (
        "cuda:8.0,packages=sageattention==2.1.1;triton==3.6.0",
        "cuda:8.6,packages=sageattention==2.2.0;triton==3.6.0",
        "cuda:12.0,packages=sageattention==2.2.0;triton==3.6.0",
        "cuda:8.7,packages=sageattention==2.2.0+cu130torch2.10.0andhigher.post6;triton==3.6.0",
    )
    options = (
        sage.GRANULARITY,
        Option(
            "pv_accum_dtype",
            str,
            "fp32",
            "Where weights times values are added up: fp32 is the most exact, fp16 the fastest and may overflow.",
            choices=("fp32", "fp16+fp32", "fp16"),
        ),
        sage.SMOOTH_K,
        sage.SMOOTH_V,
    )

    def capabilities(self, platform: Platform) -> sage.Capabilities:
        return sage.build(platform).fp16_cuda

    def limits_on(self, platform: Platform) -> Limits:
        return super().limits_on(platform).but(sage.KeyBlock(sage.TAIL_BLOCK, causal=True))

    def option_conflicts(self, options: Mapping[str, object]) -> list[str]:
        chosen = options.get("pv_accum_dtype", "fp32")
        if not options.get("smooth_v") or chosen == "fp16":
            return []
        return [f"smooth_v has no effect with pv_accum_dtype {chosen}, only with fp16"]

    def load(
        self,
        platform: Platform,
        *,
        qk_quant_gran: str = sage.AS_PACKAGE,
        pv_accum_dtype: str = "fp32",
        smooth_k: bool = True,
        smooth_v: bool = False,
    ) -> Kernel:
        return self.kernel(
            platform,
            qk_quant_gran=qk_quant_gran,
            pv_accum_dtype=pv_accum_dtype,
            smooth_k=smooth_k,
            smooth_v=smooth_v,
        )


BACKENDS = (SageFP16Cuda(),)
