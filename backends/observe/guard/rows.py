"""The guard's arithmetic: draws rows, computes their exact attention in float32, and the error of an output.

No state and no synchronisation: row indices are on the host, figures stay on the device.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import NamedTuple

import torch

from ...report.findings import ROWS
from ...values.request import AttentionCall

LAST = 2
"""Checked rows at the end: errors are likeliest in a kernel's partial last block."""
MOST_SAMPLES = 8
"""Most samples of a batch that are checked, evenly spread."""
WORKSPACE = 4 * 2**20
"""Bytes of a chunk's keys, values and scores in float32, on the CPU."""
WORKSPACE_ELSEWHERE = 32 * 2**20
"""The same on an accelerator, where a chunk is a dozen launches."""
SMALL_HEAD = 0.1
"""Floor for a head's norm, as a share of the call's mean norm, when computing relative error."""
SPREAD = 12.0
"""Judge the mask only if its effect exceeds this many standard deviations of the kernel's error."""


class Figures(NamedTuple):
    """The figures of one check; a tensor of these numbers while on the device."""

    relative_l2: float
    """||error|| / ||expected|| of the worst head of a sample."""
    row_error: float
    cosine: float
    unmasked: float
    """0: the output is the masked result; 1: the result without the mask; 0 if the effect is too small to judge."""
    changed: float
    """1: the kernel changed query, key or value."""
    finite: float
    """1: the exact rows are finite; 0: the inputs were not, and the check is ignored."""
    call_l2: float
    """Relative L2 of all heads and samples together."""
    head: float
    """Index of the worst head."""


def spread(length: int, source: random.Random, count: int = ROWS) -> list[int]:
    """`count` distinct rows in rising order: the last ones, and a random one from each equal part of the others."""
    if length <= count:
        return list(range(length))
    others = length - LAST
    bounds = [part * others // (count - LAST) for part in range(count - LAST + 1)]
    rows = [source.randrange(first, last) for first, last in pairwise(bounds)]
    return rows + list(range(others, length))


class SampledRows(NamedTuple):
    """The sampled indices of one check: samples of the batch, rows of the query, rows of key and value."""

    samples: slice
    rows: list[int]
    keys: list[int]

    @classmethod
    def draw(cls, call: AttentionCall, source: random.Random) -> SampledRows:
        step = -(-call.query.shape[0] // MOST_SAMPLES)
        samples = slice(source.randrange(step) if step > 1 else 0, None, step)
        return cls(samples, spread(call.query.shape[2], source), spread(call.key.shape[2], source))

    def inputs(self, call: AttentionCall) -> list[torch.Tensor]:
        """Copies of the sampled rows of query, key and value, each (samples, heads, rows, head_dim)."""
        tensors = ((call.query, self.rows), (call.key, self.keys), (call.value, self.keys))
        return [take(tensor[self.samples], rows) for tensor, rows in tensors]


def take(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """A copy of these rows of dimension 2, by slices: an index tensor would be copied to the device."""
    with torch.autocast(tensor.device.type, enabled=False):  # it may refuse to concatenate this dtype
        return torch.cat([tensor[:, :, row : row + 1] for row in rows], dim=2)


class _Sums:
    """Online softmax over chunks of keys (Milakov and Gimelshein, arXiv:1805.02867)."""

    def __init__(self) -> None:
        self.most: torch.Tensor | None = None
        self.size = self.total = torch.zeros(())

    def add(self, scores: torch.Tensor, value: torch.Tensor) -> None:
        """Add scores (..., rows, keys), which are overwritten, and values (..., keys, head_dim)."""
        lowest = torch.finfo(scores.dtype).min  # not -inf: a row without a key would become NaN
        most = scores.amax(dim=-1, keepdim=True).clamp_(min=lowest)
        if self.most is not None:
            most = torch.maximum(most, self.most)
        weights = scores.sub_(most).exp_()
        size, total = weights.sum(dim=-1, keepdim=True), weights @ value
        if self.most is not None:
            shrink = (self.most - most).exp_()
            size, total = torch.addcmul(size, self.size, shrink), torch.addcmul(total, self.total, shrink)
        self.most, self.size, self.total = most, size, total

    def result(self) -> torch.Tensor:
        return self.total / self.size.clamp(min=1e-30)


def exact_rows(
    call: AttentionCall, sampled: SampledRows, query_rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Exact attention of the sampled rows in float32, and the same rows without the mask.

    Args:
        query_rows: (samples, num_heads, rows, head_dim), if they were copied already.

    Returns:
        Two tensors (samples, num_heads, rows, v_head_dim); the second is None without a mask. Rows without a visible
        key are zeros.
    """
    with torch.autocast(call.query.device.type, enabled=False):  # it would compute in half precision
        return _exact_rows(call, sampled, query_rows)


def _exact_rows(
    call: AttentionCall, sampled: SampledRows, query_rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    query, key, value = (tensor[sampled.samples] for tensor in (call.query, call.key, call.value))
    batch, heads, _, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    scale = head_dim**-0.5 if call.scale is None else call.scale
    count = len(sampled.rows)
    chosen = (take(query, sampled.rows) if query_rows is None else query_rows).float() * scale
    chosen = chosen.reshape(
        batch, kv_heads, heads // kv_heads * count, head_dim
    )  # query heads of a group share their keys
    mask = _mask_rows(call, sampled)
    positions = None
    if call.is_causal:  # filled on the device: a list would be copied to it
        positions = torch.cat([torch.full((1, 1), row, device=query.device) for row in sampled.rows])
    is_masked = mask is not None or positions is not None
    per_key = 4 * batch * (kv_heads * (head_dim + value.shape[3]) + heads * count * (2 if is_masked else 1))
    step = max(64, (WORKSPACE if query.device.type == "cpu" else WORKSPACE_ELSEWHERE) // per_key)
    sums, plain = _Sums(), _Sums()
    for first in range(0, kv_len, step):
        last = min(first + step, kv_len)
        scores = chosen @ key[:, :, first:last].float().transpose(-2, -1)
        values = value[:, :, first:last].float()
        if is_masked:
            plain.add(scores.clone(), values)
            _hide(scores.view(batch, heads, count, last - first), mask, positions, first, last)
        sums.add(scores, values)
    shape = (batch, heads, count, value.shape[3])
    return sums.result().view(shape), plain.result().view(shape) if is_masked else None


def _mask_rows(call: AttentionCall, sampled: SampledRows) -> torch.Tensor | None:
    mask = call.attn_mask
    if mask is None:
        return None
    if mask.shape[0] > 1:
        mask = mask[sampled.samples]
    return take(mask, sampled.rows) if mask.shape[2] > 1 else mask


def _hide(
    scores: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None, first: int, last: int
) -> None:
    """Apply the mask of keys `first` to `last` to scores (samples, heads, rows, keys), in place."""
    if mask is not None:
        part = mask[..., first:last] if mask.shape[3] > 1 else mask
        if part.dtype == torch.bool:
            scores.masked_fill_(~part, float("-inf"))
        else:
            scores.add_(part)
    if positions is not None:
        keys = torch.arange(first, last, device=scores.device)
        scores.masked_fill_(keys > positions, float("-inf"))


def compared(
    output: torch.Tensor, expected: torch.Tensor, unmasked_rows: torch.Tensor | None, changed: torch.Tensor
) -> torch.Tensor:
    """`Figures` as a tensor on the device, from output and exact rows (samples, num_heads, rows, v_head_dim)."""
    output = output.float()
    error = output - expected
    row_errors = error.square().sum(dim=-1)
    energy = expected.square().sum(dim=-1).mean(dim=-1)
    mean_energy = energy.mean()
    typical = torch.maximum(energy, SMALL_HEAD**2 * mean_energy).clamp_(min=1e-30)
    both = (output * expected).sum(dim=(-2, -1))
    sizes = (output.square().sum(dim=(-2, -1)) * energy).mul_(expected.shape[2]).sqrt()
    cosine = torch.where(energy > 1e-30, both / sizes.clamp(min=1e-30), 1.0)
    unmasked = torch.zeros((), device=error.device)
    if unmasked_rows is not None:
        effect = unmasked_rows - expected
        size = effect.square().sum()
        telling = size * error.numel() > SPREAD**2 * (error.square().sum() - size).clamp(min=0)
        unmasked = torch.where(telling & (size > 0), (error * effect).sum() / size.clamp(min=1e-30), 0.0)
    head_errors = row_errors.mean(dim=-1)
    worst, head = (head_errors / typical).amax(dim=0).max(dim=0)
    return torch.stack(
        [
            worst.sqrt(),
            (row_errors / typical[..., None]).amax().sqrt(),
            cosine.amin(),
            unmasked,
            changed.float(),
            expected.isfinite().all().float(),
            (head_errors.mean() / mean_energy.clamp(min=1e-30)).sqrt(),
            head.float(),
        ]
    )


def differ(before: list[torch.Tensor], after: list[torch.Tensor]) -> torch.Tensor:
    """Whether any bit of these tensors differs, as a flag on the device. NaN equals NaN."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flags = [
        (old.view(kinds[old.element_size()]) != new.view(kinds[new.element_size()])).any()
        for old, new in zip(before, after, strict=True)
    ]
    return torch.stack(flags).any()
