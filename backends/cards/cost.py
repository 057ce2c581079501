"""Predicts what a divided call takes, from measured points of each link and each card; without torch.

With n groups of heads, a card takes

    to(shared + n * sent) + n * compute + back(n * returned)

where `to` and `back` are the seconds of a copy by its bytes, between measured points. A call takes as long as the
slowest card, the home card without copies, and `join` seconds more, for handing over and writing one output.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from ..values.request import AttentionRequest
from .parts import groups_of

ITEM_SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


class Points:
    """Seconds of a copy by its bytes: linear between measured points, and beyond the last by the last slope."""

    def __init__(self, measured: Sequence[tuple[float, float]]) -> None:
        """`measured`: (bytes, seconds), at least two of different sizes."""
        self.measured = sorted(measured)

    def seconds(self, size: float) -> float:
        """Of a copy of `size` bytes; below the first point that point's seconds, since a copy has a latency."""
        points = self.measured
        if size <= points[0][0]:
            return points[0][1] if size else 0.0
        at = min(bisect_left(points, (size, 0.0)), len(points) - 1)
        (low, of_low), (high, of_high) = points[at - 1], points[at]
        return of_low + (size - low) * max(of_high - of_low, 0.0) / (high - low)

    @property
    def bytes_per_second(self) -> float:
        """Of large copies, without latency."""
        (low, of_low), (high, of_high) = self.measured[-2:]
        return (high - low) / max(of_high - of_low, 1e-12)


class Link(NamedTuple):
    """Copies between the home card and another one, as measured on this machine."""

    to: Points
    back: Points


class Volume(NamedTuple):
    """Bytes that a call moves."""

    sent: float
    """Query, key, value and the mask's part, for each group."""
    shared: float
    """A mask that is the same for all heads: sent to each card that takes part."""
    returned: float
    """Output of a group."""


def volume_of(request: AttentionRequest, mask_bytes: float = 0, mask_by_head: bool = False) -> Volume:
    """The bytes of a call.

    Args:
        mask_bytes: of the mask, without dimensions that are only repeated.
        mask_by_head: the mask differs between heads.
    """
    groups, item = groups_of(request), ITEM_SIZES.get(request.dtype, 4)
    size, v_head_dim = request.num_heads // groups, request.v_head_dim or request.head_dim
    queries = request.batch * size * request.q_len * item
    keys = request.batch * request.kv_len * item
    sent = queries * request.head_dim + keys * (request.head_dim + v_head_dim)
    by_group = mask_bytes / groups if mask_by_head else 0.0
    return Volume(sent + by_group, 0.0 if mask_by_head else mask_bytes, queries * v_head_dim)


class CardCost(NamedTuple):
    """What is known of another card for one kind of call."""

    link: Link
    group_seconds: float
    """Of computing one group there."""

    def seconds(self, groups: int, volume: Volume) -> float:
        """Until the output of so many groups is back; 0 without any."""
        if not groups:
            return 0.0
        there = self.link.to.seconds(volume.shared + groups * volume.sent)
        return there + groups * self.group_seconds + self.link.back.seconds(groups * volume.returned)


class Predicted(NamedTuple):
    """The best division of a call."""

    counts: tuple[int, ...]
    """Groups for each device, the home card first."""
    seconds: float


def predicted(counts: Sequence[int], volume: Volume, home: float, cards: Sequence[CardCost], join: float) -> float:
    """Seconds of a call divided so; `home`: seconds of a group on the home card."""
    others = [card.seconds(count, volume) for card, count in zip(cards, counts[1:], strict=True)]
    return max(counts[0] * home, *others) + (join if any(counts[1:]) else 0.0)


def best(groups: int, volume: Volume, home: float, cards: Sequence[CardCost], join: float = 0.0) -> Predicted:
    """The division with the least predicted time; all at home where no other is faster.

    Every time at which a device can end is tried, in order: the first by which the devices together finish all groups.
    """
    ends = [[count * home for count in range(groups + 1)]]
    ends += [[card.seconds(count, volume) for count in range(groups + 1)] for card in cards]
    times = sorted({time for of in ends for time in of})
    first = bisect_left(times, True, key=lambda time: sum(bisect_right(of, time) - 1 for of in ends) >= groups)
    counts = [bisect_right(of, times[first]) - 1 for of in ends]
    while sum(counts) > groups:  # some device could do more: spare the one that ends last
        latest = max((at for at, count in enumerate(counts) if count), key=lambda at: ends[at][counts[at]])
        counts[latest] -= 1
    seconds = predicted(counts, volume, home, cards, join)
    whole = (groups, *(0 for _ in cards))
    return Predicted(whole, groups * home) if groups * home <= seconds else Predicted(tuple(counts), seconds)
