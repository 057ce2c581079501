"""Reads a mask and returns the cheapest exact `MaskPlan`: trimmed or gathered keys, sub-calls, or the mask unchanged.

Keys that are hidden from every query are left out: attention over fewer keys is faster, and kernels without masks
become eligible. `inspect` reads a mask with one read-back from the device; `MaskPlan` (`values/mask_plan.py`) applies
the result to a call.

A key is hidden by False, -inf, or a number of at most half the dtype's most negative one, in rows that keep a visible
key; other numbers are a bias. Rows that False or -inf leaves without a key give zeros, as in SDPA. A mask with a row of
finite most negative numbers is not changed, so that SDPA's result for it stays. No kernel gets a call without keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..values.limits import FLOATING
from ..values.mask_plan import ALL, NOTHING_HIDDEN, MaskPlan, SubCall, passed_on, plan_of
from ..values.masks import stored_once, visible_keys

if TYPE_CHECKING:
    import torch

MOST_BLOCKS = 16
"""Most blocks of a block-diagonal mask that run as one sub-call each. On the CPU more would pay: 64 are 8 to 34 times
as fast as the mask (benchmarks/results/mask-limits-cpu.json). Not measured on accelerators, where each is a launch."""


CPU_KEPT = 15 / 16
"""On the CPU, whose kernels all take masks, keys are gathered only up to this visible share: with one key in 16 hidden
a call is 7 to 9 % faster, with one in 32 3 to 6 % (benchmarks/results/mask-limits-cpu.json, one thread)."""


def inspect(mask: torch.Tensor, kv_len: int, on_grid: bool = False) -> MaskPlan:
    """The plan for a mask (batch, num_heads, q_len, kv_len), with 1 where it is broadcast.

    Costs a few passes over the mask and one read-back. A mask of another dtype or length is passed on.
    """

    small = stored_once(mask)
    if small.shape[3] != kv_len or str(mask.dtype).removeprefix("torch.") not in ("bool", *FLOATING):
        return passed_on(mask)
    if not small.numel():  # of size 0
        return passed_on(mask)
    facts = _read(small, on_grid)
    if facts.not_a_number or facts.finite_row_without_key:
        return passed_on(mask)
    if facts.uniform:
        return _uniform(small, facts, on_grid)
    return _varied(small, facts)


@dataclass(frozen=True)
class _MaskFacts:
    """Facts of a mask of shape (b, h, q, k), from one read-back."""

    not_a_number: bool
    biased: bool
    """A visible key has a number other than 0."""
    finite_row_without_key: bool
    uniform: bool
    """All heads and queries of a sample see the same keys."""
    same_samples: bool
    spans: list[tuple[int, int, int]]
    """Per sample: first visible key, last visible key, number of visible keys; (0, 0, 0) for none."""
    inner: list[tuple[int, int]]
    """With `on_grid`, per sample: where the first run of visible keys ends, and where the last one begins."""
    rows: list[tuple[int, int, int]]
    """The same per query, where all samples and heads see the same keys; else empty."""
    seen: torch.Tensor
    """(b, k): keys that at least one query sees."""


def _read(mask: torch.Tensor, on_grid: bool) -> _MaskFacts:
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
    first_head = visible[:1, :1]
    flags = [nan, biased, finite, (visible == seen[:, None, None]).all(), (seen == seen[:1]).all()]
    flags.append((visible == first_head).all())
    numbers = [torch.stack(flags).long(), _spans(seen).flatten()]
    if visible.shape[2] > 1:
        numbers.append(_spans(first_head[0, 0]).flatten())
    if on_grid:
        numbers.append(_inner(seen).flatten())
    values = torch.cat(numbers).tolist()  # the only read-back
    not_a_number, is_biased, finite_row, uniform, same_samples, same = map(bool, values[:6])
    end = len(values) - (2 * len(seen) if on_grid else 0)
    spans = [(values[at], values[at + 1], values[at + 2]) for at in range(6, end, 3)]
    inner = [(values[at], values[at + 1]) for at in range(end, len(values), 2)]
    samples, rows = spans[: len(seen)], spans[len(seen) :] if same else []
    return _MaskFacts(not_a_number, is_biased, finite_row, uniform, same_samples, samples, inner, rows, seen)


def _spans(visible: torch.Tensor) -> torch.Tensor:
    """(n, k) to (n, 3): first visible key, last visible key, number of visible keys."""
    import torch

    bits = visible.to(torch.uint8)
    last = visible.shape[1] - 1 - bits.flip(1).argmax(1)
    count = visible.sum(1)
    return torch.stack([bits.argmax(1), last * (count > 0), count], dim=1)


def _inner(visible: torch.Tensor) -> torch.Tensor:
    """(n, k) to (n, 2): the first hidden key after a visible one, and one past the last hidden key before one."""
    import torch

    keys = visible.shape[1]
    place = torch.arange(keys, device=visible.device)
    after = ~visible & (visible.cumsum(1) > 0)
    before = ~visible & (visible.flip(1).cumsum(1).flip(1) > 0)
    return torch.stack([torch.where(after, place, keys).amin(1), torch.where(before, place + 1, 0).amax(1)], 1)


def _runs(span: tuple[int, int, int], inner: tuple[int, int]) -> tuple[tuple[int, int], ...] | None:
    """The runs of visible keys of a sample; None if there are more than two."""
    (first, last, count), (end, start) = span, inner
    return ((first, end), (start, last + 1)) if end - first + last + 1 - start == count else None


def _keys(span: tuple[int, int, int], kv_len: int, seen: torch.Tensor) -> torch.Tensor | slice | None:
    """Index of the visible keys: a slice where they are contiguous; None for no key."""
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


def _uniform(mask: torch.Tensor, facts: _MaskFacts, on_grid: bool) -> MaskPlan:
    kv_len = mask.shape[3]
    runs = [_runs(*of) for of in zip(facts.spans, facts.inner, strict=True)] if on_grid else [None] * len(facts.spans)
    if facts.same_samples:
        count = facts.spans[0][2]
        keys = _keys(facts.spans[0], kv_len, facts.seen[0])
        scattered = not isinstance(keys, slice)
        if (
            keys is None
            or (keys == ALL and facts.biased)
            or (scattered and mask.device.type == "cpu" and count > CPU_KEPT * kv_len and not on_grid)
        ):
            return passed_on(mask, only_hides=_only_hides(mask, facts))
        left = _cut(mask, keys) if facts.biased else None
        return plan_of(_strategy(keys), [SubCall(ALL, ALL, keys, left, runs=runs[0] if scattered else None)])
    parts = []
    for sample, span in enumerate(facts.spans):
        keys = _keys(span, kv_len, facts.seen[sample])
        left = _cut(mask[sample : sample + 1], keys) if facts.biased else None
        of_keys = None if isinstance(keys, slice) else runs[sample]
        parts.append(SubCall(slice(sample, sample + 1), ALL, keys, left, runs=of_keys))
    return plan_of("per sample", parts)


def _strategy(keys: torch.Tensor | slice) -> str:
    if isinstance(keys, slice):
        return NOTHING_HIDDEN if keys == ALL else "trimmed"
    return "gathered"


def _varied(mask: torch.Tensor, facts: _MaskFacts) -> MaskPlan:
    """Queries, heads or samples see different keys: unseen keys are trimmed, the rest is a pattern or a mask."""
    kv_len = mask.shape[3]
    some = [span for span in facts.spans if span[2]]
    first, last = min(span[0] for span in some), max(span[1] for span in some)
    rows = [] if facts.biased else facts.rows
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
    only_hides = _only_hides(mask, facts)
    if last - first + 1 == kv_len:
        return passed_on(mask, pattern, only_hides=only_hides)
    keys = slice(first, last + 1)
    return plan_of("trimmed", [SubCall(ALL, ALL, keys, _cut(mask, keys))], pattern, only_hides)


def _only_hides(mask: torch.Tensor, facts: _MaskFacts) -> bool:
    return mask.dtype.is_floating_point and not facts.biased


def _pattern(rows: list[tuple[int, int, int]], first: int, last: int) -> str:
    """The name of the pattern where each query sees a contiguous run of keys; empty for none."""
    length, queries = last - first + 1, len(rows)
    ends = [row[1] - first - at for at, row in enumerate(rows)]
    if all(row[2] for row in rows) and all(row[0] == first for row in rows) and len(set(ends)) == 1:
        if length == queries and ends[0] == 0:
            return "causal"
        return "causal, bottom right" if ends[0] == length - queries else ""
    if length == queries and all(row[2] for row in rows):
        before = max(at - row[0] + first for at, row in enumerate(rows))
        after = max(row[1] - first - at for at, row in enumerate(rows))
        wanted = [(max(0, at - before) + first, min(length - 1, at + after) + first) for at in range(queries)]
        if before >= 0 and after >= 0 and all(row[:2] == span for row, span in zip(rows, wanted, strict=True)):
            return f"sliding window, {before} before and {after} after"
    return ""


def _blocks(rows: list[tuple[int, int, int]]) -> list[tuple[slice, tuple[int, int, int]]]:
    """Neighbouring queries that see the same run of keys, merged to blocks."""
    blocks: list[tuple[slice, tuple[int, int, int]]] = []
    for at, row in enumerate(rows):
        if blocks and blocks[-1][1] == row:
            blocks[-1] = (slice(blocks[-1][0].start, at + 1), row)
        else:
            blocks.append((slice(at, at + 1), row))
    return blocks
