"""Which tokens and heads are on which rank: arithmetic without torch.

The whole sequence is: replicated tokens before, then those of the ranks, then replicated tokens after. Replicated
tokens, such as a prompt, are the same on every rank and count once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

CONTIGUOUS, BALANCED = "contiguous", "balanced"
ORDERS = (CONTIGUOUS, BALANCED)
"""`balanced`: rank r has the r-th and the r-th last of 2 * ranks chunks, so that causal ring attention gives every rank
the same work."""


class Span(NamedTuple):
    """Consecutive tokens of one rank."""

    local: int
    """The first of them in the rank's tensor."""
    place: int
    """The first of them in the whole sequence."""
    length: int


class Shards:
    """The tokens of queries, or of keys, on all ranks."""

    def __init__(self, lengths: tuple[int, ...], before: int = 0, after: int = 0, order: str = CONTIGUOUS) -> None:
        """
        Args:
            lengths: tokens in each rank's tensor, replicated ones included.
            before, after: replicated tokens at the start and the end of each rank's tensor.
            order: one of `ORDERS`. With `balanced` a rank's tokens are its first chunk, of half of them rounded up,
                and its last chunk.

        Raises:
            ValueError: a rank has fewer tokens than are replicated.
        """
        if min(lengths) < before + after:
            raise ValueError(
                f"{min(lengths)} tokens on rank {lengths.index(min(lengths))}, fewer than the {before} + {after} "
                "replicated ones"
            )
        self.lengths = tuple(length - before - after for length in lengths)
        """Tokens of each rank without replicated ones."""
        self.before, self.after = before, after
        self.is_balanced = order == BALANCED
        self.total = before + sum(self.lengths) + after
        """Tokens of the whole sequence."""
        self._chunks = [(-(-length // 2), length // 2) if self.is_balanced else (length, 0) for length in self.lengths]

    def spans(self, rank: int) -> tuple[Span, ...]:
        """The tokens that only `rank` has, in the order of its tensor."""
        first, second = self._chunks[rank]
        place = self.before + sum(chunk for chunk, _ in self._chunks[:rank])
        spans = [Span(self.before, place, first)]
        if second:
            place = self.before + sum(chunk for chunk, _ in self._chunks)
            place += sum(chunk for _, chunk in self._chunks[rank + 1 :])
            spans.append(Span(self.before + first, place, second))
        return tuple(span for span in spans if span.length)

    def replicated(self, rank: int) -> tuple[Span, ...]:
        """The replicated tokens, in the tensor of `rank`."""
        ends = Span(0, 0, self.before), Span(self.before + self.lengths[rank], self.total - self.after, self.after)
        return tuple(span for span in ends if span.length)

    def in_order(self) -> list[tuple[int, Span]]:
        """(rank, span) of all tokens but replicated ones, in the order of the whole sequence."""
        spans = [(rank, span) for rank in range(len(self.lengths)) for span in self.spans(rank)]
        return sorted(spans, key=lambda each: each[1].place)


class HeadShare(NamedTuple):
    """The query heads that one rank computes, with the key heads that they need."""

    first: int
    heads: int
    """How many."""
    kv_first: int
    kv_heads: int
    key_of: tuple[int, ...] | None
    """For each query head its key head, counted from `kv_first`, where kernels' rule (equal groups) does not give it;
    else None."""


def head_shares(num_heads: int, num_kv_heads: int, ranks: int) -> list[HeadShare]:
    """A share of the query heads for each rank; some are empty where there are fewer heads than ranks.

    Shares differ by one head at most. Whole groups of a key head stay together where that makes no share larger; else
    a key head goes to every rank that needs it.
    """
    size = num_heads // num_kv_heads
    heads = _even(num_heads, ranks)
    groups = _even(num_kv_heads, ranks)
    if max(groups) * size <= max(heads):
        heads = [count * size for count in groups]
    shares, first = [], 0
    for count in heads:
        if not count:
            shares.append(HeadShare(first, 0, 0, 0, None))
            continue
        needed = [head // size for head in range(first, first + count)]
        kv_first, kv_count = needed[0], needed[-1] - needed[0] + 1
        key_of = tuple(head - kv_first for head in needed)
        by_rule = count % kv_count == 0 and key_of == tuple(at * kv_count // count for at in range(count))
        shares.append(HeadShare(first, count, kv_first, kv_count, None if by_rule else key_of))
        first += count
    return shares


def _even(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


class Piece(NamedTuple):
    """Rows of a rank's queries that one kernel call computes over some keys of a block."""

    rows: tuple[slice, ...]
    """In the rank's tensor."""
    keys: tuple[slice, ...]
    """In the block's tensor."""
    places: tuple[slice, ...]
    """The keys in the whole sequence: columns of a mask."""
    is_causal: bool = False

    @property
    def q_len(self) -> int:
        return sum(part.stop - part.start for part in self.rows)

    @property
    def kv_len(self) -> int:
        return sum(part.stop - part.start for part in self.keys)


def pieces(queries: tuple[Span, ...], keys: tuple[Span, ...], is_causal: bool) -> Iterator[Piece]:
    """The kernel calls of some queries over some keys; none where no query sees a key."""
    if not queries or not keys:
        return
    if not is_causal:
        yield Piece(
            tuple(slice(span.local, span.local + span.length) for span in queries),
            tuple(slice(span.local, span.local + span.length) for span in keys),
            tuple(slice(span.place, span.place + span.length) for span in keys),
        )
        return
    for query in queries:
        for key in keys:
            yield from _causal(query, key)


def _causal(query: Span, key: Span) -> Iterator[Piece]:
    """Query at place p sees the keys at places up to p: a rectangle, a causal square, and a rectangle below it."""
    skipped = max(key.place - query.place, 0)
    start, rows = query.place + skipped, query.length - skipped
    if rows <= 0:
        return
    row = query.local + skipped

    def piece(first: int, count: int, from_key: int, key_count: int, causal: bool = False) -> Piece:
        at, place = from_key - key.place + key.local, from_key
        return Piece(
            (slice(row + first, row + first + count),), (slice(at, at + key_count),),
            (slice(place, place + key_count),), causal,
        )  # fmt: skip

    end = key.place + key.length
    earlier = min(end, start) - key.place
    if earlier > 0:
        yield piece(0, rows, key.place, earlier)
    later = end - start
    if later > 0:
        square = min(later, rows)
        yield piece(0, square, start, square, True)
        if rows > square:
            yield piece(square, rows - square, start, square)


def joined(parts: tuple[slice, ...]) -> tuple[slice, ...]:
    """Neighbouring slices as one."""
    made: list[slice] = []
    for part in parts:
        if made and made[-1].stop == part.start:
            made[-1] = slice(made[-1].start, part.stop)
        else:
            made.append(part)
    return tuple(made)


def balanced_order(length: int, ranks: int, rank: int) -> tuple[slice, slice]:
    """The tokens of `rank` for `sequence_order="balanced"`, as two slices of a sequence of `length` tokens.

    The first has as many tokens as the second, or one more.
    """
    lengths = _even(length, ranks)
    shards = Shards(tuple(lengths), order=BALANCED)
    first, *second = shards.spans(rank) or (Span(0, 0, 0),)
    last = second[0] if second else Span(0, length, 0)
    return slice(first.place, first.place + first.length), slice(last.place, last.place + last.length)
