"""Ulysses or ring for `parallel="auto"`: predicts both from lengths, heads and the measured link. Without torch.

For W ranks and a call of F floating-point operations in the whole:

- Ulysses: the busiest rank computes F * heads / num_heads. It sends query, key and value of its tokens in one exchange
  and gets its output in another: the share (W - 1) / W of their bytes, with key heads that several ranks need counted
  for each of them.
- Ring: the busiest rank computes F * rows / q_len, in W parts. A part takes as long as the computation, or as the next
  block of keys and values on its way, whichever is longer. Merging reads and writes the output in float32 per part.

An exchange and the way to the next rank take the seconds that were measured for some sizes, and between them in
proportion (`backends/cards/cost.py`: `Points`).

Sources: DeepSpeed-Ulysses (arXiv:2309.14509), section 3.2; Ring Attention (arXiv:2310.01889), section 3.
"""

from __future__ import annotations

from typing import NamedTuple

from ..cards.cost import Points
from ..values.request import AttentionRequest
from .shards import Shards, head_shares


class Link(NamedTuple):
    """What a group was measured to do; the slowest of its ranks."""

    exchange: Points
    """Of an exchange between all ranks, by the bytes that each rank sends to the others together."""
    to_next: Points
    """Of sending to the next rank while as many bytes come from the one before, by these bytes."""
    flops: float
    """Operations per second of attention on one rank."""
    copied_per_second: float
    """Bytes per second that a rank reads and writes in its own memory."""


def link_of(bytes_per_second: float, latency: float, flops: float, copied_per_second: float) -> Link:
    """A link on which a rank sends so many bytes per second to all others together, or to one."""
    points = Points([(size, latency + size / bytes_per_second) for size in (0.0, 1e9)])
    return Link(points, points, flops, copied_per_second)


class Predicted(NamedTuple):
    """Seconds of a call by either strategy."""

    ulysses: float
    ring: float


def predicted(request: AttentionRequest, queries: Shards, keys: Shards, item_size: int, link: Link) -> Predicted:
    """Predict a call of all ranks.

    Args:
        request: of the whole call: all heads and tokens.
        item_size: bytes of an element.
    """
    ranks, kv_heads = len(queries.lengths), request.num_kv_heads or request.num_heads
    v_head_dim = request.v_head_dim or request.head_dim
    flops = 2.0 * request.batch * request.num_heads * queries.total * keys.total * (request.head_dim + v_head_dim)
    flops /= 2 if request.is_causal else 1
    shares = head_shares(request.num_heads, kv_heads, ranks)
    item, both_dims = request.batch * item_size, request.head_dim + v_head_dim
    to_others = item * (ranks - 1) / ranks
    rows_sent = request.num_heads * max(queries.lengths)
    keys_sent = sum(share.kv_heads for share in shares) * max(keys.lengths)
    before = link.exchange.seconds(to_others * (rows_sent * request.head_dim + keys_sent * both_dims))
    after = link.exchange.seconds(to_others * rows_sent * v_head_dim)
    busiest = max(share.heads for share in shares) / request.num_heads
    ulysses = flops / link.flops * busiest + before + after
    rows = max(queries.lengths) + queries.before + queries.after
    part = flops / link.flops * rows / queries.total / ranks
    if request.is_causal:  # the last rank computes all of its rows, where tokens are contiguous
        part *= 1 if queries.is_balanced else 2 - 1 / ranks
    moved = link.to_next.seconds(item * kv_heads * max(keys.lengths) * both_dims)
    merged = 3 * 4 * request.batch * request.num_heads * rows * v_head_dim / link.copied_per_second
    ring = ranks * (part + merged) + (ranks - 1) * max(moved - part - merged, 0.0)
    return Predicted(ulysses, ring)
