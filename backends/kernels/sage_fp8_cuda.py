"""`sage_fp8_cuda`: SageAttention 2 with INT8 scores and FP8 values, its CUDA kernel."""

from __future__ import annotations

from collections.abc import Mapping

from ..values.aliases import DIFFUSERS, KJNODES, YUNCHANG, Alias
from ..values.options import Option
from ..values.platform import Platform
from ..values.reasons import Reason, template
from ..values.versions import meets
from .backend import Kernel, Limits
from .support import sage

NO_FP16_SUM = template("sage.fp16_sum", "sageattention {found} has no pv_accum_dtype fp32+fp16, which came with 2.2")


class SageFP8Cuda(sage.SageCuda):
    """sageattn_qk_int8_pv_fp8_cuda (sageattention/core.py).

    It returns unwritten memory for an accumulator that it does not know, so 2.1.1 is never asked for fp32+fp16,
    which came with 2.2. On sm12x it gives noise from 167,000 keys on, none at 151,000
    (https://github.com/thu-ml/SageAttention/issues/388).
    """

    id = "sage_fp8_cuda"
    summary = "SageAttention 2 with INT8 scores and FP8 values, CUDA kernel. Takes no masks."
    aliases = (
        Alias(DIFFUSERS, "_sage_qk_int8_pv_fp8_cuda"),
        Alias(KJNODES, "sageattn_qk_int8_pv_fp8_cuda", options=(("pv_accum_dtype", "fp32+fp32"),)),
        Alias(KJNODES, "sageattn_qk_int8_pv_fp8_cuda++", options=(("pv_accum_dtype", "fp32+fp16"),)),
        Alias(YUNCHANG, "SAGE_FP8", options=(("pv_accum_dtype", "fp32+fp32"),)),
        Alias(YUNCHANG, "SAGE_FP8_CUDA", options=(("pv_accum_dtype", "fp32+fp32"),)),
    )
    arithmetic = "fp8"
    function = "sageattn_qk_int8_pv_fp8_cuda"
    flag = "SM89_ENABLED"
    symbols = (sage.sage2_symbols(function),)
    tested_on = (
        "cuda:8.9,packages=sageattention==2.1.1;triton==3.6.0",
        "cuda:8.9,packages=sageattention==2.2.0;triton==3.6.0",
        "cuda:12.0,packages=sageattention==2.2.0;triton==3.6.0",
        "cuda:10.0,packages=sageattention==2.2.0+cu130torch2.10.0andhigher.post6;triton==3.6.0",
    )
    options = (
        sage.GRANULARITY,
        Option(
            "pv_accum_dtype",
            str,
            sage.AS_PACKAGE,
            "Where weights times values are added up: fp32+fp32 is the most exact, fp32+fp16 (2.2) the fastest; auto "
            "is the package's choice for the card.",
            choices=(sage.AS_PACKAGE, "fp32", "fp32+fp32", "fp32+fp16"),
        ),
        sage.SMOOTH_K,
        sage.SMOOTH_V,
    )

    def capabilities(self, platform: Platform) -> sage.Capabilities:
        return sage.build(platform).fp8_cuda

    def limits_on(self, platform: Platform) -> Limits:
        return sage.without_noise(super().limits_on(platform), platform)

    def option_conflicts(self, options: Mapping[str, object]) -> list[str]:
        chosen = options.get("pv_accum_dtype", sage.AS_PACKAGE)
        if not options.get("smooth_v") or chosen in (sage.AS_PACKAGE, "fp32"):
            return []
        return [f"smooth_v has no effect with pv_accum_dtype {chosen}, only with fp32"]

    def option_reasons(self, platform: Platform, options: Mapping[str, object]) -> list[Reason]:
        version = sage.installed(platform)
        if options.get("pv_accum_dtype") != "fp32+fp16" or version.release >= (2, 2):
            return []
        return [Reason(NO_FP16_SUM, found=str(version))]

    def load(
        self,
        platform: Platform,
        *,
        qk_quant_gran: str = sage.AS_PACKAGE,
        pv_accum_dtype: str = sage.AS_PACKAGE,
        smooth_k: bool = True,
        smooth_v: bool = False,
    ) -> Kernel:
        if pv_accum_dtype == sage.AS_PACKAGE:
            pv_accum_dtype = "fp32" if smooth_v else accumulator(platform)
        return self.kernel(
            platform,
            qk_quant_gran=qk_quant_gran,
            pv_accum_dtype=pv_accum_dtype,
            smooth_k=smooth_k,
            smooth_v=smooth_v,
        )


def accumulator(platform: Platform) -> str:
    """What `sageattn` takes for `pv_accum_dtype` on this card: fp32+fp16 from 2.2 on, some builds from CUDA 12.8 on."""
    old_cuda = sage.build(platform).asks_cuda and meets(platform.cuda or "", "<12.8")
    if sage.installed(platform).release >= (2, 2) and not old_cuda:
        return "fp32+fp16"
    return "fp32" if platform.architecture == "Blackwell" else "fp32+fp32"


BACKENDS = (SageFP8Cuda(),)
