"""Decides from measured times how one kind of call is divided, and adjusts that within a run; without torch.

First the call runs whole on the home card a few times. Where the prediction of `cost.py` says that dividing pays, it is
divided; then the times of each card's part replace what was assumed, and the division follows them. Where divided calls
turn out slower than whole ones, they stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from ..values.reasons import Reason
from .cost import CardCost, Link, Predicted, Volume, best, predicted

WARM_UP, TIMED = 1, 3
"""Whole calls before any is timed, and those that are timed."""
MARGIN = 0.97
"""A divided call must be predicted to take at most this share of a whole one."""
ADJUST_AFTER = 4
"""Timed divided calls between two changes of the division."""
GAIN = 0.98
"""A change must be predicted to take at most this share of the present division."""
JUDGED = 5
"""Divided calls whose median is compared with that of whole ones."""
WEIGHT = 0.5
"""Of a new time in a running average."""


class Times(NamedTuple):
    """Seconds of one card's part of a call."""

    to: float
    compute: float
    back: float
    cold: bool = False
    """The card has planned this kind of call only now, so its kernel may have been loaded."""


class Speed:
    """What is known of a card in all kinds of call."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.relative = 1.0
        """Its seconds of a group over those of the home card; 1 until measured."""
        self.out: Reason | None = None
        """Why it is left out for the rest of the run."""


class Estimate:
    """Times of one kind of call, and the division that follows from them."""

    def __init__(self, groups: int, volume: Volume, speeds: Sequence[Speed]) -> None:
        """
        Args:
            groups: key heads, which are divided.
            speeds: of the other cards; shared by all kinds of call of a run.
        """
        self.groups = groups
        self.volume = volume
        self.speeds = speeds
        self.refusal: Reason | None = None
        """Why such calls stay on the home card."""
        self.counts: tuple[int, ...] | None = None
        """Groups for each device, the home card first; None while calls run whole."""
        self._whole: list[float] = []
        self._calls = 0
        self._home: float | None = None
        self._groups: list[float | None] = [None] * len(speeds)
        self._join = 0.0
        self._totals: list[float] = []

    @property
    def whole_seconds(self) -> float:
        """Median of the whole calls."""
        return median(self._whole)

    def next(self) -> tuple[int, ...] | None:
        """How the next call is divided; None: it runs whole."""
        if self.refusal is not None:
            return None
        if self.counts is not None:
            return self.counts
        self._calls += 1
        if len(self._whole) < TIMED:
            return None
        self._choose()
        return self.counts

    @property
    def times_whole(self) -> bool:
        """Whether the whole call that runs now is timed."""
        return self.refusal is None and self._calls > WARM_UP and len(self._whole) < TIMED

    def add_whole(self, seconds: float) -> None:
        """Add the time of a whole call."""
        self._whole.append(seconds)

    def add_divided(
        self, counts: tuple[int, ...], seconds: float, home: float | None, times: Mapping[int, Times]
    ) -> None:
        """Add the times of a divided call; changes the division, or ends it.

        A call in which a card was cold, or that was divided otherwise, counts for nothing.

        Args:
            seconds: of the whole call.
            home: of the home card's part; None without one.
            times: of the other cards' parts, by the number of the card, from 0.
        """
        if counts != self.counts or any(one.cold for one in times.values()):
            return
        parts = [] if home is None else [home]
        if home is not None:
            self._home = _average(self._home, home / counts[0])
        for at, one in times.items():
            parts.append(one.to + one.compute + one.back)
            self._groups[at] = of_group = _average(self._groups[at], one.compute / counts[at + 1])
            self.speeds[at].relative = of_group / self._home_group
        self._join = max(seconds - max(parts), 0.0)
        self._totals.append(seconds)
        if len(self._totals) % ADJUST_AFTER == 0:
            self._adjust()
        if len(self._totals) >= JUDGED:
            found = median(self._totals[-JUDGED:])
            if found > self.whole_seconds:
                self._slower(found)

    def forget(self, at: int) -> None:
        """A card is left out: choose again among the others."""
        self.counts = None
        self._groups[at] = None
        self._totals.clear()

    def refuse(self, reason: Reason) -> None:
        """Divide such calls no more."""
        self.refusal, self.counts = reason, None

    def costs(self) -> list[CardCost]:
        """What is known of each card; one that is left out takes for ever."""
        home = self._home_group
        return [
            CardCost(speed.link, float("inf") if speed.out else home * speed.relative if known is None else known)
            for speed, known in zip(self.speeds, self._groups, strict=True)
        ]

    @property
    def _home_group(self) -> float:
        return self.whole_seconds / self.groups if self._home is None else self._home

    def predict(self) -> Predicted:
        """The best division by what is known now."""
        return best(self.groups, self.volume, self._home_group, self.costs(), self._join)

    def _choose(self) -> None:
        found = self.predict()
        if found.counts[0] == self.groups or found.seconds > MARGIN * self.whole_seconds:
            self._slower(self._not_taken(found))
        else:
            self.counts = found.counts
            self._totals.clear()

    def _not_taken(self, found: Predicted) -> float:
        """Seconds of the division that was considered: with one group elsewhere, where the best one has none."""
        if found.counts[0] < self.groups:
            return found.seconds
        costs = [card.seconds(1, self.volume) for card in self.costs()]
        return max((self.groups - 1) * self._home_group, min(costs)) + self._join

    def _adjust(self) -> None:
        found = self.predict()
        now = self.counts
        if now is None or found.counts == now or found.counts[0] == self.groups:
            return
        if found.seconds <= GAIN * predicted(now, self.volume, self._home_group, self.costs(), self._join):
            self.counts = found.counts
            self._totals.clear()

    def _slower(self, divided: float) -> None:
        self.refuse(Reason("cards.slower", divided=_shown(divided), whole=_shown(self.whole_seconds)))


def _average(before: float | None, now: float) -> float:
    return now if before is None else before + WEIGHT * (now - before)


def _shown(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"
