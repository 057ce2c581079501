"""How far an output may be from attention in float64: a few times what arithmetic of its class costs there.

Nothing is typed in. For an exact kernel the measure is the error of plain matrix arithmetic in the input's dtype, on
the very tensors of the call; for a quantised one the error of exact attention on tensors rounded as it rounds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from attention_backends.backends.kernels.emulated_int8 import KEY_BLOCK, QUERY_BLOCK, round_trip
from attention_backends.backends.kernels.reference import reference_attention
from attention_backends.backends.kernels.support.sdpa import expand_kv
from attention_backends.backends.values.request import AttentionCall
from attention_backends.backends.values.tolerance import EARNED
from attention_calls import cast
from fakes.arithmetic import fp4_blocks, fp4_weights, fp8_channels, fp8_weights, int8_channels, int8_weights

FLOOR = 8.0
"""Allowed in any case: this many roundings of the output's dtype."""


class Error(NamedTuple):
    """How far an output is off, relative to the length of a typical row: all rows together, and the worst one."""

    total: float
    worst_row: float

    def within(self, limit: Error) -> bool:
        return self.total <= limit.total and self.worst_row <= limit.worst_row


def truth(call: AttentionCall) -> torch.Tensor:
    """The call in float64, from the tensors as the kernel gets them."""
    return reference_attention(cast(call, torch.float64))


def error(output: torch.Tensor, expected: torch.Tensor) -> Error:
    """The distance of `output` from `expected`; infinite where it has NaN."""
    rows = (output.double() - expected).norm(dim=-1)
    typical = expected.norm(dim=-1).square().mean().sqrt().clamp(min=1e-30)
    relative = (rows / typical).nan_to_num(float("inf"))
    return Error(float(relative.square().mean().sqrt()), float(relative.max()))


def allowed(call: AttentionCall, arithmetic: str) -> Error:
    """The largest `error` that a kernel of this arithmetic (backends/values/tolerance.py) may make on `call`.

    `exact` stands for `half`: plain arithmetic in the dtype of the call.
    """
    expected = truth(call)
    plain = error(_plain(call), expected)
    emulations = {"int8": _int8, "fp8": _int8_fp8, "fp4": _fp4}
    rounding = error(emulations[arithmetic](call), expected) if arithmetic in emulations else Error(0.0, 0.0)
    if arithmetic in emulations and call.query.dtype.itemsize > 2:  # they give back what they computed in half types
        rounding = Error(*map(max, rounding, error(expected.bfloat16(), expected)))
    factor, floor = EARNED["half" if arithmetic == "exact" else arithmetic], FLOOR * torch.finfo(call.query.dtype).eps
    return Error(*(factor * (one + two) + floor for one, two in zip(plain, rounding, strict=True)))


def _plain(call: AttentionCall) -> torch.Tensor:
    """softmax(Q K^T scale + mask) V, every step rounded to the input's dtype."""
    key, value = expand_kv(call)
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = (call.query @ key.transpose(-2, -1)) * scale
    if call.attn_mask is not None and call.attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~call.attn_mask, float("-inf"))
    elif call.attn_mask is not None:
        scores = scores + call.attn_mask.to(scores.dtype)
    if call.is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, dim=-1).nan_to_num(0.0) @ value


def _quantised(
    call: AttentionCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    round_weights: Callable[[torch.Tensor], torch.Tensor] = lambda weights: weights,
) -> torch.Tensor:
    """Exact attention on rounded tensors, with the softmax weights rounded too."""
    heads = call.query.shape[1]
    identity = torch.eye(key.shape[2], device=key.device).expand(key.shape[0], key.shape[1], -1, -1)
    weights = reference_attention(
        AttentionCall(
            query.double(),
            key.double(),
            identity.double(),
            cast(call, torch.float64).attn_mask,
            is_causal=call.is_causal,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
        )
    )
    values = value.double().repeat_interleave(heads // value.shape[1], dim=1)
    return round_weights(weights.float()).double() @ values


def _smooth(key: torch.Tensor) -> torch.Tensor:
    return key.float() - key.float().mean(dim=2, keepdim=True)


def _int8(call: AttentionCall) -> torch.Tensor:
    """Weights and values too, as one of these kernels has them; the others keep them in a half type."""
    query, key = round_trip(call.query.float(), QUERY_BLOCK), round_trip(_smooth(call.key), KEY_BLOCK)
    return _quantised(call, query, key, int8_channels(call.value), int8_weights)


def _int8_fp8(call: AttentionCall) -> torch.Tensor:
    query, key = round_trip(call.query.float(), QUERY_BLOCK), round_trip(_smooth(call.key), KEY_BLOCK)
    return _quantised(call, query, key, fp8_channels(call.value), fp8_weights)


def _fp4(call: AttentionCall) -> torch.Tensor:
    value = fp4_blocks(call.value.transpose(-2, -1)).transpose(-2, -1)
    return _quantised(call, fp4_blocks(call.query), fp4_blocks(_smooth(call.key)), value, fp4_weights)
