"""A run of a chosen model: its run report, a session for each device, and where in the scheduler's steps it is.

A run begins with the first forward after the scheduler's `set_timesteps` or last step, and ends with the next one, with
`reset`, or with the `with` block. Without a scheduler there is one run. Runs are recorded per thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from ...backends.config import AttentionConfig
from ...backends.config.layers import asks_for_sparse, cards_of, record_of
from ...backends.config.schedule import is_scheduled
from ...backends.config.timetable import ALWAYS, Timetable, Window
from ...backends.engine.plan import Slot
from ...backends.engine.routers import router_for
from ...backends.engine.session import Session
from ...backends.observe.advisories import unused_advisories
from ...backends.observe.autotune.store import default_path
from ...backends.observe.autotune.tuner import Tuner
from ...backends.observe.guard.turns import Step
from ...backends.observe.replay.run_recorder import RunRecorder
from ...backends.observe.run_session import RunSession, tuner_of
from ...backends.report import RunReport
from ...backends.report.audit import NEVER_CALLED, asked_and_ran
from ...backends.values.devices import synchronise
from .model_calls import CallPlan, ModelCall

if TYPE_CHECKING:
    from ...backends.parallel.group_session import GroupSession
    from ...backends.parallel.rank_group import RankGroup
    from .routing import Routing

log = logging.getLogger("attention_backends")


class DeviceSession(RunSession):
    """A session with the plans of one run on one device."""

    def __init__(self, run: Run, device: torch.device) -> None:
        super().__init__(router_for(device), run.layers, run.run_report, device, _tuner_of)
        if cards_of(run.layers):
            from ...backends.cards.over import divide

            divide(self, device, router_for)
        self.plans: dict[tuple[Any, ...], CallPlan] = {}
        self.by_mask: dict[tuple[Any, ...], Slot] = {}
        self.in_group: GroupSession | None = None
        """Plans what this process computes of calls that all processes of a group make; None before the first."""
        self.ranks: RankGroup | None = None
        """These processes."""

    def forget(self) -> None:
        """Drop all plans; the run report continues."""
        self.plans.clear()
        self.by_mask.clear()


def _tuner_of(session: Session) -> Tuner | None:
    return tuner_of(session, default_path)


class Steps:
    """The steps of a scheduler, as host numbers, from its last `set_timesteps`."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.timesteps = getattr(scheduler, "timesteps", None)
        times = self.timesteps
        self.times: list[float] = times.flatten().tolist() if isinstance(times, torch.Tensor) else []
        self.count = len(self.times)
        self.sigmas = self._sigmas()
        self._first = getattr(scheduler, "step_index", None)
        self._begin: int | None = None
        """The step of the first forward, which holds until the scheduler counts."""

    def _sigmas(self) -> list[float]:
        """One more than steps: the scheduler's own, else those of its training noise at its timesteps."""
        own = getattr(self.scheduler, "sigmas", None)
        if isinstance(own, torch.Tensor) and len(own) > self.count:
            return [float(sigma) for sigma in own.flatten().tolist()[: self.count + 1]]
        shares = getattr(self.scheduler, "alphas_cumprod", None)
        if isinstance(shares, torch.Tensor):
            values = shares.tolist()
            kept = [values[min(max(round(time), 0), len(values) - 1)] for time in self.times]
            return [((1 - share) / share) ** 0.5 for share in kept] + [0.0]
        return [1 - at / max(self.count, 1) for at in range(self.count + 1)]

    def percent_to_sigma(self, percent: float) -> float:
        """The sigma at this share of the steps."""
        at = min(max(percent, 0.0), 1.0) * self.count
        first = min(int(at), self.count)
        last = min(first + 1, self.count)
        return self.sigmas[first] + (at - first) * (self.sigmas[last] - self.sigmas[first])

    def has_moved(self) -> bool:
        """Whether the scheduler made a step since; of one that does not count its steps it is not known."""
        return not hasattr(self.scheduler, "step_index") or self.scheduler.step_index != self._first

    def are_over(self) -> bool:
        """Whether the last step was made since, so that a forward now is of another run."""
        index = getattr(self.scheduler, "step_index", None)
        return index is not None and index >= self.count and index != self._first

    def now(self, timestep: Any) -> int | None:
        """The step of a forward that begins, from 0; None without a scheduler's steps, and after the last one.

        The scheduler counts its steps, but for a few that do not; there the forward's own timestep tells, which is
        read from its device.
        """
        if not self.count:
            return None
        if hasattr(self.scheduler, "step_index"):
            index = self.scheduler.step_index
            if index is None:
                index = getattr(self.scheduler, "begin_index", None)
            if index is None:
                index = self._begin if self._begin is not None else self._step_of(timestep)
                self._begin = index
            return int(index) if index < self.count else None
        value = _number(timestep)
        return None if value is None else min(range(self.count), key=lambda at: abs(self.times[at] - value))

    def _step_of(self, timestep: Any) -> int:
        """The step of the first forward, as a program's own loop may begin anywhere; 0 where its timestep is no help.

        Models get the scheduler's timestep, or its share of the timesteps in training (FLUX).
        """
        value = _number(timestep)
        if value is None:
            return 0
        whole = float(getattr(getattr(self.scheduler, "config", None), "num_train_timesteps", 1000))
        for scale in (whole, 1.0) if value <= 1 else (1.0,):
            for at, time in enumerate(self.times):
                if abs(time - value * scale) <= 1e-5 * whole:
                    return at
        return 0


def _number(timestep: Any) -> float | None:
    """A forward's timestep; None where there is none that can be read."""
    if isinstance(timestep, torch.Tensor):
        return float(timestep.flatten()[0]) if timestep.numel() and timestep.device.type != "meta" else None
    return float(timestep) if isinstance(timestep, int | float) else None


class Run:
    """One run in one thread."""

    def __init__(self, routing: Routing, layers: tuple[AttentionConfig, ...], scheduler: Any) -> None:
        self.routing = routing
        self.layers = layers
        self.steps = Steps(scheduler) if scheduler is not None else None
        self.run_report = RunReport(layers=layers)
        self.run_report.recorder = RunRecorder()
        self.run_report.model = type(routing.model).__name__
        self.run_report.steps = 0 if self.steps is None else self.steps.count
        self.record = record_of(layers)
        self.is_over = False
        self.finds_grid = asks_for_sparse(layers)
        self.timetable = self._timetable() if is_scheduled(layers) else None
        self._model_calls: dict[torch.device, ModelCall] = {}
        self._sessions: dict[torch.device, DeviceSession] = {}
        self._marks: dict[int, object] = {}
        self._windows: dict[Window, Window] = {}
        self._samples: list[tuple[Any, int]] = []

    def is_of(self, scheduler: Any) -> bool:
        """Whether the scheduler's steps are still those of this run."""
        if self.is_over:
            return False
        if self.steps is None or scheduler is None:
            return self.steps is None and scheduler is None
        steps = self.steps
        same = steps.scheduler is scheduler and steps.timesteps is getattr(scheduler, "timesteps", None)
        return same and not steps.are_over()

    def _timetable(self) -> Timetable:
        steps = self.steps
        if steps is None or not steps.count:
            return Timetable(self.layers, blocks=self.routing.blocks)
        return Timetable(self.layers, steps.sigmas, steps.percent_to_sigma, self.routing.blocks)

    def note(self, text: str) -> None:
        """Put a note into the run report; log it the first time."""
        if self.run_report.note(text):
            log.warning("%s", text)

    def session(self, device: torch.device) -> DeviceSession:
        """The session of a device, made on first use."""
        found = self._sessions.get(device)
        if found is None:
            self.run_report.device = device.type
            found = self._sessions[device] = DeviceSession(self, device)
            if self.record is not None:
                for text in self.record.remarks(self.run_report.node_id, found.router.platform):
                    self.note(text)
        return found

    def begin(self, device: torch.device, given: dict[str, Any]) -> ModelCall:
        """A forward of the model begins.

        Args:
            device: of its first tensor.
            given: its arguments by name.
        """
        self.run_report.started = self.run_report.started or perf_counter()
        session = self.session(device)
        model_call = self._model_calls.get(device)
        if model_call is None:
            model_call = self._model_calls[device] = ModelCall(self, session)
        step = self.steps.now(given.get("timestep")) if self.steps is not None else None
        model_call.step, model_call.module = step, None
        model_call.mask_plans.clear()
        entries = ALWAYS.entries
        if self.timetable is not None:
            sigma = None if step is None or self.steps is None else self.steps.sigmas[step]
            entries = self.timetable.at(sigma, step)
        number = self.run_report.timeline.model_calls + 1
        segment = 0 if self.record is None else self.record.run_of(self.run_report.node_id).part(number)
        grids = 0
        if self.finds_grid:
            model_call.grids, grids = self.routing.grids(given)
            self._progress(session, step, given)
        window = ALWAYS
        if entries or segment or grids:
            window = Window(entries, segment, grids)
            window = self._windows.setdefault(window, window)
        model_call.window = window
        if self.run_report.recorder is not None:
            self.run_report.recorder.begin_model_call(number, model_call.window)
        if session.tuner is not None:
            session.tuner.model_call(self.mark(step))
        return model_call

    def _progress(self, session: DeviceSession, step: int | None, given: dict[str, Any]) -> None:
        progress = session.progress
        progress.step = step
        progress.steps = self.steps.count if self.steps is not None and self.steps.count else None
        progress.sigma = None if step is None or self.steps is None else self.steps.sigmas[step]
        progress.blocks = self.routing.blocks
        progress.samples = self._identities(given)
        progress.calls += 1

    def _identities(self, given: dict[str, Any]) -> tuple[Hashable, ...]:
        """The identity of each sample: the prompt's tensor, which a pipeline gives at each step, and its number."""
        prompt, image = given.get("encoder_hidden_states"), given.get("hidden_states", given.get("sample"))
        if not isinstance(prompt, torch.Tensor) or not isinstance(image, torch.Tensor):
            return ()
        number = next((number for known, number in self._samples if known is prompt), None)
        if number is None:
            if len(self._samples) >= 16:  # made anew at each step: the samples cannot be told apart
                return ()
            number = len(self._samples)
            self._samples.append((prompt, number))
        return tuple((number, at) for at in range(image.shape[0]))

    def mark(self, step: int | None) -> object | None:
        """One object for all forwards of a step."""
        return None if step is None else self._marks.setdefault(step, object())

    def guarded(self, model_call: ModelCall, forward: Callable[[], Any]) -> Any:
        """The forward, whose output the guard looks at where one is on."""
        session = model_call.session
        guard = session.guard
        if guard is None:
            return forward()
        step, at = model_call.step, None
        if step is not None and self.steps is not None:
            unchanged = self.timetable.unchanged(step) if self.timetable is not None and self.timetable.timed else None
            at = Step(step, self.steps.count, unchanged)
        any_process = None
        if guard.enforces and getattr(self.routing.model, "_parallel_config", None) is not None:
            from . import in_group

            any_process = partial(in_group.any_process, session)
        return guard.model_call(self.mark(step), forward, forward, at, any_process)

    def end(self, model_call: ModelCall, device: torch.device) -> None:
        """A forward of the model has ended."""
        clock = model_call.session.device_clock
        model_call.mask_plans.clear()
        self.run_report.end_of_model_call(clock, device, step=model_call.step)

    def settle(self) -> None:
        """Wait for the devices and add what they know."""
        for device, session in self._sessions.items():
            synchronise(device)
            if session.guard is not None:
                session.guard.flush()
        if self.run_report.started is not None:
            self.run_report.seconds = round((self.run_report.last_time or perf_counter()) - self.run_report.started, 6)
        self.run_report.end_of_run()

    def close(self) -> None:
        """The run is over: notes on what had no effect, and nothing is kept."""
        if self.is_over:
            return
        self.is_over = True
        self.settle()
        for text in self.unmatched():
            self.note(text)
        family = self.routing.family
        for text in unused_advisories(family.name if family is not None else "", self.run_report) \
                if self.run_report.timeline.model_calls else ():  # fmt: skip
            self.run_report.note(text)
        for session in self._sessions.values():
            if session.tuner is not None:
                session.tuner.close()
            session.progress.kept.clear()
            session.forget()
        self.routing.forget_plans()
        self._model_calls.clear()
        self._samples.clear()

    def unmatched(self) -> Iterator[str]:
        """What of the configuration had no effect: in the run until now, where it is over or had its last step."""
        calls = self.run_report.timeline.model_calls
        if not calls:
            return
        if self.timetable is not None and self.timetable.timed and (why := self._no_steps(calls)):
            yield f"schedules count a scheduler's steps: {why}; pass scheduler=, the one of the pipeline that runs"
        if not (self.is_over or self._is_whole()):
            return
        if self.timetable is not None:
            yield from chain(self.timetable.unused(self.run_report.categories), self.timetable.remarks())
        for finding in asked_and_ran(self.run_report):
            if finding.verdict == NEVER_CALLED:
                yield from finding.reasons
        if self.record is not None:
            yield from self.record.after(self.run_report.node_id, calls)

    def _is_whole(self) -> bool:
        """Whether the scheduler's last step was reached; true without one."""
        steps = self.steps.count if self.steps is not None else 0
        return (self.run_report.steps_reached() or 0) >= steps

    def _no_steps(self, calls: int) -> str:
        """Why the steps are not known; empty where they are."""
        if self.steps is None or not self.steps.count:
            return "none is known"
        moved = calls == 1 or self.steps.has_moved()
        return "" if moved else f"the {type(self.steps.scheduler).__name__} that is known made no step in this run"
