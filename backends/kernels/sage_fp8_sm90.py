"""`sage_fp8_sm90`: SageAttention 2 with INT8 scores and FP8 values, its kernel for Hopper."""

from __future__ import annotations

from inspect import isfunction
from types import ModuleType

from ..values.aliases import DIFFUSERS, YUNCHANG, Alias
from ..values.options import Option
from ..values.platform import Platform
from .backend import Kernel, Limits
from .support import sage


class SageFP8SM90(sage.SageCuda):
    """sageattn_qk_int8_pv_fp8_cuda_sm90 (sageattention/core.py).

    Builds before https://github.com/thu-ml/SageAttention/pull/307 return unwritten memory and are not loaded. It has
    one accumulator; the option exists so that a configuration can name it. It does not smooth values.
    """

    id = "sage_fp8_sm90"
    summary = "SageAttention 2 with INT8 scores and FP8 values, Hopper kernel. Takes no masks."
    aliases = (Alias(DIFFUSERS, "_sage_qk_int8_pv_fp8_cuda_sm90"), Alias(YUNCHANG, "SAGE_FP8_SM90"))
    arithmetic = "fp8"
    function = "sageattn_qk_int8_pv_fp8_cuda_sm90"
    flag = "SM90_ENABLED"
    symbols = (sage.sage2_symbols(function),)
    tested_on = (
        "cuda:9.0,packages=sageattention==2.2.0;triton==3.6.0",
        "cuda:9.0,packages=sageattention==2.2.0+cu130torch2.10.0andhigher.post6;triton==3.6.0",
    )
    options = (
        sage.GRANULARITY,
        Option(
            "pv_accum_dtype",
            str,
            "fp32+fp32",
            "Where weights times values are added up; this kernel has one way.",
            choices=("fp32+fp32",),
        ),
        sage.SMOOTH_K,
    )

    def capabilities(self, platform: Platform) -> sage.Capabilities:
        return ((9, 0),)

    def limits_on(self, platform: Platform) -> Limits:
        return self.limits

    def check(self, module: ModuleType) -> None:
        super().check(module)
        compiled = getattr(module.core, "sm90_compile", None)
        operator = getattr(compiled, "qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf", None)
        # The fixed build keeps the operator, an object; the faulty one gives the same name to a plain function.
        if isfunction(operator):
            raise ImportError("this build returns unwritten memory on sm90 (thu-ml/SageAttention pull request 307)")

    def load(
        self,
        platform: Platform,
        *,
        qk_quant_gran: str = sage.AS_PACKAGE,
        pv_accum_dtype: str = "fp32+fp32",
        smooth_k: bool = True,
    ) -> Kernel:
        return self.kernel(platform, qk_quant_gran=qk_quant_gran, pv_accum_dtype=pv_accum_dtype, smooth_k=smooth_k)


BACKENDS = (SageFP8SM90(),)
