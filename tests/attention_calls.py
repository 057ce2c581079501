"""Attention calls made from their facts, the same for every backend that is tested on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from attention_backends.backends.values.request import AttentionCall, AttentionRequest


@contextmanager
def as_comfyui_runs() -> Iterator[None]:
    """Under inference_mode. On one thread: on tensors this small, threads wait for each other ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


def call_for(request: AttentionRequest, device: str = "cpu", seed: int = 0) -> AttentionCall:
    """Random tensors with the facts of `request`, the same for every dtype up to rounding.

    Keys have a mean over tokens, as in real models: smoothing it away, or forgetting to, then shows.
    """
    random = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, request.dtype)
    kv_heads = request.num_kv_heads or request.num_heads

    def tensor(heads: int, length: int, size: int) -> torch.Tensor:
        return torch.randn(request.batch, heads, length, size, generator=random)

    query = tensor(request.num_heads, request.q_len, request.head_dim)
    key = tensor(kv_heads, request.kv_len, request.head_dim) + tensor(kv_heads, 1, request.head_dim)
    value = tensor(kv_heads, request.kv_len, request.v_head_dim or request.head_dim)
    mask = _mask(request, random)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    return AttentionCall(
        query.to(device, dtype),
        key.to(device, dtype),
        value.to(device, dtype),
        None if mask is None else mask.to(device),
        is_causal=request.is_causal,
        scale=request.scale,
        enable_gqa=request.grouped,
    )


def _mask(request: AttentionRequest, random: torch.Generator) -> torch.Tensor | None:
    """A mask of the request's kind that leaves every query some keys; two fifths of them are hidden."""
    if request.mask == "none":
        return None
    if request.mask == "key_padding":
        mask = torch.ones(request.batch, 1, 1, request.kv_len, dtype=torch.bool)
        for sample in range(request.batch):
            mask[sample, ..., request.kv_len * 3 // (5 + sample) :] = False
        return mask
    if request.mask == "bool":
        mask = torch.rand(request.batch, 1, request.q_len, request.kv_len, generator=random) > 0.4
        mask[..., 0] = True
        return mask
    return torch.randn(1, request.num_heads, request.q_len, request.kv_len, generator=random) * 2


def copied(call: AttentionCall) -> AttentionCall:
    """The same call on memory of its own."""
    return AttentionCall(
        call.query.clone(),
        call.key.clone(),
        call.value.clone(),
        call.attn_mask,
        is_causal=call.is_causal,
        scale=call.scale,
        enable_gqa=call.enable_gqa,
    )


def cast(call: AttentionCall, dtype: torch.dtype) -> AttentionCall:
    """The same call in another dtype; a boolean mask stays."""
    mask = call.attn_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    return AttentionCall(
        call.query.to(dtype),
        call.key.to(dtype),
        call.value.to(dtype),
        mask,
        is_causal=call.is_causal,
        scale=call.scale,
        enable_gqa=call.enable_gqa,
    )
