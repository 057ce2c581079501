"""`parallel="auto"` compares predictions of Ulysses and ring."""

from __future__ import annotations

import pytest
from attention_backends.backends.parallel.shards import BALANCED, CONTIGUOUS, Shards
from attention_backends.backends.parallel.strategy import Link, Predicted, predicted
from attention_backends.backends.values.request import AttentionRequest

FAST = Link(bytes_per_second=1e12, latency=1e-6, flops=1e14, copied_per_second=1e12)
WHOLE = AttentionRequest(1, 24, 0, 0, 128, "bfloat16")


def of(ranks: int, tokens: int, link: Link, order: str = CONTIGUOUS, **changed: int) -> Predicted:
    shards = Shards((tokens // ranks,) * ranks, order=order)
    request = WHOLE._replace(q_len=tokens, kv_len=tokens, **changed)
    return predicted(request, shards, shards, 2, link)


def faster(found: Predicted) -> str:
    return min(found._fields, key=lambda name: getattr(found, name))


@pytest.mark.parametrize(("speed", "expected"), [(1e13, "ulysses"), (2e10, "ring"), (1e9, "ulysses")])
def test_the_choice_follows_the_bandwidth(speed: float, expected: str) -> None:
    """Fast: merging costs more than the exchange. Slower: keys travel while others are computed. Slow: fewer bytes."""
    assert faster(of(4, 32768, FAST._replace(bytes_per_second=speed))) == expected


def test_fewer_heads_than_ranks_leave_ranks_without_work() -> None:
    assert faster(of(8, 32768, FAST)) == "ulysses"
    assert faster(of(8, 32768, FAST, num_heads=2)) == "ring"


def test_few_key_heads_make_ring_cheap() -> None:
    slow = FAST._replace(bytes_per_second=1e7)
    assert faster(of(4, 32768, slow)) == "ulysses"
    assert faster(of(4, 32768, slow, num_kv_heads=1)) == "ring"


def test_causal_ring_is_balanced_or_slower() -> None:
    ends = [of(4, 65536, FAST, order, is_causal=True).ring for order in (CONTIGUOUS, BALANCED)]
    assert ends[0] > 1.5 * ends[1]


def test_short_calls_follow_the_latency() -> None:
    assert faster(of(4, 64, FAST._replace(latency=1e-3))) == "ulysses"
