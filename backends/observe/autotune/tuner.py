"""Measured choice: which backend is fastest for a kind of call is tried in a real run, kept, and used from then on.

A session whose configuration says `autotune` has a `Tuner`. Where the store knows the winner, a call's plan is the
plain plan of that backend. Where it does not, the plan's kernel is a `Trial` (`trial.py`), which lets the candidates of
a `Race` compute some of the calls.

Boundary: sessions and clocks; the arithmetic of the race is in `race.py`, what is kept in `store.py`. It knows nothing
of ComfyUI.
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
from .entry import Entry
from .race import Race, without_winner
from .store import Store, environment_of
from .trial import Trial, failure

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

    of_the_work: bool

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
        elif not self.clock.of_the_work:
            self.paused = f"work on {platform.kind} cannot be timed"
        self.judge = Guard("enforce", RunReport(mode="off"), everything=True)
        """Looks at the first call of each candidate; what it finds is no business of the run's own guard."""
        self.steps = 0
        self._step: object = None
        self._entries: dict[tuple[str, TuningKey], Entry | None] = {}
        self._candidates: dict[tuple[AttentionRequest, str, str], tuple[str, ...]] = {}
        self._races: list[Race] = []
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
            for race in self._races:
                race.forget_waiting()
        self._races.clear()
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

        def plain(backend: str, state: str, words: str) -> Plan:
            session.run_report.tuning.kinds[key] = state
            return self.plain(kind, decision, backend, words)

        incumbent, *others = self.candidates(request, decision.backend, accuracy)
        entry = self._known(accuracy, key, incumbent, others)
        if entry is None and kind.category != role:  # what was measured from presets has only categories
            entry = self._known(accuracy, key._replace(role=kind.category), incumbent, others)
        put_off = [] if entry is None or self.paused else [name for name in others if name in entry.put_off]
        if entry is not None and not put_off:
            backend, words = self.found(entry, request, incumbent)
            return plain(backend, FROM_STORE, words)
        if not others:
            return plain(incumbent, NOT_TUNED, f"no other backend can run this call with accuracy {accuracy}")
        if self.paused:
            return plain(incumbent, NOT_TUNED, f"nothing is tried: {self.paused}")
        if entry is not None:  # what it put off is tried against its winner
            incumbent, others = self.found(entry, request, incumbent)[0], put_off
        race = self._race((self.environment, accuracy, key), request, incumbent, tuple(others), entry)
        if race.ended is not None:
            return plain(incumbent, NOT_TUNED, race.ended)
        return Trial(self, race, slot, plain(incumbent, OPEN, "tuning"), decision)

    def plain(self, kind: CallKind, decision: Decision, backend: str, words: str) -> Plan:
        """The plan of one backend; `words` say in the run report why it is that one."""
        rejected = decision.rejected if backend == decision.backend else ()
        source = f"{decision.source}: {AUTOTUNE} ({words})"
        chosen = replace(decision, backend=backend, source=source, rejected=rejected, notes=())
        return self.session.plan_of(kind, chosen)

    def found(self, entry: Entry, request: AttentionRequest, incumbent: str) -> tuple[str, str]:
        """The winner, or `auto`'s choice where the winner cannot run this very call of the bucket; and why."""
        router, winner = self.session.router, entry.winner
        refused = router.reasons_against(winner, request, self.session.failed)
        if not refused and winner != incumbent:  # as of candidates: of lengths in one bucket it may be wrong for some
            refused = tuple(router.backends[winner].avoid_reasons(request, router.platform))
        return (incumbent, f"{entry.winner} is out: {refused[0]}") if refused else (entry.winner, entry.words())

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

    def _race(
        self,
        place: tuple[str, str, TuningKey],
        request: AttentionRequest,
        incumbent: str,
        others: tuple[str, ...],
        entry: Entry | None,
    ) -> Race:
        """The race for calls of this kind, begun where there is none."""
        with self.store.lock:
            race = self.store.races.get(place)
            joined = any(race is one for one in self._races)
            fits = race is not None and race.entry is None and set(race.runners) == {incumbent, *others}
            if race is None or not fits or (race.request != request and not joined):
                # In a new run whose lengths are others of the same bucket, times of the old ones mean nothing.
                race = self.store.races[place] = Race(place, request, incumbent, others, entry)
                race.owner, joined = self, False
            if not joined:
                self._races.append(race)
            return race

    def candidates(self, request: AttentionRequest, incumbent: str, accuracy: str) -> tuple[str, ...]:
        """The incumbent, then what else may run this call; of backends that are the same kernel, one."""
        known = self._candidates.get((request, incumbent, accuracy))
        if known is not None:
            return known
        found = candidates(self.session.router, request, incumbent, accuracy, self.session.failed)
        return self._candidates.setdefault((request, incumbent, accuracy), found)

    def share(self, race: Race) -> float:
        """How much of the trials' budget may be used by now."""
        if race.owner is not self or not self.steps:
            return 1.0  # a later run, which goes on where the first was too short; or a program without steps
        if self.steps < FIRST_STEP:
            return 0.0
        return min((self.steps - FIRST_STEP + 1) / (LAST_STEP - FIRST_STEP + 1), 1.0)

    def took(self, race: Race, name: str, ms: float) -> None:
        """The time of a call has come."""
        with self.store.lock:
            if race.is_open:
                race.took(name, ms)
                self._after(race)

    def reject(self, race: Race, name: str, reason: str) -> None:
        """A candidate is out."""
        log.info("autotune: %s is out for %s: %s", name, race.request.describe(), reason)
        with self.store.lock:
            race.untimed(name)
            if race.is_open:
                race.reject(name, reason)
                self._after(race)

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
        for place, entry in self._entries.items():
            if entry is None or entry.winner != winner or winner == entry.incumbent or not concerns(entry.key):
                continue
            if entry.ms.keys() <= {winner}:
                continue  # of a document by hand: nothing is left to win
            entry = self._entries[place] = without_winner(entry, reason)
            self.store.put(entry)

    def fault(self, race: Race, name: str, reason: str) -> None:
        """A candidate left the device unusable, so nothing more can be found out: keep that it must not be tried."""
        with self.store.lock:
            if race.is_open:
                race.runners[name].out = reason
                race.end()
                self._after(race)

    def _after(self, race: Race) -> None:
        """Keep the outcome of a race that has just ended."""
        if race.entry is None:
            return
        _, accuracy, key = race.place
        if self.anew:
            race.entry = race.entry._replace(origin="tune")
        self._entries[accuracy, key] = race.entry
        self.store.races.pop(race.place, None)
        self.store.put(race.entry)
        out = "".join(f"; {name}: {reason}" for name, reason in race.entry.rejected.items())
        log.info("autotune: %s for role %s, %s (%s)%s", race.entry.winner, key.role, race.request.describe(),
                 race.entry.words(), out)  # fmt: skip
