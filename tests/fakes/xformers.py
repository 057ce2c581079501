"""xformers 0.0.35: memory_efficient_attention with the dispatch and the checks of xformers/ops/fmha.

Of its operators there are `flash` and `cutlass`. Where the compiled part did not load, importing works and every
operator refuses, as in the real one.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch

from . import arithmetic

CAPABILITY: tuple[int, int] | None = (8, 0)
OPERATORS: list[str] = []
"""The operators that ran."""


class LowerTriangularMask:
    """Causal, aligned to the top left."""


class _Operator:
    NAME: str
    AVAILABLE = True
    MINIMUM = (5, 0)
    MAXIMUM: tuple[int, int] | None = None
    DTYPES: tuple[torch.dtype, ...] = ()
    MAX_K = 65536
    BIASES: tuple[type, ...] = ()

    @classmethod
    def is_available(cls) -> bool:
        return cls.AVAILABLE

    @classmethod
    def not_supported_reasons(cls, query, key, value, attn_bias) -> list[str]:  # type: ignore[no-untyped-def]
        assert CAPABILITY is not None
        reasons = []
        if max(query.shape[-1], value.shape[-1]) > cls.MAX_K:
            reasons.append(f"max(query.shape[-1], value.shape[-1]) > {cls.MAX_K}")
        if not _cpp_lib._built_with_cuda:
            reasons.append("xFormers wasn't build with CUDA support")
        if CAPABILITY < cls.MINIMUM:
            reasons.append(f"requires device with capability >= {cls.MINIMUM} but your GPU has capability {CAPABILITY}")
        if cls.MAXIMUM is not None and CAPABILITY > cls.MAXIMUM:
            reasons.append(f"requires device with capability <= {cls.MAXIMUM} but your GPU has capability {CAPABILITY}")
        if query.dtype not in cls.DTYPES:
            reasons.append(f"dtype={query.dtype} (supported: {cls.DTYPES})")
        if type(attn_bias) not in cls.BIASES:
            reasons.append(f"attn_bias type is {type(attn_bias)}")
        if query.dtype is torch.bfloat16 and CAPABILITY[0] < 8:
            reasons.append("bf16 is only supported on A100+ GPUs")
        if not cls.is_available():
            reasons.append("operator wasn't built - see `python -m xformers.info` for more info")
        return reasons


class _Flash(_Operator):
    NAME = "fa2F@2.8.3-pt"
    MINIMUM = (8, 0)
    DTYPES = (torch.float16, torch.bfloat16)
    MAX_K = 256
    BIASES = (type(None), LowerTriangularMask)

    @classmethod
    def not_supported_reasons(cls, query, key, value, attn_bias) -> list[str]:  # type: ignore[no-untyped-def]
        reasons = super().not_supported_reasons(query, key, value, attn_bias)
        if query.shape[-1] != value.shape[-1]:
            reasons.append("query.shape[-1] != value.shape[-1]")
        _check_alignment(reasons, "query", query, 8)
        if isinstance(attn_bias, LowerTriangularMask) and query.shape[1] != key.shape[1]:
            reasons.append("Only support LowerTriangularMask if equal number ofkeys and queries")
        return reasons


class _Cutlass(_Operator):
    NAME = "cutlassF-pt"
    MAXIMUM = (9, 0)
    DTYPES = (torch.float32, torch.float16, torch.bfloat16)
    BIASES = (type(None), torch.Tensor, LowerTriangularMask)

    @classmethod
    def not_supported_reasons(cls, query, key, value, attn_bias) -> list[str]:  # type: ignore[no-untyped-def]
        reasons = super().not_supported_reasons(query, key, value, attn_bias)
        step = _gemm_alignment(query.dtype)
        _check_alignment(reasons, "query", query, step)
        _check_alignment(reasons, "value", value, step)
        if isinstance(attn_bias, torch.Tensor):
            alignment = 128 // torch.finfo(attn_bias.dtype).bits
            if any(stride % alignment for stride in attn_bias.stride()[:-1]):
                reasons.append(
                    f"attn_bias.stride(-2) % {alignment} != 0 (attn_bias.stride() = {attn_bias.stride()})\n"
                    "HINT: you need to ensure memory is aligned by slicing a bigger tensor."
                )
            if attn_bias.stride(-1) > 1:
                reasons.append("attn_bias.stride(-1) > 1 - you should call `.contiguous()` on the bias")
        return reasons


def _gemm_alignment(dtype: torch.dtype) -> int:
    assert CAPABILITY is not None
    bits = torch.finfo(dtype).bits
    tensor_cores = CAPABILITY >= (8, 0) or (CAPABILITY >= (7, 0) and bits == 16)
    return max(4 if CAPABILITY >= (8, 0) else 1, 128 // bits if tensor_cores else 1)


def _check_alignment(reasons: list[str], name: str, x: torch.Tensor, alignment: int) -> None:
    if x.shape[-1] % alignment:
        reasons.append(f"{name}.shape[-1] % {alignment} != 0")
    elif x.stride(-2) % alignment:
        reasons.append(f"{name}.stride(-2) % {alignment} != 0 ({name}.stride() = {x.stride()})")
    if x.stride(-1) > 1:
        reasons.append(f"{name}.stride(-1) > 1 - you should call `.contiguous()` on the input")


def memory_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | LowerTriangularMask | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: object = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    arithmetic.CALLS.append("memory_efficient_attention")
    batch, q_len, heads, head_dim = query.shape
    kv_len = key.shape[1]
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError("Query/Key/Value should either all have the same dtype")
    if isinstance(attn_bias, torch.Tensor) and attn_bias.shape != (batch, heads, q_len, kv_len):
        raise ValueError(
            f"Invalid shape for attention bias: {attn_bias.shape} (expected {(batch, heads, q_len, kv_len)})"
        )
    if key.shape != (batch, kv_len, heads, head_dim) or value.shape[:3] != key.shape[:3]:
        raise ValueError("Incompatible shapes for attention inputs: We don't support broadcasting, please use `expand`")
    refused = []
    for operator in (_Flash, _Cutlass):
        reasons = operator.not_supported_reasons(query, key, value, attn_bias)
        if not reasons:
            OPERATORS.append(operator.NAME)
            return _attend(query, key, value, attn_bias, scale)
        refused.append(f"`{operator.NAME}` is not supported because:\n    " + "\n    ".join(reasons))
    raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\n" + "\n".join(refused))


def memory_efficient_attention_forward_requires_grad(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | LowerTriangularMask | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: type[_Operator] | None = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-sum-exp of cutlass has rows to the next 32, filled with +inf."""
    assert op is not None, "the fake dispatches only without a log-sum-exp"
    if reasons := op.not_supported_reasons(query, key, value, attn_bias):
        raise ValueError(f"Operator `memory_efficient_attention` does not support inputs: {reasons}")
    output = memory_efficient_attention(query, key, value, attn_bias, p, scale)
    visible, bias = None, attn_bias
    if isinstance(attn_bias, LowerTriangularMask):
        visible, bias = arithmetic.causal_mask(query.shape[1], key.shape[1], bottom_right=False), None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k = query.transpose(1, 2), key.transpose(1, 2)
    lse = arithmetic.log_sum_exp(q, k, scale, visible, bias)  # type: ignore[arg-type]
    rows = 0 if op is _Flash else -lse.shape[2] % 32
    return output, torch.nn.functional.pad(lse, (0, rows), value=float("inf"))


def _attend(query, key, value, attn_bias, scale):  # type: ignore[no-untyped-def]
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = q.float() @ k.float().transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if isinstance(attn_bias, torch.Tensor):
        if attn_bias.dtype != query.dtype:
            raise RuntimeError("invalid dtype for bias - should match query's dtype")
        scores = scores + attn_bias.float()
    elif attn_bias is not None:
        causal = arithmetic.causal_mask(*scores.shape[-2:], bottom_right=False)
        scores = scores.masked_fill(~causal, float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(query.dtype).float()
    return (weights @ v.float()).to(query.dtype).transpose(1, 2)


_cpp_lib = ModuleType("xformers._cpp_lib")
_cpp_lib._built_with_cuda = True  # type: ignore[attr-defined]
_cpp_lib._cpp_library_load_exception = None  # type: ignore[attr-defined]


def modules() -> dict[str, ModuleType]:
    """The package, its part with the operators, and what it says about its compiled part."""
    package, ops, fmha = (ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha"))
    fmha.flash, fmha.cutlass = SimpleNamespace(FwOp=_Flash), SimpleNamespace(FwOp=_Cutlass)  # type: ignore[attr-defined]
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    ops.memory_efficient_attention_forward_requires_grad = memory_efficient_attention_forward_requires_grad  # type: ignore[attr-defined]
    ops.LowerTriangularMask, ops.fmha = LowerTriangularMask, fmha  # type: ignore[attr-defined]
    package.ops, package._cpp_lib = ops, _cpp_lib  # type: ignore[attr-defined]
    return {"xformers": package, "xformers._cpp_lib": _cpp_lib, "xformers.ops": ops, "xformers.ops.fmha": fmha}
