"""Compares candidate backends for one kind of call: which one runs the next call, rejections, and the winner.

Times are passed in, on a GPU after the work is done. A trial computes a call that is needed anyway, so its cost is the
difference to the incumbent, the backend that `auto` would take.

Only names and milliseconds: `tuner.py` runs kernels and clocks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from statistics import median, median_low
from time import time

from ...measure.call_key import TuningKey
from ...values.request import AttentionRequest
from .entry import Entry

BUDGET = 12.0
"""Time for trials of one candidate, in calls of the incumbent; includes its first call, which may compile."""
SMALLEST_MS = 1.0
"""Calls below this are not tuned."""
TOO_SMALL = f"under {SMALLEST_MS:g} ms, not tuned"
GAIN = 0.02
"""A candidate must be faster than the incumbent by more than this share."""
TOO_SLOW = 2.0
"""A candidate is rejected when three calls, its first included, each exceed this many times the incumbent's time."""
PLAINLY_SLOW = 4.0
"""Two calls that agree suffice up to this many times the incumbent's time; above, they may be outliers or compiling."""
SAME = 1.1
"""Two calls agree within this factor; a call that compiled rarely agrees with the next."""
CLOSE = 1.25
"""A candidate's time is known once two calls after the first are within this factor."""
HOPELESS = 1.25
"""A candidate whose median is this many times the best, after `FEWEST` calls each, gets no more trials."""
FEWEST = 5
"""Times needed for a median. Of fewer, with the first call, the lower median is used: one outlier must not decide."""
BASELINE = 3
"""Times of the incumbent, after its first call, before the first trial."""
MOST_WAITING = 8
"""Most pending times of the incumbent before the first one arrives."""
MOST_TRIALS = 32
"""Max timed calls per candidate."""
MOST_TIMES = 60
"""Max timed calls of the incumbent."""
MOST_DEFERRALS = 3
"""A candidate whose time is unknown when its budget is spent is deferred to a later run, at most this often: compiling
and an outlier can each cost one."""


class CandidateTimes:
    """Times of one backend in a contest."""

    __slots__ = ("deferred", "first", "out", "spent", "started", "times", "waiting")

    def __init__(self) -> None:
        self.started = False
        self.first: float | None = None
        """Milliseconds of its first call."""
        self.times: list[float] = []
        self.spent = 0.0
        self.waiting = 0
        """Calls whose times are pending."""
        self.out: str | None = None
        """Why it is rejected."""
        self.deferred = False

    @property
    def figure(self) -> float | None:
        """Estimate of its milliseconds per call; None without a time."""
        if len(self.times) >= FEWEST or not self.times:
            return median(self.times) if self.times else None
        return median_low([*self.times] if self.first is None else [self.first, *self.times])

    @property
    def is_known(self) -> bool:
        """Whether two calls after the first agree; a single time may be an outlier."""
        return len(self.times) > 1 and sorted(self.times)[1] <= CLOSE * min(self.times)

    def is_too_slow(self, usual: float) -> bool:
        """Whether it is too slow beyond compiling and one outlier; `usual`: milliseconds of the incumbent."""
        times = self.times if self.first is None else [self.first, *self.times]
        if min(times) <= TOO_SLOW * usual:
            return False
        return len(times) > 2 or (len(times) == 2 and max(times) <= min(SAME * min(times), PLAINLY_SLOW * usual))


class Contest:
    """Candidates for one kind of call. Not thread-safe: `tuner.py` uses the store's lock."""

    def __init__(
        self,
        location: tuple[str, str, TuningKey],
        request: AttentionRequest,
        incumbent: str,
        candidates: Collection[str],
        before: Entry | None = None,
    ) -> None:
        """
        Args:
            location: environment, allowed accuracy and key, see `Entry.location`.
            request: only calls with these facts are timed: others in the bucket take another time.
            candidates: without the incumbent.
            before: the stored entry, if this contest retries its deferred candidates.
        """
        self.location = location
        self.request = request
        self.incumbent = incumbent
        self.candidate_times = {name: CandidateTimes() for name in (incumbent, *candidates)}
        self.before = before
        self.owner: object = None
        """The tuner that began it: in its run, trials are spread over a few steps."""
        self.entry: Entry | None = None
        """The outcome; None while it is open."""
        self.ended: str | None = None
        """Why it ended without an outcome; None otherwise."""
        self._whole: dict[str, int] = {}
        """Sparse candidates, each with the step in which it last computed a call whole."""
        self._baseline: list[float] = []
        self._turns: list[str] = []
        self._rounds = 0

    @property
    def is_open(self) -> bool:
        """Whether it has neither an outcome nor ended without one."""
        return self.entry is None and self.ended is None

    @property
    def typical(self) -> float | None:
        """Median milliseconds of the incumbent; None while unknown."""
        times = self.candidate_times[self.incumbent].times
        if len(times) >= BASELINE:
            return median(times)
        return median([*self._baseline, *times]) if len(self._baseline) >= BASELINE else None

    def next(self, share: float, refused: Collection[str] = ()) -> str | None:
        """The backend that runs and times the next call; None: the incumbent runs it untimed.

        Args:
            share: of the budget that may be used by now, 0 to 1.
            refused: candidates that cannot run this very call.
        """
        usual = self.typical
        if usual is None:
            return self.incumbent if self.candidate_times[self.incumbent].waiting < MOST_WAITING else None
        if share <= 0:
            return None
        able = [name for name in self._live(usual) if self._may(name, usual, share) and name not in refused]
        if not able:  # more times of the incumbent cost nothing
            mine = self.candidate_times[self.incumbent]
            return self.incumbent if len(mine.times) + mine.waiting < MOST_TIMES else None
        for _ in range(2):
            while self._turns:
                name = self._turns.pop(0)
                if name == self.incumbent or name in able:
                    return name
            self._turns = self._new_round(able)
        return None

    def _new_round(self, able: list[str]) -> list[str]:
        """Each backend once; start and direction change from round to round, against drift."""
        names = [self.incumbent, *able]
        turn = self._rounds // 2 % len(names)
        names = names[turn:] + names[:turn]
        self._rounds += 1
        return names if self._rounds % 2 else names[::-1]

    def _live(self, usual: float) -> list[str]:
        """Candidates that still need trials."""
        live = [
            name
            for name, candidate in self.candidate_times.items()
            if name != self.incumbent
            and candidate.out is None
            and not candidate.deferred
            and not self._is_done(candidate, usual)
        ]
        return [] if len(live) == 1 and self._is_ahead(live[0]) else live

    def _is_ahead(self, name: str) -> bool:
        """Whether it leads every other by `HOPELESS`, after 2 * `FEWEST` calls."""
        mine = self.candidate_times[name]
        others = [
            times.times
            for other, times in self.candidate_times.items()
            if other != name and times.out is None and times.times
        ]
        if min(map(len, [mine.times, self.candidate_times[self.incumbent].times])) < 2 * FEWEST:
            return False
        return median(mine.times) * HOPELESS < min(map(median, others))

    def _is_done(self, candidate: CandidateTimes, usual: float) -> bool:
        if len(candidate.times) >= MOST_TRIALS or candidate.spent + (candidate.figure or usual) > BUDGET * usual:
            return True
        best = (
            min(median(other.times) for other in self.candidate_times.values() if other.times)
            if candidate.times
            else 0.0
        )
        enough = len(candidate.times) >= FEWEST and len(self.candidate_times[self.incumbent].times) >= FEWEST
        return enough and median(candidate.times) > HOPELESS * best

    def _may(self, name: str, usual: float, share: float) -> bool:
        candidate = self.candidate_times[name]
        if candidate.waiting and not candidate.times:  # until its first time is known, one call at a time
            return False
        each = candidate.figure or usual
        return candidate.spent + (candidate.waiting + 1) * each <= share * BUDGET * usual

    def begin(self, name: str) -> bool:
        """Count a timed call that begins; True if it is the first of this backend."""
        candidate = self.candidate_times[name]
        candidate.waiting += 1
        first, candidate.started = not candidate.started, True
        return first

    def untimed(self, name: str) -> None:
        """Withdraw a call that began and has no time."""
        self.candidate_times[name].waiting = max(0, self.candidate_times[name].waiting - 1)

    def computed_whole(self, name: str, step: int) -> None:
        """Withdraw a call of a sparse candidate that was computed whole.

        The others are decided without it; a later run tries it against their winner, once in each step.
        """
        candidate = self.candidate_times[name]
        self.untimed(name)
        candidate.started = candidate.first is not None or candidate.waiting > 0
        self._whole[name] = step
        if self.before is None and candidate.first is None:
            candidate.deferred = True
            self._end_if_done()

    def whole_in(self, step: int) -> set[str]:
        """The candidates that computed a call whole in this step."""
        return {name for name, last in self._whole.items() if last == step}

    def record_time(self, name: str, ms: float) -> None:
        """Add the milliseconds of a call that began."""
        candidate = self.candidate_times[name]
        self.untimed(name)
        if not self.is_open or candidate.out is not None:
            return
        usual = self.typical
        candidate.spent += ms
        if candidate.first is None:
            candidate.first = ms
            if usual is not None and name != self.incumbent and candidate.spent + usual > BUDGET * usual:
                candidate.deferred = True
        elif usual is None:
            self._baseline.append(ms)
            usual = self.typical
            if usual is not None and usual < SMALLEST_MS:
                self.ended = TOO_SMALL
        else:
            candidate.times.append(ms)
            if name != self.incumbent and len(candidate.times) < FEWEST and candidate.is_too_slow(usual):
                slow = min(candidate.first, *candidate.times)
                self.reject(name, f"{slow:.3g} ms in one call > {TOO_SLOW:g} x {usual:.3g} ms of {self.incumbent}")
        self._end_if_done()

    def reject(self, name: str, reason: str) -> None:
        self.candidate_times[name].out = reason
        self._end_if_done()

    def forget_waiting(self) -> None:
        """At the end of a run: drop pending times."""
        for candidate in self.candidate_times.values():
            candidate.waiting = 0

    def _end_if_done(self) -> None:
        usual = self.typical
        if usual is None or not self.is_open or self._live(usual):
            return
        if any(candidate.waiting for name, candidate in self.candidate_times.items() if name != self.incumbent):
            return
        self.entry = self._outcome(usual)

    def end(self) -> None:
        """End it now; candidates without a known time are deferred."""
        if (usual := self.typical) is not None:
            self.entry = self._outcome(usual)

    def _outcome(self, usual: float) -> Entry:
        environment, accuracy, key = self.location
        tried = {name: candidate for name, candidate in self.candidate_times.items() if name != self.incumbent}
        rejected = {name: candidate.out for name, candidate in tried.items() if candidate.out is not None}
        measured = {
            name: r.figure for name, r in tried.items() if r.out is None and r.figure is not None and r.is_known
        }
        often: Mapping[str, int] = self.before.deferred if self.before is not None else {}
        deferred = {name: often.get(name, 0) + 1 for name in tried if name not in rejected and name not in measured}
        for name in [name for name, count in deferred.items() if count >= MOST_DEFERRALS]:
            candidate = self.candidate_times[name]
            if candidate.times and candidate.first is not None:
                measured[name] = min(candidate.first, *candidate.times)  # one outlier must not reject a kernel
            else:
                took = f"{candidate.spent:.3g} ms > {BUDGET:g} x {usual:.3g} ms of {self.incumbent}"
                rejected[name] = f"its first calls took {took}"
            del deferred[name]
        measured[self.incumbent] = usual
        winner = _winner(measured, self.incumbent)
        outcome = Entry(
            key, environment, accuracy, winner, self.incumbent, measured, rejected, deferred, round(time(), 3)
        )
        if self.before is None:
            return outcome
        return outcome._replace(
            incumbent=self.before.incumbent,
            ms={**self.before.ms, **measured},
            rejected={**self.before.rejected, **rejected},
        )


def _winner(ms: Mapping[str, float], incumbent: str) -> str:
    """The fastest, or the incumbent where the gain is at most `GAIN`."""
    best = min(ms, key=ms.__getitem__)
    return best if ms[best] < (1 - GAIN) * ms.get(incumbent, float("inf")) else incumbent


def without_winner(entry: Entry, reason: str) -> Entry:
    """The entry without its winner, which failed in a run; the next fastest wins."""
    ms = {name: each for name, each in entry.ms.items() if name != entry.winner}
    rejected = {**entry.rejected, entry.winner: reason}
    return entry._replace(winner=_winner(ms, entry.incumbent), ms=ms, rejected=rejected, written=round(time(), 3))
