"""`sage_attn`: SageAttention 1.0.6, or of 2.x the kernel that its own `sageattn` picks for the card."""

from __future__ import annotations

from dataclasses import replace
from inspect import isfunction
from types import ModuleType
from typing import TYPE_CHECKING

from .. import sage
from ..backend import Backend, Kernel, Limits
from ..layout import INT32_ELEMENTS, indexable, on_device_of, to_bshd
from ..platform import Platform
from ..request import AttentionCall, AttentionRequest

if TYPE_CHECKING:
    import torch

CARDS = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1))
FORK_CARDS = ((7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1))
"""What `sageattn` of 2.2.0 dispatches on, in thu-ml d1a57a5 and in woct0rdho e147939."""

BUILT_FLAG = {"sage_fp16_cuda": "SM80_ENABLED", "sage_fp8_cuda": "SM89_ENABLED", "sage_fp8_sm90": "SM90_ENABLED"}
"""The names by which sageattention.core says which of its CUDA kernels were built."""

TAIL_BLOCK = 64
"""Keys per block of the INT8 kernels."""


class SageAttn(Backend):
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
    accuracy = "quantized"
    kinds = ("cuda",)
    requires = (sage.REQUIREMENT,)
    limits = Limits(
        dtypes=("float16", "bfloat16", "float32"),
        head_dims=(64, 96, 128),
        masks=("none",),
        kv_block=TAIL_BLOCK,
        max_elements=INT32_ELEMENTS,
        max_batch=65535,
        max_heads=65535,
    )
    second_limits = sage.SECOND_LIMITS
    second_limits_sm12x = replace(sage.SECOND_LIMITS, max_kv_len=150_000)

    def cards(self, platform: Platform) -> tuple[tuple[int, int], ...]:
        if sage.is_second(platform) and not sage.is_fork(platform):
            return CARDS
        return FORK_CARDS  # 1.0.6 is Triton alone: the same cards as the fork, whose oldest ones run Triton too

    def unavailable_reasons(self, platform: Platform) -> list[str]:
        reasons = super().unavailable_reasons(platform)
        return reasons + sage.triton_reasons(platform) if platform.kind in self.kinds else reasons

    def limits_on(self, platform: Platform) -> Limits:
        if not sage.is_second(platform):
            return self.limits
        return self.second_limits_sm12x if platform.capability in ((12, 0), (12, 1)) else self.second_limits

    def member(self, request: AttentionRequest, platform: Platform) -> str | None:
        if not sage.is_second(platform):
            return f"sageattention {sage.installed(platform).public}"
        picked = picked_by_sageattn(platform)
        return "sage_fp16_triton" if _may_read_nan(picked, request.kv_len) else picked

    def load(self, platform: Platform) -> Kernel:
        if not sage.is_second(platform):
            return _first()
        module = sage.import_second()
        picked = picked_by_sageattn(platform)
        _check_build(module, picked)
        return _second(module, picked)


def picked_by_sageattn(platform: Platform) -> str:
    """The kernel that `sageattn` of 2.x runs on this card, by the name under which it can be chosen by itself."""
    if platform.capability == (7, 5) or (platform.capability == (8, 6) and not sage.is_fork(platform)):
        return "sage_fp16_triton"
    if platform.capability in ((8, 0), (8, 6), (8, 7)):
        return "sage_fp16_cuda"
    return "sage_fp8_sm90" if platform.capability == (9, 0) else "sage_fp8_cuda"


def _may_read_nan(picked: str, kv_len: int) -> bool:
    return picked == "sage_fp16_cuda" and kv_len % TAIL_BLOCK != 0


def _check_build(module: ModuleType, picked: str) -> None:
    """Refuse builds without the card's kernel, and those whose sm90 kernel is hidden behind its own fake.

    Raises:
        ImportError: with what is wrong.
    """
    core = module.core
    flag = BUILT_FLAG.get(picked)
    if flag and not getattr(core, flag, True):
        raise ImportError(f"sageattention was built without the kernel for this card ({flag} is false)")
    compiled = getattr(core, "sm90_compile", None)
    operator = getattr(compiled, "qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf", None)
    # The fixed build keeps the operator, an object; the faulty one gives the same name to a plain function.
    if picked == "sage_fp8_sm90" and isfunction(operator):
        raise ImportError("this build returns unwritten memory on sm90 (thu-ml/SageAttention pull request 307)")


def _scale(call: AttentionCall) -> float:
    return float(call.query.shape[-1] ** -0.5) if call.scale is None else call.scale


def _first() -> Kernel:
    import sageattention

    if hasattr(sageattention, sage.SECOND_ONLY):
        raise ImportError(f"metadata says sageattention 1.x, but {sageattention.__file__} has {sage.SECOND_ONLY}")
    sageattn = sageattention.sageattn

    def run(call: AttentionCall) -> torch.Tensor:
        query, value = indexable(to_bshd(call.query)), indexable(to_bshd(call.value))
        key = to_bshd(call.key)
        key = indexable(key - key.mean(dim=1, keepdim=True))
        with on_device_of(query):
            output: torch.Tensor = sageattn(
                query, key, value, tensor_layout="NHD", is_causal=call.is_causal, sm_scale=_scale(call), smooth_k=False
            )
        return to_bshd(output)

    return run


def _second(module: ModuleType, picked: str) -> Kernel:
    sageattn, triton = module.sageattn, module.sageattn_qk_int8_pv_fp16_triton

    def run(call: AttentionCall) -> torch.Tensor:
        query, key, value = (indexable(to_bshd(tensor)) for tensor in (call.query, call.key, call.value))
        kernel = triton if _may_read_nan(picked, call.key.shape[2]) else sageattn
        with on_device_of(query):
            output: torch.Tensor = kernel(
                query, key, value, tensor_layout="NHD", is_causal=call.is_causal, sm_scale=_scale(call)
            )
        return to_bshd(output)

    return run
