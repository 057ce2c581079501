"""What a mask hides, and the cheapest exact way to honour it: fewer keys where that says the same.

A mask that hides keys from every query is honoured by leaving those keys out: attention over fewer keys is faster, and
kernels that take no masks become eligible. `inspect` reads a mask's values once, with one read-back from the device;
`MaskPlan` (`values/mask_plan.py`) applies the result to a call.

A key is hidden by False, -inf, or a number of at most half the dtype's most negative one, in rows that keep a visible
key; other numbers are a bias. Rows that False or -inf leaves without a key give zeros, as in SDPA; rows of finite most
negative numbers give what SDPA gives, so a mask with such a row is left as it is. No kernel gets a call without keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..values.mask_plan import ALL, NOTHING_HIDDEN, MaskPlan, SubCall, passed_on, plan_of
from ..values.masks import visible_keys

if TYPE_CHECKING:
    import torch

MOST_BLOCKS = 16
"""Diagonal blocks up to which a block-diagonal mask becomes one call for each block. On the CPU more would pay, too: 64
are 8 to 34 times as fast as the mask (benchmarks/results/mask-limits-cpu.json). Where each call is a launch is not
measured."""


CPU_KEPT = 15 / 16
"""On the CPU, whose kernels all take masks, keys are gathered only if no more stay: with one key in 16 hidden a call is
7 to 9 % faster, with one in 32 3 to 6 % (benchmarks/results/mask-limits-cpu.json, one thread)."""


def inspect(mask: torch.Tensor, kv_len: int) -> MaskPlan:
    """Read a four-dimensional mask, broadcastable to (batch, num_heads, q_len, kv_len), and plan for it.

    Costs a few passes over the mask and one read-back from its device.
    """
    import torch

    small = _without_copies(mask)
    if small.shape[3] != kv_len or mask.dtype not in (torch.bool, torch.float16, torch.bfloat16, torch.float32):
        return passed_on(mask)
    if not small.numel():  # nothing to read, and no first key or sample to speak of
        return passed_on(mask)
    found = _read(small)
    if found.not_a_number or found.finite_row_without_key:
        return passed_on(mask)
    if found.uniform:
        return _uniform(small, found)
    return _varied(small, found)


@dataclass(frozen=True)
class _Found:
    """What one read-back tells of a mask of shape (b, h, q, k)."""

    not_a_number: bool
    biased: bool
    """A visible key has a number other than 0."""
    finite_row_without_key: bool
    uniform: bool
    """Every head and every query of a sample sees the same keys."""
    same_samples: bool
    spans: list[tuple[int, int, int]]
    """For each sample the first and last key that anything sees, and how many there are; (0, 0, 0) for none."""
    rows: list[tuple[int, int, int]]
    """The same for each query, where all samples and heads see alike; else empty."""
    seen: torch.Tensor
    """(b, k), the keys that some query sees."""


def _without_copies(mask: torch.Tensor) -> torch.Tensor:
    """The mask with dimensions that repeat the same memory cut to one."""
    for dimension in range(3):
        if mask.shape[dimension] > 1 and mask.stride(dimension) == 0:
            mask = mask.narrow(dimension, 0, 1)
    return mask


def _read(mask: torch.Tensor) -> _Found:
    import torch

    device = mask.device
    no = torch.zeros((), dtype=torch.bool, device=device)
    visible = visible_keys(mask)
    if mask.dtype == torch.bool:
        nan, biased, finite = no, no, no
    else:
        nan = mask.isnan().any()
        biased = (visible & (mask != 0)).any()
        finite = (~visible.any(3, keepdim=True) & (mask != float("-inf"))).any()
    seen = visible.flatten(1, 2).any(1)
    one = visible[:1, :1]
    flags = [nan, biased, finite, (visible == seen[:, None, None]).all(), (seen == seen[:1]).all()]
    flags.append((visible == one).all())
    numbers = [torch.stack(flags).long(), _spans(seen).flatten()]
    if visible.shape[2] > 1:
        numbers.append(_spans(one[0, 0]).flatten())
    values = torch.cat(numbers).tolist()  # the one read-back
    not_a_number, is_biased, finite_row, uniform, same_samples, same = map(bool, values[:6])
    spans = [(values[at], values[at + 1], values[at + 2]) for at in range(6, len(values), 3)]
    samples, rows = spans[: len(seen)], spans[len(seen) :] if same else []
    return _Found(not_a_number, is_biased, finite_row, uniform, same_samples, samples, rows, seen)


def _spans(visible: torch.Tensor) -> torch.Tensor:
    """(n, k) to (n, 3): first visible key, last visible key, number of visible keys."""
    import torch

    bits = visible.to(torch.uint8)
    last = visible.shape[1] - 1 - bits.flip(1).argmax(1)
    count = visible.sum(1)
    return torch.stack([bits.argmax(1), last * (count > 0), count], dim=1)


def _keys(span: tuple[int, int, int], kv_len: int, seen: torch.Tensor) -> torch.Tensor | slice | None:
    """How to take the visible keys: a view where they lie together."""
    first, last, count = span
    if count == 0:
        return None
    if count == kv_len:
        return ALL
    if last - first + 1 == count:
        return slice(first, last + 1)
    return seen.byte().argsort(descending=True, stable=True)[:count]


def _cut(mask: torch.Tensor, keys: torch.Tensor | slice | None) -> torch.Tensor:
    if isinstance(keys, slice):
        return mask[..., keys]
    return mask if keys is None else mask.index_select(3, keys)


def _uniform(mask: torch.Tensor, found: _Found) -> MaskPlan:
    kv_len = mask.shape[3]
    if found.same_samples:
        count = found.spans[0][2]
        keys = _keys(found.spans[0], kv_len, found.seen[0])
        scattered = not isinstance(keys, slice)
        if (
            keys is None
            or (keys == ALL and found.biased)
            or (scattered and mask.device.type == "cpu" and count > CPU_KEPT * kv_len)
        ):
            return passed_on(mask, only_hides=_only_hides(mask, found))
        left = _cut(mask, keys) if found.biased else None
        return plan_of(_word(keys), [SubCall(ALL, ALL, keys, left)])
    parts = []
    for sample, span in enumerate(found.spans):
        keys = _keys(span, kv_len, found.seen[sample])
        left = _cut(mask[sample : sample + 1], keys) if found.biased else None
        parts.append(SubCall(slice(sample, sample + 1), ALL, keys, left))
    return plan_of("per sample", parts)


def _word(keys: torch.Tensor | slice) -> str:
    if isinstance(keys, slice):
        return NOTHING_HIDDEN if keys == ALL else "trimmed"
    return "gathered"


def _varied(mask: torch.Tensor, found: _Found) -> MaskPlan:
    """Queries, heads or samples see different keys: what no query sees is cut off, the rest is a pattern or a mask."""
    kv_len = mask.shape[3]
    some = [span for span in found.spans if span[2]]
    first, last = min(span[0] for span in some), max(span[1] for span in some)
    rows = [] if found.biased else found.rows
    together = all(last - first + 1 == count for first, last, count in rows if count)
    pattern = _pattern(rows, first, last) if rows and together else ""
    if pattern == "causal":
        keys = slice(first, last + 1) if last - first + 1 < kv_len else ALL
        return plan_of("causal", [SubCall(ALL, ALL, keys, None, True)])
    if rows and together:
        blocks = _blocks(rows)
        if len(blocks) <= MOST_BLOCKS:
            parts = [
                SubCall(ALL, span, None if not count else slice(first, last + 1))
                for span, (first, last, count) in blocks
            ]
            return plan_of("per block", parts)
    only_hides = _only_hides(mask, found)
    if last - first + 1 == kv_len:
        return passed_on(mask, pattern, only_hides=only_hides)
    keys = slice(first, last + 1)
    return plan_of("trimmed", [SubCall(ALL, ALL, keys, _cut(mask, keys))], pattern, only_hides)


def _only_hides(mask: torch.Tensor, found: _Found) -> bool:
    return mask.dtype.is_floating_point and not found.biased


def _pattern(rows: list[tuple[int, int, int]], first: int, last: int) -> str:
    """The name of what the queries see, each a run of keys; empty for no pattern with a name."""
    kept, queries = last - first + 1, len(rows)
    ends = [row[1] - first - at for at, row in enumerate(rows)]
    if all(row[2] for row in rows) and all(row[0] == first for row in rows) and len(set(ends)) == 1:
        if kept == queries and ends[0] == 0:
            return "causal"
        return "causal, bottom right" if ends[0] == kept - queries else ""
    if kept == queries and all(row[2] for row in rows):
        before = max(at - row[0] + first for at, row in enumerate(rows))
        after = max(row[1] - first - at for at, row in enumerate(rows))
        wanted = [(max(0, at - before) + first, min(kept - 1, at + after) + first) for at in range(queries)]
        if before >= 0 and after >= 0 and all(row[:2] == span for row, span in zip(rows, wanted, strict=True)):
            return f"sliding window, {before} before and {after} after"
    return ""


def _blocks(rows: list[tuple[int, int, int]]) -> list[tuple[slice, tuple[int, int, int]]]:
    """Neighbouring queries that see the same run of keys, as one block each."""
    blocks: list[tuple[slice, tuple[int, int, int]]] = []
    for at, row in enumerate(rows):
        if blocks and blocks[-1][1] == row:
            blocks[-1] = (slice(blocks[-1][0].start, at + 1), row)
        else:
            blocks.append((slice(at, at + 1), row))
    return blocks
