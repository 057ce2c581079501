"""`parallel="auto"` compares predictions of Ulysses and ring."""

from __future__ import annotations

import pytest
from attention_backends.backends.parallel.shards import BALANCED, CONTIGUOUS, Shards
from attention_backends.backends.parallel.strategy import Link, Predicted, link_of, predicted
from attention_backends.backends.values.request import AttentionRequest


def fast(bytes_per_second: float = 1e12, latency: float = 1e-6) -> Link:
    return link_of(bytes_per_second, latency, flops=1e14, copied_per_second=1e12)


FAST = fast()
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
    assert faster(of(4, 32768, fast(speed))) == expected


def test_fewer_heads_than_ranks_leave_ranks_without_work() -> None:
    assert faster(of(8, 32768, FAST)) == "ulysses"
    assert faster(of(8, 32768, FAST, num_heads=2)) == "ring"


def test_few_key_heads_make_ring_cheap() -> None:
    slow = fast(1e7)
    assert faster(of(4, 32768, slow)) == "ulysses"
    assert faster(of(4, 32768, slow, num_kv_heads=1)) == "ring"


def test_causal_ring_is_balanced_or_slower() -> None:
    ends = [of(4, 65536, FAST, order, is_causal=True).ring for order in (CONTIGUOUS, BALANCED)]
    assert ends[0] > 1.5 * ends[1]


def test_short_calls_follow_the_latency() -> None:
    assert faster(of(4, 64, fast(latency=1e-3))) == "ulysses"


def test_each_way_has_its_own_bandwidth() -> None:
    """Ring sends to one rank only: over a link that is fast between neighbours it wins where it else loses."""
    slow = fast(1e9)
    assert faster(of(4, 32768, slow)) == "ulysses"
    assert faster(of(4, 32768, slow._replace(to_next=fast(2e10).to_next))) == "ring"
    assert of(4, 32768, slow._replace(exchange=fast(2e9).exchange)).ulysses < of(4, 32768, slow).ulysses


def test_the_bytes_of_either_strategy() -> None:
    """The formulas of docs/parallel.md: 4 ranks, 24 heads of 128, 2 bytes; nothing else takes time."""
    tokens, rate = 4096, 1e6
    free = link_of(rate, 0.0, flops=1e30, copied_per_second=1e30)
    found = of(4, tokens, free)
    assert found.ulysses * rate == pytest.approx(4 * 24 * 128 * 2 * tokens / 4 * 3 / 4)
    assert found.ring * rate == pytest.approx(2 * 24 * 128 * 2 * tokens / 4 * 3)
