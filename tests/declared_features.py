"""The calls that a backend says it takes, one for each thing that it declares, from its `Limits`.

Each label names what the call is about. What is declared and yet refused, and what cannot be told from its absence,
is a fault of its own (test_declared_numerics.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from attention_backends.backends.kernels.backend import FLOATING
from attention_backends.backends.sparse.method import Grid
from attention_backends.backends.values.grid import TokenGrid
from attention_backends.backends.values.limits import (
    Causal,
    Dtypes,
    GroupedHeads,
    HeadDimIn,
    KeyLength,
    Limits,
    Masks,
    MaskWithCausal,
    Scale,
    ValueHeadDim,
)
from attention_backends.backends.values.request import AttentionCall, AttentionRequest
from attention_calls import call_for

HEAD_DIMS = (64, 128, 40, 72, 96, 80, 160, 256, 32, 16)
"""Sizes to try, the usual ones first."""

FORMS = {
    "key_padding": ((2, 1, 1, 64), (1, 1, 1, 64)),
    "bool": ((2, 1, 48, 64), (1, 1, 48, 64), (2, 4, 48, 64)),
    "bias": ((1, 4, 48, 64), (2, 1, 48, 64), (2, 4, 48, 64), (1, 1, 1, 64)),
}
"""Shapes of masks of each kind for a batch of 2, 4 heads, 48 queries and 64 keys."""


class Feature(NamedTuple):
    """A call, and what it is about."""

    label: str
    request: AttentionRequest
    mask: tuple[int, ...] = ()
    """The shape of its mask; empty for that of `call_for`."""
    strided: bool = False
    """Query, key and value are views of (batch, length, heads, head_dim)."""
    declared: bool = True
    """The limits say that it is taken; else it is a combination that may be refused."""

    def call(self) -> AttentionCall:
        call = call_for(self.request)
        if self.mask:
            call.attn_mask = mask_of(self.request.mask, self.mask, call.query.dtype)
        if self.strided:
            for name in ("query", "key", "value"):
                tensor = getattr(call, name)
                setattr(call, name, tensor.transpose(1, 2).contiguous().transpose(1, 2))
        return call


def mask_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A mask whose samples, heads and rows differ where it has them; every row keeps a key."""
    random = torch.Generator().manual_seed(1)
    if kind == "bias":
        return (torch.randn(shape, generator=random) * 3).to(dtype)
    visible = torch.rand(shape, generator=random) > 0.5
    visible[..., 0] = True
    return visible


def features(limits: Limits, only: int | None = None) -> Iterator[Feature]:
    """One call, or a few, for each thing that these limits declare, in each dtype, or in the one of a number alone."""
    dtypes = [dtype for dtype in limits[Dtypes].names if dtype in FLOATING]
    only_sizes, causal, wide = limits.get(HeadDimIn), limits[Causal], limits[ValueHeadDim].may_differ
    own_sizes = only_sizes.sizes if only_sizes else ()
    for dtype in dtypes if only is None else dtypes[only % len(dtypes) :][:1]:
        bases = [AttentionRequest(2, 4, 48, 64, size, dtype) for size in (*own_sizes, *HEAD_DIMS)]
        if limits.get(Grid):
            bases = [base._replace(q_len=64, grid=TokenGrid(1, 1, 64)) for base in bases]
        able = [request for request in bases if not limits.reasons(request)]
        if not able:
            yield Feature(f"{dtype}: any call", AttentionRequest(2, 4, 48, 64, 64, dtype))
            continue
        base = able[0]
        square = base._replace(q_len=64)
        yield Feature(f"{dtype}: plain", base)
        yield Feature(f"{dtype}: views", base, strided=True)
        for request in dict.fromkeys((able[0], max(able, key=_head_dim), min(able, key=_head_dim))):
            yield Feature(f"{dtype}: head_dim {request.head_dim}", request._replace(batch=1))
        for lengths in ((1, 64), (48, 77), (130, 192), (3, limits[KeyLength].min)):
            yield Feature(
                f"{dtype}: lengths {lengths}", base._replace(q_len=lengths[0], kv_len=lengths[1]), declared=False
            )
        masks = [mask for mask in limits[Masks].kinds if mask != "none"]
        for mask in masks:
            for shape in FORMS[mask]:
                yield Feature(f"{dtype}: mask {mask} {shape}", base._replace(mask=mask), shape)
        scaled = {"scale": 0.6 / base.head_dim**0.5 * 4}
        grouped, alone = {"num_kv_heads": 2}, {"num_kv_heads": 1}
        asked: list[tuple[str, bool, AttentionRequest, dict[str, object]]] = [
            ("scale", limits[Scale].taken, base, scaled),
            ("grouped heads", limits[GroupedHeads].taken, base, grouped),
            ("grouped heads, one key head", limits[GroupedHeads].taken, base, alone),
            ("causal", causal.taken, square, {"is_causal": True}),
            ("causal, fewer keys", causal.lengths == "any", square, {"is_causal": True, "q_len": 90}),
            ("causal, more keys", causal.lengths == "any", base, {"is_causal": True}),
            ("wider values", wide, base, {"v_head_dim": base.head_dim + 16}),
            ("narrower values", wide, base, {"v_head_dim": base.head_dim - 16}),
        ]
        for label, declared, request, changes in asked:
            if declared:
                yield Feature(f"{dtype}: {label}", request._replace(**changes))
        pairs = [
            (f"{first[0]} and {second[0]}", first[2]._replace(**first[3])._replace(**second[3]))
            for first, second in ((asked[3], asked[0]), (asked[3], asked[1]), (asked[0], asked[1]))
        ]
        for label, request in pairs:
            yield Feature(f"{dtype}: {label}", request, declared=False)
        for mask in masks:
            for label, _, _, changes in asked[:3]:
                yield Feature(f"{dtype}: mask {mask} and {label}", base._replace(mask=mask, **changes), declared=False)
            request = square._replace(mask=mask, is_causal=True)
            yield Feature(
                f"{dtype}: mask {mask} and causal", request, declared=causal.taken and limits[MaskWithCausal].taken
            )


def without(feature: Feature) -> Iterator[tuple[str, AttentionCall]]:
    """The same call with one thing dropped or misread, for each thing that it has."""
    for name, changes in (("mask", {"attn_mask": None}), ("causal", {"is_causal": False}), ("scale", {"scale": None})):
        call = feature.call()
        ((field, nothing),) = changes.items()
        if getattr(call, field) not in (None, False) if field != "attn_mask" else call.attn_mask is not None:
            setattr(call, field, nothing)
            yield name, call
    if feature.request.num_kv_heads == 2:
        call = feature.call()
        call.key, call.value = (tensor.repeat(1, 2, 1, 1) for tensor in (call.key, call.value))  # heads in turns
        call.enable_gqa = False
        yield "grouping of heads", call


def _head_dim(request: AttentionRequest) -> int:
    return request.head_dim
