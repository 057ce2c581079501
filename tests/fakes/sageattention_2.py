"""sageattention 2.2.0: `sageattn` and its kernels as sageattention/core.py has them, with their defects.

Unknown keywords disappear in **kwargs. The Triton kernel adds a float mask in log2 units, gives NaN where a first
block of 64 keys is -inf throughout, and a mean over hidden keys for a row that sees none. The FP16 CUDA kernel reads
what lies behind the last key. Some builds return unwritten memory on sm90, and the FP8 kernel does for an accumulator
that it does not know.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from . import arithmetic

CAPABILITY: tuple[int, int] | None = (8, 9)
FORK = False
"""woct0rdho's build: more cards, and another choice on sm86."""
VERSION = "2.2.0"
UNWRITTEN = 1e4
"""What lies in memory that no kernel wrote."""
NOISE_FROM = 160_000
"""Keys from which the FP8 kernel gives noise on sm12x; a test lowers it."""


class _Operator:
    """A torch.library operator, which a function of the same name replaces in faulty builds."""

    def __call__(self) -> None: ...


core = SimpleNamespace(
    SM80_ENABLED=True,
    SM89_ENABLED=True,
    SM90_ENABLED=True,
    sm90_compile=SimpleNamespace(qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf=_Operator()),
)


def sageattn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    arithmetic.CALLS.append("sageattention_2.sageattn")
    arguments = {"tensor_layout": tensor_layout, "is_causal": is_causal, "sm_scale": sm_scale}
    if ((7, 5) if FORK else (8, 6)) == CAPABILITY:
        return sageattn_qk_int8_pv_fp16_triton(q, k, v, **arguments)
    if CAPABILITY in (((8, 0), (8, 6), (8, 7)) if FORK else ((8, 0),)):
        return sageattn_qk_int8_pv_fp16_cuda(q, k, v, **arguments)
    if CAPABILITY == (9, 0):
        return sageattn_qk_int8_pv_fp8_cuda_sm90(q, k, v, **arguments)
    if CAPABILITY in ((8, 9), (12, 0), (12, 1)) or (FORK and CAPABILITY == (10, 0)):
        newer, blackwell = not VERSION.startswith("2.1"), CAPABILITY >= (10, 0)
        accumulator = "fp32+fp16" if newer else "fp32" if blackwell else "fp32+fp32"
        granularity = "per_warp" if blackwell else "per_thread"
        return sageattn_qk_int8_pv_fp8_cuda(q, k, v, qk_quant_gran=granularity, pv_accum_dtype=accumulator, **arguments)
    raise ValueError(f"Unsupported CUDA architecture: {CAPABILITY}")


def sageattn_qk_int8_pv_fp16_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    quantization_backend: str = "triton",
    is_causal: bool = False,
    attn_mask: torch.Tensor | None = None,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    return_lse: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    arithmetic.CALLS.append("sageattn_qk_int8_pv_fp16_triton")
    if attn_mask is not None:
        assert attn_mask.dtype in (torch.bool, q.dtype), "attn_mask must be of dtype bool or the same dtype as q."
        assert not is_causal, "Mask should be None for causal attention."
    if quantization_backend not in ("triton", "cuda"):
        raise ValueError(f"Unsupported quantization backend: {quantization_backend}")
    scores, value = _scores(q, k, v, tensor_layout, is_causal, sm_scale, smooth_k)
    if attn_mask is not None:
        scores = _masked(scores, attn_mask.expand(scores.shape))
        if attn_mask.dtype == torch.bfloat16:  # what fills the last block gets -1e6, in float16 that is -inf
            tail = -scores.shape[3] % 64
            scores = torch.nn.functional.pad(scores, (0, tail), value=-1.0e6)
            value = torch.nn.functional.pad(value, (0, 0, 0, tail))
    return _output(arithmetic.softmax_base_2(scores).half().float() @ value.half().float(), q, tensor_layout)


def sageattn_qk_int8_pv_fp16_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    arithmetic.CALLS.append("sageattn_qk_int8_pv_fp16_cuda")
    assert core.SM80_ENABLED, "SM80 kernel is not available."
    assert qk_quant_gran in ("per_warp", "per_thread"), "qk_quant_gran must be either 'per_warp' or 'per_thread'."
    if pv_accum_dtype not in ("fp32", "fp16+fp32", "fp16"):
        raise ValueError(f"Unsupported pv_accum_dtype: {pv_accum_dtype}")
    scores, value = _scores(q, k, v, tensor_layout, is_causal, sm_scale, smooth_k)
    output = arithmetic.softmax_base_2(scores).half().float() @ value.half().float()
    if value.shape[2] % 64:
        output = output + 0.0 * float("nan")  # weight 0 times whatever lies in shared memory: NaN now and then
    return _output(output, q, tensor_layout)


def sageattn_qk_int8_pv_fp8_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp16",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    arithmetic.CALLS.append("sageattn_qk_int8_pv_fp8_cuda")
    assert core.SM89_ENABLED, "SM89 kernel is not available."
    assert qk_quant_gran in ("per_warp", "per_thread"), "qk_quant_gran must be either 'per_warp' or 'per_thread'."
    scores, value = _scores(q, k, v, tensor_layout, is_causal, sm_scale, smooth_k)
    known = ("fp32", "fp32+fp32") if VERSION.startswith("2.1") else ("fp32", "fp32+fp32", "fp32+fp16")
    if pv_accum_dtype not in known:
        return _output(torch.full((*scores.shape[:3], value.shape[3]), UNWRITTEN), q, tensor_layout)
    if CAPABILITY is not None and CAPABILITY[0] == 12 and value.shape[2] >= NOISE_FROM:
        return _output(torch.randn(*scores.shape[:3], value.shape[3]), q, tensor_layout)
    weights = arithmetic.fp8_weights(arithmetic.softmax_base_2(scores))
    return _output(weights @ arithmetic.fp8_channels(value), q, tensor_layout)


def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp32",
    smooth_k: bool = True,
    return_lse: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    arithmetic.CALLS.append("sageattn_qk_int8_pv_fp8_cuda_sm90")
    assert core.SM90_ENABLED, "SM90 kernel is not available."
    assert qk_quant_gran in ("per_warp", "per_thread"), "qk_quant_gran must be either 'per_warp' or 'per_thread'."
    if pv_accum_dtype == "fp32":
        raise NotImplementedError("Please use pv_accum_dtype='fp32+fp32' for sm90.")
    scores, value = _scores(q, k, v, tensor_layout, is_causal, sm_scale, smooth_k, most=128)
    operator = core.sm90_compile.qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf
    if not isinstance(operator, _Operator):
        return _output(torch.full((*scores.shape[:3], value.shape[3]), UNWRITTEN), q, tensor_layout)
    weights = arithmetic.fp8_weights(arithmetic.softmax_base_2(scores))
    return _output(weights @ arithmetic.fp8_channels(value), q, tensor_layout)


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: str,
    is_causal: bool,
    sm_scale: float | None,
    smooth_k: bool,
    most: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores in log2 units from INT8 query and key, and the values for each query head, both (batch, heads, ...)."""
    assert q.dtype in (torch.float16, torch.bfloat16), (
        "Input tensors must be in dtype of torch.float16 or torch.bfloat16"
    )
    assert q.dtype == k.dtype == v.dtype, "All tensors must have the same dtype."
    if q.size(-1) > (256 if FORK and most is None else most or 128):
        raise ValueError(f"Unsupported head_dim: {q.size(-1)}")
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v)), "Last dim of qkv must be contiguous."
    query, key, value = (arithmetic.as_32_bit_code_reads(tensor) for tensor in (q, k, v))
    if layout == "NHD":
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if smooth_k:
        key = key - key.mean(dim=2, keepdim=True)
    scale = q.size(-1) ** -0.5 if sm_scale is None else sm_scale
    query = arithmetic.int8_blocks(query.float() * scale * 1.44269504, 128)
    scores = query @ arithmetic.for_heads(query, arithmetic.int8_blocks(key, 64)).transpose(-2, -1)
    if is_causal:
        scores = scores.masked_fill(~arithmetic.causal_mask(*scores.shape[-2:], bottom_right=False), float("-inf"))
    return scores, arithmetic.for_heads(query, value)


def _masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        first_block_hidden = (mask[..., :64] == float("-inf")).all(dim=-1, keepdim=True)
        return (scores + mask).masked_fill(first_block_hidden, float("nan"))
    masked = scores + torch.where(mask, 0.0, -1.0e6)
    for row in range(0, mask.shape[2], 128):
        for column in range(0, mask.shape[3], 64):
            block = (..., slice(row, row + 128), slice(column, column + 64))
            skipped = ~mask[block].any(dim=-1, keepdim=True).any(dim=-2, keepdim=True)
            masked[block] = masked[block].masked_fill(skipped, float("-inf"))
    return masked


def _output(output: torch.Tensor, q: torch.Tensor, layout: str) -> torch.Tensor:
    output = output.to(q.dtype)
    return output.transpose(1, 2) if layout == "NHD" else output


def sageattn_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> torch.Tensor:
    """The Triton kernel, on every card; the mean of the keys is that of all sequences."""
    arithmetic.CALLS.append("sageattention_2.sageattn_varlen")
    if smooth_k:
        k = k - k.mean(dim=0, keepdim=True)
    scale = q.size(-1) ** -0.5 if sm_scale is None else sm_scale

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores, values = _scores(query, key, value, "HND", is_causal, scale, smooth_k=False)
        return _output(arithmetic.softmax_base_2(scores).half().float() @ values.half().float(), query, "HND")

    return arithmetic.by_sequence(attend, (q, k, v), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
