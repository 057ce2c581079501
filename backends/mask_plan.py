"""What a mask hides, and the cheapest exact way to honour it: fewer keys where that says the same.

A mask that hides keys from every query is honoured by leaving those keys out: attention over fewer keys is faster, and
kernels that take no masks become eligible. `inspect` reads a mask's values once, with one read-back from the device;
`MaskPlan.parts` applies the result to a call. Under torch.inference_mode a tensor has no version, so a plan is good for
one model call and no longer; who keeps it must keep the mask too.

A key is hidden by False, -inf, or a number of at most half the dtype's most negative one, in rows that keep a visible
key; other numbers are a bias. Rows that False or -inf leaves without a key give zeros, as in SDPA; rows of finite most
negative numbers give what SDPA gives, so a mask with such a row is left as it is. No kernel gets a call without keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from .mask import mask_kind
from .request import AttentionCall

if TYPE_CHECKING:
    import torch

MOST_BLOCKS = 16
"""Diagonal blocks up to which a block-diagonal mask becomes one call for each block."""


CPU_KEPT = 15 / 16
"""On the CPU, whose kernels all take masks, keys are gathered only if fewer stay: copying them costs 3 to 4 % of a call
at 1,024 keys and the mask 2 to 4 % (benchmarks/masks.py, one thread)."""


class Part(NamedTuple):
    """A call that computes a part of the output: `samples` and `rows` of it, with these keys and this mask."""

    samples: slice
    rows: slice
    keys: torch.Tensor | slice | None
    """A slice of the keys, indices of those to gather, or None where no key is visible and the output is zero."""
    mask: torch.Tensor | None = None
    """What is left of the mask, four-dimensional, already cut to the part."""
    is_causal: bool = False
    memo: dict[object, object] | None = None
    """What kernels make of `mask`, for as long as the plan lives."""


ALL = slice(None)


@dataclass(frozen=True)
class MaskPlan:
    """How the calls with one mask run."""

    treatment: str
    """For reports: `none`, `nothing hidden`, `trimmed`, `gathered`, `per sample`, `causal`, `per block`,
    `passed on`."""
    parts: tuple[Part, ...]
    facts: tuple[object, ...] = field(default=())
    """Equal for masks whose calls have the same shapes: what a decision may be kept under."""
    pattern: str = ""
    """What the mask is, where that is more than the treatment says: `sliding window`, `causal, bottom right`."""

    def calls(self, call: AttentionCall) -> list[AttentionCall | None]:
        """The call of each part; None for a part whose output is zero. Views, except for gathered keys."""
        return [_call(part, call) for part in self.parts]

    def joined(self, outputs: Sequence[torch.Tensor | None], call: AttentionCall) -> torch.Tensor:
        """The whole output, (batch, num_heads, q_len, v_head_dim), from those of the parts in their order."""
        first = outputs[0]
        if len(outputs) == 1 and first is not None:
            return first
        query, value = call.query, call.value
        batch, heads, q_len, _ = query.shape
        whole: torch.Tensor = query.new_zeros(batch, q_len, heads, value.shape[3]).transpose(1, 2)  # as models want it
        for part, output in zip(self.parts, outputs, strict=True):
            if output is not None:
                whole[part.samples, :, part.rows] = output
        return whole


def _call(part: Part, call: AttentionCall) -> AttentionCall | None:
    if part.keys is None:
        return None
    query, key, value = call.query, call.key, call.value
    if part.samples != ALL:
        query, key, value = query[part.samples], key[part.samples], value[part.samples]
    if part.rows != ALL:
        query = query[:, :, part.rows]
    if isinstance(part.keys, slice):
        if part.keys != ALL:
            key, value = key[:, :, part.keys], value[:, :, part.keys]
    else:
        key, value = key.index_select(2, part.keys), value.index_select(2, part.keys)
    return AttentionCall(
        query, key, value, part.mask, part.is_causal, call.scale, call.enable_gqa, host=call.host, memo=part.memo
    )


def passed_on(mask: torch.Tensor | None, pattern: str = "") -> MaskPlan:
    """The plan that changes nothing; for masks that are not inspected too."""
    return _plan("passed on" if mask is not None else "none", [Part(ALL, ALL, ALL, mask)], pattern)


def inspect(mask: torch.Tensor, kv_len: int) -> MaskPlan:
    """Read a four-dimensional mask, broadcastable to (batch, num_heads, q_len, kv_len), and plan for it.

    Costs a few passes over the mask and one read-back from its device.
    """
    import torch

    small = _without_copies(mask)
    if small.shape[3] != kv_len or mask.dtype not in (torch.bool, torch.float16, torch.bfloat16, torch.float32):
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
    if mask.dtype == torch.bool:
        visible, nan, biased, finite = mask, no, no, no
    else:
        visible = mask > torch.finfo(mask.dtype).min / 2
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
            return passed_on(mask)
        left = _cut(mask, keys) if found.biased else None
        return _plan(_word(keys), [Part(ALL, ALL, keys, left)])
    parts = []
    for sample, span in enumerate(found.spans):
        keys = _keys(span, kv_len, found.seen[sample])
        left = _cut(mask[sample : sample + 1], keys) if found.biased else None
        parts.append(Part(slice(sample, sample + 1), ALL, keys, left))
    return _plan("per sample", parts)


def _word(keys: torch.Tensor | slice) -> str:
    if isinstance(keys, slice):
        return "nothing hidden" if keys == ALL else "trimmed"
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
        return _plan("causal", [Part(ALL, ALL, keys, None, True)])
    if rows and together:
        blocks = _blocks(rows)
        if len(blocks) <= MOST_BLOCKS:
            parts = [
                Part(ALL, span, None if not count else slice(first, last + 1)) for span, (first, last, count) in blocks
            ]
            return _plan("per block", parts)
    if last - first + 1 == kv_len:
        return passed_on(mask, pattern)
    keys = slice(first, last + 1)
    return _plan("trimmed", [Part(ALL, ALL, keys, _cut(mask, keys))], pattern)


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


def _plan(treatment: str, parts: list[Part], pattern: str = "") -> MaskPlan:
    facts = tuple(
        (
            part.samples.start,
            (part.rows.start, part.rows.stop),
            _count(part.keys),
            None if part.mask is None else (mask_kind(part.mask), part.mask.shape, part.mask.dtype),
            part.is_causal,
        )
        for part in parts
    )
    remembering = tuple(part if part.mask is None else part._replace(memo={}) for part in parts)
    return MaskPlan(treatment, remembering, (treatment, pattern, *facts), pattern)


def _count(keys: torch.Tensor | slice | None) -> object:
    if keys is None:
        return 0
    return (keys.start, keys.stop) if isinstance(keys, slice) else len(keys)
