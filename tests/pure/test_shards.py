"""Which tokens and heads are on which rank."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
from attention_backends.backends.parallel.shards import (
    BALANCED,
    ORDERS,
    HeadShare,
    Shards,
    balanced_order,
    head_shares,
    pieces,
)

LENGTHS = [(4, 4), (3, 0, 5), (0, 0, 1, 7), (2, 3, 5, 1), (9,)]


@pytest.mark.parametrize(("lengths", "order", "ends"), list(product(LENGTHS, ORDERS, [(0, 0), (2, 1)])))
def test_every_token_is_on_one_rank(lengths: tuple[int, ...], order: str, ends: tuple[int, int]) -> None:
    before, after = ends
    shards = Shards(tuple(length + before + after for length in lengths), before, after, order)
    found = sorted(
        place for rank in range(len(lengths)) for span in shards.spans(rank) for place in range(*_run(span.place, span))
    )
    assert found == list(range(before, shards.total - after))
    for rank, length in enumerate(lengths):
        locals_ = [at for span in shards.spans(rank) for at in range(*_run(span.local, span))]
        assert locals_ == list(range(before, before + length))
        assert sum(span.length for span in shards.replicated(rank)) == before + after
    ordered = [span.place for _, span in shards.in_order()]
    assert ordered == sorted(ordered)


def _run(start: int, span: object) -> tuple[int, int]:
    return start, start + span.length  # type: ignore[attr-defined]


def test_fewer_tokens_than_replicated_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="1 tokens on rank 1"):
        Shards((4, 1), 1, 1)


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [
    (num_kv * group, num_kv, ranks) for num_kv, group, ranks in product([1, 2, 3, 5, 8], [1, 2, 3, 4], [1, 2, 3, 4, 7])
])  # fmt: skip
def test_every_head_is_computed_once_with_its_key_head(heads: int, kv_heads: int, ranks: int) -> None:
    shares = head_shares(heads, kv_heads, ranks)
    group, first = heads // kv_heads, 0
    assert len(shares) == ranks
    for share in shares:
        if not share.heads:
            continue
        assert share.first == first
        key_of = share.key_of or tuple(at * share.kv_heads // share.heads for at in range(share.heads))
        assert [share.kv_first + key for key in key_of] == [at // group for at in range(first, first + share.heads)]
        if share.key_of is None:
            assert share.heads % share.kv_heads == 0
        first += share.heads
    assert first == heads
    assert max(share.heads for share in shares) == -(-heads // ranks)


def test_groups_stay_together_where_no_share_grows() -> None:
    assert head_shares(8, 4, 2) == [HeadShare(0, 4, 0, 2, None), HeadShare(4, 4, 2, 2, None)]
    assert head_shares(4, 1, 2) == [HeadShare(0, 2, 0, 1, None), HeadShare(2, 2, 0, 1, None)]
    assert head_shares(6, 3, 2) == [HeadShare(0, 3, 0, 2, (0, 0, 1)), HeadShare(3, 3, 1, 2, (0, 1, 1))]
    assert [share.heads for share in head_shares(2, 2, 4)] == [1, 1, 0, 0]


@pytest.mark.parametrize(("q_lens", "kv_lens", "order"), [
    (lens, lens, order) for lens, order in product(LENGTHS, ORDERS)
] + [((3, 4), (5, 1), "contiguous"), ((1, 6), (6, 1), "balanced")])  # fmt: skip
def test_pieces_of_causal_calls_are_the_triangle(q_lens: tuple[int, ...], kv_lens: tuple[int, ...], order: str) -> None:
    queries, keys = Shards(q_lens, order=order), Shards(kv_lens, order=order)
    seen: Counter[tuple[int, int]] = Counter()
    for rank, source in product(range(len(q_lens)), range(len(q_lens))):
        place = {span.local + at: span.place + at for span in queries.spans(rank) for at in range(span.length)}
        for piece in pieces(queries.spans(rank), keys.spans(source), True):
            (rows,), (columns,) = piece.rows, piece.places
            for at, row in enumerate(range(rows.start, rows.stop)):
                shown = columns.start + at + 1 if piece.is_causal else columns.stop
                seen.update((place[row], column) for column in range(columns.start, shown))
    assert seen == Counter((row, key) for row in range(queries.total) for key in range(min(row + 1, keys.total)))


def _work(shards: Shards, rank: int) -> int:
    everyone = range(len(shards.lengths))
    made = [piece for source in everyone for piece in pieces(shards.spans(rank), shards.spans(source), True)]
    return sum(piece.q_len * piece.kv_len // (2 if piece.is_causal else 1) for piece in made)


def test_balanced_order_gives_each_rank_the_same_causal_work() -> None:
    lengths = (64,) * 4
    balanced = {_work(Shards(lengths, order=BALANCED), rank) for rank in range(4)}
    contiguous = [_work(Shards(lengths), rank) for rank in range(4)]
    assert len(balanced) == 1
    assert contiguous == sorted(contiguous)
    assert contiguous[3] == 7 * contiguous[0]


def test_balanced_order_says_which_tokens_a_rank_has() -> None:
    assert balanced_order(16, 2, 0) == (slice(0, 4), slice(12, 16))
    assert balanced_order(16, 2, 1) == (slice(4, 8), slice(8, 12))
    assert balanced_order(3, 2, 1) == (slice(1, 2), slice(3, 3))
    for length, ranks in product(range(9), (1, 2, 3, 4)):
        found = [
            at for rank in range(ranks) for part in balanced_order(length, ranks, rank) for at in range(length)[part]
        ]
        assert sorted(found) == list(range(length))
