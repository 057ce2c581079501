"""The small calls that a probe runs, and the check of an output.

Boundary: a router and a call in, an `Outcome` out; the processes around it are in `probe.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..engine.router import Router
from ..kernels.backend import HALF, Backend
from ..kernels.reference import reference_attention
from ..measure.device_clock import timed
from ..measure.error import relative_l2
from ..measure.remembered import Outcome
from ..values.platform import Platform
from ..values.request import AttentionCall, AttentionRequest
from ..values.tolerance import EARNED

if TYPE_CHECKING:
    import torch


def problems() -> Iterator[AttentionRequest]:
    """Small calls, the best test first: half precision, and keys that fill no block."""
    for dtype in (*HALF, "float32"):
        for kv_len in (200, 256):
            for head_dim in (64, 128):
                yield AttentionRequest(batch=1, num_heads=2, q_len=256, kv_len=kv_len, head_dim=head_dim, dtype=dtype)


def harder(backend: Backend, platform: Platform, plain: AttentionRequest) -> list[AttentionRequest]:
    """The same call with features that a build may silently drop: a mask, grouped heads, a scale, causality.

    As many of them as the backend takes, one after another; several in one call where it takes them together.
    """
    kv_heads: dict[str, object] = {"num_heads": 4, "num_kv_heads": 2}
    wanted: list[dict[str, object]] = [
        {**kv_heads, "scale": 0.05, "mask": "key_padding"},
        {**kv_heads, "scale": 0.05, "is_causal": True, "kv_len": plain.q_len},
        {"mask": "key_padding"},
        {"mask": "bool"},
        kv_heads,
        {"scale": 0.05},
        {"is_causal": True, "kv_len": plain.q_len},
    ]
    taken: list[AttentionRequest] = []
    covered: set[str] = set()
    for changes in wanted:
        request = plain._replace(**changes)  # type: ignore[arg-type]  # each value has its field's type
        new = {name for name in ("mask", "num_kv_heads", "scale", "is_causal") if name in changes} - covered
        if new and not backend.unsupported_reasons(request, platform):
            taken.append(request)
            covered |= new
    return taken


def tried(router: Router, backend: Backend, request: AttentionRequest, device: torch.device) -> Outcome:
    """Run one call and compare it.

    Raises:
        Exception: whatever the kernel raises.
    """
    import torch

    call = call_of(request)
    query, key, value, mask = call.query, call.key, call.value, call.attn_mask
    moved = call.changed(
        query=query.to(device, copy=True),
        key=key.to(device, copy=True),
        value=value.to(device, copy=True),
        attn_mask=None if mask is None else mask.to(device),
    )
    output, ms = timed(device, router.kernel(backend.id), moved)
    output = output.cpu()
    after = [tensor.cpu() for tensor in (moved.query, moved.key, moved.value)]
    reason, error_of = compare(output, call, backend, router.platform)
    same = all(map(torch.equal, after, (query, key, value)))
    if not reason and not same:
        reason = "wrong: it changed its inputs"
    return Outcome("failed" if reason else "ok", reason, error_of, round(ms, 3))


def call_of(request: AttentionRequest) -> AttentionCall:
    """A problem as a call on the CPU; a mask hides the last third of the keys, kind bool one key less in odd rows.

    Kind bias also lowers the scores of the other keys, by a number that grows with the key's place.
    """
    import torch

    query, key, value = tensors(request)
    mask = None
    if request.mask != "none":
        visible = torch.arange(request.kv_len) < request.kv_len * 2 // 3
        mask = visible.expand(1, 1, 1, -1).contiguous()
        if request.mask == "bool":
            rows = torch.arange(request.q_len)[:, None] % 2
            mask = (torch.arange(request.kv_len)[None] < request.kv_len * 2 // 3 + rows)[None, None]
        if request.mask == "bias":
            lowered = (torch.arange(request.kv_len) / -64).to(query.dtype).masked_fill(~visible, float("-inf"))
            mask = lowered.expand(1, 1, request.q_len, -1).contiguous()
    return AttentionCall(query, key, value, mask, request.is_causal, request.scale, request.grouped)


def tensors(request: AttentionRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of a problem, normal random numbers from one seed, on the CPU."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def rand(length: int, heads: int) -> torch.Tensor:
        shape = (request.batch, heads, length, request.head_dim)
        return torch.randn(shape, generator=generator).to(getattr(torch, request.dtype))

    kv_heads = request.num_kv_heads or request.num_heads
    return rand(request.q_len, request.num_heads), rand(request.kv_len, kv_heads), rand(request.kv_len, kv_heads)


def compare(
    output: torch.Tensor, call: AttentionCall, backend: Backend, platform: Platform
) -> tuple[str, float | None]:
    """What is wrong with an output, empty if nothing, and its relative L2 distance from float64; all on the CPU.

    By `values/tolerance.py`: an exact kernel may err a few times as much as plain arithmetic in its dtype. A sparse
    kernel only has to give finite output: on random numbers, skipped keys matter fully.
    """
    wide = call.changed(query=call.query.double(), key=call.key.double(), value=call.value.double())
    expected = reference_attention(wide)
    if output.shape != expected.shape:
        return f"wrong: output {tuple(output.shape)} is not {tuple(expected.shape)}", None
    if not output.isfinite().all():
        kind = "NaN" if output.isnan().any() else "infinite numbers"
        return f"wrong: {kind} in the output", None

    found = relative_l2(output, expected)
    arithmetic = backend.arithmetic_on(platform)
    limit = backend.tolerance_on(platform).relative_l2 if backend.accuracy != "sparse" else float("inf")
    if backend.accuracy == "exact":
        limit = min(limit, EARNED[arithmetic] * relative_l2(_in_steps(call), expected))
    return (f"wrong: relative L2 {found:.1e} > {limit:.1e}" if found > limit else ""), found


def _in_steps(call: AttentionCall) -> torch.Tensor:
    """Attention with every step rounded to the dtype of the call."""
    import torch

    group = call.query.shape[1] // call.key.shape[1]
    key, value = call.key.repeat_interleave(group, 1), call.value.repeat_interleave(group, 1)
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = call.query @ key.transpose(-2, -1) * scale
    visible = call.attn_mask
    if call.is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf")) if visible.dtype == torch.bool else scores + visible
    attended: torch.Tensor = scores.softmax(dim=-1) @ value
    return attended
