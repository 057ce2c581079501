"""Measured choice: which backend is fastest for a kind of call is tried in a real run, kept, and used from then on.

A session whose configuration says `autotune` has a `Tuner`. Where the store knows the winner, a call's plan is that of
the winner's backend. Where it does not, the plan is a `TrialPlan` (`trial_plan.py`), which lets the candidates of a
`Contest` compute some of the calls.

Boundary: sessions and clocks; the arithmetic of a contest is in `contest.py`, what is kept in `store.py`. It knows
nothing of ComfyUI.
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
"""Steps of a run over which trials are spread; a run with few calls in a step goes on with them after the last. The
first step still loads and compiles."""


class Clock(Protocol):
    """What is needed of a `DeviceClock`."""

    measures_device_time: bool

    def start(self, device: torch.device | None = None) -> Any: ...

    def stop(self, token: Any, sink: Callable[[float], None]) -> None: ...

    def collect(self, wait: bool = False) -> None: ...


class Tuner(Chooser, Observer):
    """Measured choice for one session; what is found is shared through the store. Not shared between threads."""

    def __init__(self, session: Session, store: Store, clock: Clock | None = None, *, anew: bool = False) -> None:
        """
        Args:
            clock: in place of the device's own.
            anew: for the command `tune`, which measures also what is in the store.
        """
        platform = session.router.platform
        self.session = session
        self.guard = session.registered(Guard)
        self.store = store
        self.clock: Clock = clock if clock is not None else DeviceClock(platform.kind)
        self.anew = anew
        self.environment = environment_of(platform)
        self.paused: str | None = None
        """Why nothing is tried; what the store knows is used all the same."""
        if record_of(session.layers) is not None:
            self.paused = "a recorded run is repeated"
        elif not self.clock.measures_device_time:
            self.paused = f"work on {platform.kind} cannot be timed"
        self.judge = Guard("enforce", RunReport(mode="off"), everything=True)
        """Looks at the first call of each candidate; what it finds is no business of the run's own guard."""
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
        """At the end of a run: take in the times that are there, and say in the account what was tried."""
        self.clock.collect()
        with self.store.lock:
            for contest in self._contests:
                contest.forget_waiting()
        self._contests.clear()
        run_report = self.session.run_report
        for row in list(run_report.rows.values()):
            if row.asked == AUTOTUNE and row.guard is not None and row.guard.first_alarm:
                names, alarm = self._names(row.role), f"guard: {row.guard.first_alarm}"
                self._dismiss(row.backend, lambda key, names=names: key.role in names, alarm)  # type: ignore[misc]
        self.store.flush()
        if text := run_report.tuning.note():
            run_report.note(text)
            if run_report.recorder is not None:
                run_report.recorder.not_repeated[f"{text}: some calls ran other kernels, to be timed"] = None

    def plan(self, slot: Slot, kind: CallKind, decision: Decision) -> Plan | None:
        """How calls run for which `autotune` was asked; None for others.

        Args:
            decision: what `auto` would take, from the source that asks for `autotune`.
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
        if entry is None and kind.category != role:  # what was measured from presets has only categories
            entry = self._known(accuracy, key._replace(role=kind.category), incumbent, others)
        deferred = [] if entry is None or self.paused else [name for name in others if name in entry.deferred]
        if entry is not None and not deferred:
            backend, why = self.winner_for(entry, request, incumbent)
            return plain(backend, FROM_STORE, why)
        if not others:
            return plain(incumbent, NOT_TUNED, f"no other backend can run this call with accuracy {accuracy}")
        if self.paused:
            return plain(incumbent, NOT_TUNED, f"nothing is tried: {self.paused}")
        if entry is not None:  # what it put off is tried against its winner
            incumbent, others = self.winner_for(entry, request, incumbent)[0], deferred
        contest = self._contest((self.environment, accuracy, key), request, incumbent, tuple(others), entry)
        if contest.ended is not None:
            return plain(incumbent, NOT_TUNED, contest.ended)
        return TrialPlan(self, contest, slot, plain(incumbent, OPEN, "tuning"), decision)

    def plain(self, kind: CallKind, decision: Decision, backend: str, why: str) -> Plan:
        """The plan of one backend; `why` says in the run report why it is that one."""
        rejected = decision.rejected if backend == decision.backend else ()
        source = f"{decision.source}: {AUTOTUNE} ({why})"
        chosen = replace(decision, backend=backend, source=source, rejected=rejected, notes=())
        return self.session.plan_of(kind, chosen)

    def winner_for(self, entry: Entry, request: AttentionRequest, incumbent: str) -> tuple[str, str]:
        """The winner, or `auto`'s choice where the winner cannot run this very call of the bucket; and why."""
        router, winner = self.session.router, entry.winner
        refused = router.reasons_against(winner, request, self.session.failed)
        if not refused and winner != incumbent:  # as of candidates: of lengths in one bucket it may be wrong for some
            refused = tuple(router.backends[winner].avoid_reasons(request, router.platform))
        return (incumbent, f"{entry.winner} is out: {refused[0]}") if refused else (entry.winner, entry.summary())

    def _known(self, accuracy: str, key: TuningKey, incumbent: str, others: list[str]) -> Entry | None:
        """What the store has for this key, unless there is a candidate by now that it says nothing about.

        Its word is not taken for what may run: entries can come from a document that anybody wrote.
        """
        if (accuracy, key) not in self._entries:
            found = None if self.anew else self.store.get(key, self.environment, accuracy)
            self._entries[accuracy, key] = found
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
        """The race for calls of this kind, begun where there is none."""
        with self.store.lock:
            contest = self.store.contests.get(location)
            joined = any(contest is one for one in self._contests)
            fits = (
                contest is not None and contest.entry is None and set(contest.candidate_times) == {incumbent, *others}
            )
            if contest is None or not fits or (contest.request != request and not joined):
                # In a new run whose lengths are others of the same bucket, times of the old ones mean nothing.
                contest = self.store.contests[location] = Contest(location, request, incumbent, others, entry)
                contest.owner, joined = self, False
            if not joined:
                self._contests.append(contest)
            return contest

    def candidates(self, request: AttentionRequest, incumbent: str, accuracy: str) -> tuple[str, ...]:
        """The incumbent, then what else may run this call; of backends that are the same kernel, one."""
        known = self._candidates.get((request, incumbent, accuracy))
        if known is not None:
            return known
        found = candidates(self.session.router, request, incumbent, accuracy, self.session.failed)
        return self._candidates.setdefault((request, incumbent, accuracy), found)

    def share(self, contest: Contest) -> float:
        """How much of the trials' budget may be used by now."""
        if contest.owner is not self or not self.steps:
            return 1.0  # a later run, which goes on where the first was too short; or a program without steps
        if self.steps < FIRST_STEP:
            return 0.0
        return min((self.steps - FIRST_STEP + 1) / (LAST_STEP - FIRST_STEP + 1), 1.0)

    def record_time(self, contest: Contest, name: str, ms: float) -> None:
        """The time of a call has come."""
        with self.store.lock:
            if contest.is_open:
                contest.record_time(name, ms)
                self._keep_outcome(contest)

    def reject(self, contest: Contest, name: str, reason: str) -> None:
        """A candidate is out."""
        log.info("autotune: %s is out for %s: %s", name, contest.request.describe(), reason)
        with self.store.lock:
            contest.untimed(name)
            if contest.is_open:
                contest.reject(name, reason)
                self._keep_outcome(contest)

    def failed(self, plan: Plan, error: Exception) -> None:
        """A kernel raised an error in a run: where the store has it as winner, another one wins from now on."""
        if plan.decision.asked == AUTOTUNE:
            keys = {key_of(name, plan.request) for name in self._names(plan.row.role)}
            self._dismiss(plan.decision.backend, lambda key: key in keys, failure(error))

    def _names(self, role: str) -> set[str]:
        """The roles under which the store may have calls of a role."""
        return {role, self.session.run_report.categories.get(role, role)}

    def _dismiss(self, winner: str, concerns: Callable[[TuningKey], bool], reason: str) -> None:
        """Have the next best one win wherever this one did."""
        for location, entry in self._entries.items():
            if entry is None or entry.winner != winner or winner == entry.incumbent or not concerns(entry.key):
                continue
            if entry.ms.keys() <= {winner}:
                continue  # of a document by hand: nothing is left to win
            entry = self._entries[location] = without_winner(entry, reason)
            self.store.put(entry)

    def fault(self, contest: Contest, name: str, reason: str) -> None:
        """A candidate left the device unusable, so nothing more can be found out: keep that it must not be tried."""
        with self.store.lock:
            if contest.is_open:
                contest.candidate_times[name].out = reason
                contest.end()
                self._keep_outcome(contest)

    def _keep_outcome(self, contest: Contest) -> None:
        """Keep the outcome of a race that has just ended."""
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
