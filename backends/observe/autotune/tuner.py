"""Autotune: times the candidate backends for a kind of call in a real run, stores the fastest, and uses it afterwards.

A session whose configuration says `autotune` has a `Tuner`. With a stored winner, a call gets the ordinary plan of that
backend; without one a `TrialPlan` (`trial_plan.py`), in which the candidates of a `Contest` (`contest.py`) compute some
of the calls. `store.py` keeps the results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from ...config.layers import record_of
from ...config.names import AUTOTUNE
from ...engine.observer import Chooser, Observer
from ...engine.router import Decision
from ...measure.call_key import TuningKey, key_of
from ...measure.device_clock import DeviceClock
from ...report import RunReport
from ...report.tuning import FROM_STORE, NOT_TUNED, OPEN
from ...values.reasons import Reason
from ...values.request import AttentionRequest
from ..guard import Guard
from .candidates import candidates, may_win
from .contest import Contest, without_winner
from .entry import Entry
from .store import Store, environment_of
from .trial_plan import TrialPlan, failure

if TYPE_CHECKING:
    import torch

    from ...engine.plan import CallKind, Plan, Slot
    from ...engine.session import Session

log = logging.getLogger("attention_backends")

FIRST_STEP, LAST_STEP = 2, 4
"""Steps over which trials are spread: the first step loads and compiles. With few calls per step trials go on after the
last."""


class Clock(Protocol):
    """What a tuner needs of a `DeviceClock`."""

    measures_device_time: bool

    def start(self, device: torch.device | None = None) -> Any: ...

    def stop(self, token: Any, sink: Callable[[float], None]) -> None: ...

    def collect(self, wait: bool = False) -> None: ...


class Tuner(Chooser, Observer):
    """Autotune for one session; results are shared through the store. Not shared between threads."""

    def __init__(self, session: Session, store: Store, clock: Clock | None = None, *, anew: bool = False) -> None:
        """
        Args:
            clock: default: of the device.
            anew: measure also what is stored, for the command `tune`.
        """
        platform = session.router.platform
        self.session = session
        self.guard = session.registered(Guard)
        self.store = store
        self.clock: Clock = clock if clock is not None else DeviceClock(platform.kind)
        self.anew = anew
        self.environment = environment_of(platform)
        self.paused: str | None = None
        """Why there are no trials; stored winners are still used."""
        if record_of(session.layers) is not None:
            self.paused = "a recorded run is repeated"
        elif not self.clock.measures_device_time:
            self.paused = f"work on {platform.kind} cannot be timed"
        self.judge = Guard("enforce", RunReport(mode="off"), everything=True)
        """Checks the first call of each candidate, apart from the run's own guard."""
        self.steps = 0
        self._step: object = None
        self._entries: dict[tuple[str, TuningKey], Entry | None] = {}
        self._candidates: dict[tuple[AttentionRequest, str, str], tuple[str, ...]] = {}
        self._contests: list[Contest] = []
        store.here.add(self.environment)

    def model_call(self, step: object) -> None:
        """A model call begins; `step` as in `Guard.model_call`."""
        if step is None or step is not self._step:
            self._step = step
            self.steps += 1
        self.clock.collect()

    def close(self) -> None:
        """End the run: collect times, reject winners with a guard alarm, and note trials in the run report."""
        self.clock.collect()
        with self.store.lock:
            for contest in self._contests:
                contest.forget_waiting()
                if contest.owner is self:  # an open contest outlives the run, and must not keep its session
                    contest.owner = None
        self._contests.clear()
        run_report = self.session.run_report
        for row in list(run_report.rows.values()):
            if row.asked == AUTOTUNE and row.guard is not None and row.guard.first_alarm:
                names, alarm = self._names(row.role), Reason("guard.alarm", reason=row.guard.first_alarm)
                self._dismiss(row.backend, lambda key, names=names: key.role in names, alarm)  # type: ignore[misc]
        self.store.flush()
        if text := run_report.tuning.note():
            run_report.note(text)
            if run_report.recorder is not None:
                run_report.recorder.not_repeated[f"{text}: some calls ran other kernels, to be timed"] = None

    def plan(self, slot: Slot, kind: CallKind, decision: Decision) -> Plan | None:
        """The plan of calls that ask for `autotune`; None for others.

        Args:
            decision: `auto`'s, with the source that asks for `autotune`.
        """
        if decision.asked != AUTOTUNE:
            return None
        session, request, role = self.session, kind.request, kind.role
        key = key_of(role, request)
        accuracy = decision.accuracy or session.settings.accuracy
        if self.guard is not None and self.guard.refusal(role, kind.block) is not None:
            accuracy = "exact"

        def plain(backend: str, state: str, why: str) -> Plan:
            session.run_report.tuning.kinds[key] = state
            return self.plain(kind, decision, backend, why)

        incumbent, *others = self.candidates(request, decision.backend, accuracy)
        entry = self._known(accuracy, key, incumbent, others)
        if entry is None and kind.category != role:  # entries of presets have categories for roles
            entry = self._known(accuracy, key._replace(role=kind.category), incumbent, others)
        deferred = [] if entry is None or self.paused else [name for name in others if name in entry.deferred]
        if entry is not None and not deferred:
            backend, why = self.winner_for(entry, request, incumbent)
            return plain(backend, FROM_STORE, why)
        if not others:
            return plain(incumbent, NOT_TUNED, f"no other backend can run this call with accuracy {accuracy}")
        if self.paused:
            return plain(incumbent, NOT_TUNED, f"nothing is tried: {self.paused}")
        if entry is not None:  # retry deferred candidates against the stored winner
            incumbent, others = self.winner_for(entry, request, incumbent)[0], deferred
        contest = self._contest((self.environment, accuracy, key), request, incumbent, tuple(others), entry)
        if contest.ended is not None:
            return plain(incumbent, NOT_TUNED, contest.ended)
        return TrialPlan(self, contest, slot, plain(incumbent, OPEN, "tuning"), decision)

    def plain(self, kind: CallKind, decision: Decision, backend: str, why: str) -> Plan:
        """The ordinary plan of one backend; `why` explains the choice in the run report."""
        rejected = decision.rejected if backend == decision.backend else ()
        source = f"{decision.source}: {AUTOTUNE} ({why})"
        chosen = replace(decision, backend=backend, source=source, rejected=rejected, notes=())
        return self.session.plan_of(kind, chosen)

    def winner_for(self, entry: Entry, request: AttentionRequest, incumbent: str) -> tuple[str, str]:
        """(backend, why): the winner, or the incumbent where the winner cannot run this call of the bucket."""
        router, winner = self.session.router, entry.winner
        refused = router.reasons_against(winner, request, self.session.failed)
        if not refused and winner != incumbent:  # a bucket may hold lengths that it should avoid
            refused = tuple(router.backends[winner].avoid_reasons(request, router.platform))
        return (incumbent, f"{entry.winner} is out: {refused[0]}") if refused else (entry.winner, entry.summary())

    def _known(self, accuracy: str, key: TuningKey, incumbent: str, others: list[str]) -> Entry | None:
        """The stored entry for this key; None if a candidate of today is not in it, or its winner may not run here.

        Entries may be imported from anywhere, so accuracy and limits are checked again.
        """
        if (accuracy, key) not in self._entries:
            self._entries[accuracy, key] = None if self.anew else self.store.get(key, self.environment, accuracy)
        entry = self._entries[accuracy, key]
        if entry is None or not {incumbent, *others} <= entry.known:
            return None
        allowed = entry.winner == incumbent or may_win(self.session.router, entry.winner, accuracy)
        return entry if allowed else None

    def _contest(
        self,
        location: tuple[str, str, TuningKey],
        request: AttentionRequest,
        incumbent: str,
        others: tuple[str, ...],
        entry: Entry | None,
    ) -> Contest:
        """The contest for calls of this kind, begun if there is none."""
        with self.store.lock:
            contest = self.store.contests.get(location)
            joined = any(contest is own for own in self._contests)
            fits = (
                contest is not None and contest.entry is None and set(contest.candidate_times) == {incumbent, *others}
            )
            if contest is None or not fits or (contest.request != request and not joined):
                # A new run with other lengths of the bucket: its times cannot be compared with the old ones.
                contest = self.store.contests[location] = Contest(location, request, incumbent, others, entry)
                contest.owner, joined = self, False
            if not joined:
                self._contests.append(contest)
            return contest

    def candidates(self, request: AttentionRequest, incumbent: str, accuracy: str) -> tuple[str, ...]:
        """The incumbent, then the other backends that may run this call, each kernel once."""
        known = self._candidates.get((request, incumbent, accuracy))
        if known is not None:
            return known
        names = candidates(self.session.router, request, incumbent, accuracy, self.session.failed)
        return self._candidates.setdefault((request, incumbent, accuracy), names)

    def share(self, contest: Contest) -> float:
        """Share of the trial budget that may be used by now, 0 to 1."""
        if contest.owner is not self or not self.steps:
            return 1.0  # a later run continues a contest; or a program without steps
        if self.steps < FIRST_STEP:
            return 0.0
        return min((self.steps - FIRST_STEP + 1) / (LAST_STEP - FIRST_STEP + 1), 1.0)

    def record_time(self, contest: Contest, name: str, ms: float) -> None:
        with self.store.lock:
            if contest.is_open:
                contest.record_time(name, ms)
                self._keep_outcome(contest)

    def computed_whole(self, contest: Contest, name: str) -> None:
        """A sparse candidate computed a call whole, as some do in the first steps."""
        with self.store.lock:
            if contest.is_open:
                contest.computed_whole(name, self.steps)
                self._keep_outcome(contest)

    def reject(self, contest: Contest, name: str, reason: str) -> None:
        log.info("autotune: %s is rejected for %s: %s", name, contest.request.describe(), reason)
        with self.store.lock:
            contest.untimed(name)
            if contest.is_open:
                contest.reject(name, reason)
                self._keep_outcome(contest)

    def failed(self, plan: Plan, error: Exception) -> None:
        """Reject a kernel that raised in a run wherever it is the stored winner."""
        if plan.decision.asked == AUTOTUNE:
            keys = {key_of(name, plan.request) for name in self._names(plan.row.role)}
            self._dismiss(plan.decision.backend, lambda key: key in keys, failure(error))

    def _names(self, role: str) -> set[str]:
        """The names under which the store may have calls of a role: itself and its category."""
        return {role, self.session.run_report.categories.get(role, role)}

    def _dismiss(self, winner: str, applies_to: Callable[[TuningKey], bool], reason: str) -> None:
        """Make the next fastest candidate win where `winner` did, for keys that `applies_to` accepts."""
        for location, entry in self._entries.items():
            if entry is None or entry.winner != winner or winner == entry.incumbent or not applies_to(entry.key):
                continue
            if entry.ms.keys() <= {winner}:
                continue  # imported entry without another candidate
            entry = self._entries[location] = without_winner(entry, reason)
            self.store.put(entry)

    def fault(self, contest: Contest, name: str, reason: str) -> None:
        """A candidate left the device unusable: store its rejection and end the contest."""
        with self.store.lock:
            if contest.is_open:
                contest.candidate_times[name].out = reason
                contest.end()
                self._keep_outcome(contest)

    def _keep_outcome(self, contest: Contest) -> None:
        """Store the outcome of a contest that has just ended."""
        if contest.entry is None:
            return
        _, accuracy, key = contest.location
        if self.anew:
            contest.entry = contest.entry._replace(origin="tune")
        self._entries[accuracy, key] = contest.entry
        self.store.contests.pop(contest.location, None)
        self.store.put(contest.entry)
        out = "".join(f"; {name}: {reason}" for name, reason in contest.entry.rejected.items())
        log.info("autotune: %s for role %s, %s (%s)%s", contest.entry.winner, key.role, contest.request.describe(),
                 contest.entry.summary(), out)  # fmt: skip
