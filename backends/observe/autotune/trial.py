"""The kernel of a kind of call that is being measured: each call is computed once, by whoever's turn it is.

It writes into its plan what computes the call, so that the account counts it under that. A candidate that fails, runs
out of memory or is too far off is out, and the incumbent computes the call from the same tensors.

Boundary: one plan, its calls and its race; when trials are made is for `tuner.py` to say.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...engine.call_checks import CheckError, checked
from ...engine.plan import Plan
from ...engine.router import Decision
from ...guard import GuardAlarm, Watch
from ...kernels.backend import Kernel, for_scale
from ...report import Row
from ...report.timed_kernel import timed_kernel
from ...report.tuning import DECIDED, NOT_TUNED
from ...values.faults import check_output, is_cuda_fault, is_out_of_memory
from ...values.request import AttentionCall

if TYPE_CHECKING:
    import torch

    from .race import Race
    from .tuner import Tuner

LONGEST_REASON = 300


class Trial:
    """Runs the calls of one plan until the race is decided; then the plan is the winner's, and this is gone."""

    __slots__ = ("_decision", "_paths", "_plan", "_race", "_refused", "_tuner", "_usual")

    def __init__(self, tuner: Tuner, race: Race, plan: Plan, decision: Decision) -> None:
        """`plan` is the incumbent's, whose kernel is taken over; `decision` is what `auto` took."""
        self._tuner, self._race, self._plan, self._decision = tuner, race, plan, decision
        if plan.clock is not None:  # of the kernel alone, not of what a trial does beside it
            plan.kernel, plan.clock = timed_kernel(plan.kernel, plan.clock, plan.row), None
        self._usual = plan.decision, plan.row, plan.kernel
        self._paths: dict[str, tuple[Decision, Row, Kernel]] = {}
        self._refused: set[str] = set()
        """Candidates that cannot run this very kind of call."""

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        tuner, race = self._tuner, self._race
        if not race.is_open:
            self._settle()
            return self._plan.compute(call)
        if race.request != self._plan.request or self._is_refused() or _is_recorded(call):
            return self._usually(call)
        tuner.clock.collect()
        with tuner.store.lock:
            name = race.next(tuner.share(race), self._refused) if race.is_open else None
            if name is None or not self._can(name):
                return self._usually(call)
            is_first = race.begin(name)
        if name == race.incumbent:
            return self._usually(call, timed=True)
        output = self._tried(name, call, is_first)
        return self._usually(call) if output is None else output

    def _is_refused(self) -> bool:
        """Whether the guard has taken this block from kernels that are not exact."""
        guard, row = self._tuner.session.guard, self._usual[1]
        return guard is not None and guard.refusal(row.role, row.block) is not None

    def _usually(self, call: AttentionCall, *, timed: bool = False) -> torch.Tensor:
        """Let the incumbent compute the call."""
        plan, race = self._plan, self._race
        plan.decision, plan.row, kernel = self._usual
        if timed and isinstance(kernel, Watch) and kernel.may_check:  # its check is no part of the work
            timed = False
            with self._tuner.store.lock:
                race.untimed(race.incumbent)
        if timed:
            kernel = self._timed(race.incumbent, kernel)
        try:
            return kernel(call)
        except Exception as error:
            if not isinstance(error, GuardAlarm | CheckError) and not is_out_of_memory(error):
                race.ended = f"{race.incumbent} failed while it was measured"
                self._tuner.store.races.pop(race.place, None)  # in this run; the next one may try again
            raise

    def _tried(self, name: str, call: AttentionCall, is_first: bool) -> torch.Tensor | None:
        """Let a candidate compute the call; None where it is out and the call is still to be computed."""
        tuner, plan, race = self._tuner, self._plan, self._race
        plan.decision, plan.row, kernel = self._paths[name]
        tuner.trials += 1
        call.owned = False  # one that fails must leave the tensors for the incumbent
        run = self._timed(name, kernel)
        guard, router = tuner.session.guard, tuner.session.router
        backend = router.backends[name]
        try:
            if not is_first and not (guard is not None and guard.enforces and guard.covers(backend.accuracy)):
                output = run(call)
                check_output(output, call)
                return output
            budget = backend.tolerance_on(router.platform)
            watch = Watch(tuner.judge, run, budget, Row(plan.row.role, plan.row.block, name, "", ""))
            return tuner.judge.check(watch, call, 0)
        except GuardAlarm as alarm:
            reason = str(alarm).removeprefix("guard: ").removesuffix(" in call 1 of the block")
        except CheckError:
            raise
        except Exception as error:
            failed = failure(error)
            if is_cuda_fault(error):
                tuner.fault(race, name, failed)
                raise  # the session says which kernel it was
            reason = "out of memory in a trial" if is_out_of_memory(error) else failed
        tuner.judge.refused.clear()
        tuner.reject(race, name, reason)
        if call.query.is_cuda:
            import torch

            torch.cuda.empty_cache()  # what it left behind must not be missing elsewhere
        return None

    def _timed(self, name: str, kernel: Kernel) -> Kernel:
        """The kernel with its times sent to the race."""
        tuner, race = self._tuner, self._race

        def run(call: AttentionCall) -> torch.Tensor:
            token = tuner.clock.start(call.query.device)
            output = kernel(call)
            if token is None:
                with tuner.store.lock:
                    race.untimed(name)
            else:
                tuner.clock.stop(token, lambda ms: tuner.took(race, name, ms))
            return output

        return run

    def _can(self, name: str) -> bool:
        """Whether a candidate can run this plan's calls; makes its row and its kernel the first time."""
        if name == self._race.incumbent or name in self._paths:
            return True
        session, plan = self._tuner.session, self._plan
        usual, row, _ = self._usual
        if session.router.refuse(name, plan.request, session.failed):
            self._refused.add(name)
            return False
        decision = replace(usual, backend=name, rejected=())
        mine = session.run_report.row(row.role, row.block, name, decision.source, row.mask, None, decision.asked)
        mine.member = session.router.backends[name].member(plan.request, session.router.platform)
        kernel = for_scale(session._kernel(decision), plan.request.scale)
        if session.device_clock is not None:
            kernel = timed_kernel(kernel, session.device_clock, mine)
        guard, backend = session.guard, session.router.backends[name]
        if guard is not None and guard.covers(backend.accuracy):
            budget = backend.tolerance_on(session.router.platform)
            guard.watched(kernel, backend.accuracy, mine, budget)  # from now on it looks at the model's outputs
        self._paths[name] = decision, mine, checked(kernel) if session.checks else kernel
        return True

    def _settle(self) -> None:
        """The race is over: the plan becomes the plain plan of its winner, for good."""
        tuner, plan, race = self._tuner, self._plan, self._race
        plan.decision, plan.row, plan.kernel = self._usual
        row = plan.row
        if self._is_refused():
            return
        tuner.session.run_report.tuning.kinds[race.place[2]] = NOT_TUNED if race.entry is None else DECIDED
        backend, words = plan.decision.backend, str(race.ended)
        if race.entry is not None:
            backend, words = tuner.found(race.entry, plan.request, backend)
        final = tuner.plain(plan.request, self._decision, backend, words, row.role, row.block, row.mask)
        plan.become(final)
        recorder = tuner.session.run_report.recorder
        if recorder is not None:
            recorder.changed(plan, tuner.session.router)


def failure(error: Exception) -> str:
    """Why a kernel is out that raised this."""
    return f"failed: {type(error).__name__}: {error}"[:LONGEST_REASON]


def _is_recorded(call: AttentionCall) -> bool:
    """Whether a compiler traces this call or a CUDA graph records it: neither may hold a trial."""
    import torch

    if torch.compiler.is_compiling():
        return True
    return call.query.is_cuda and torch.cuda.is_current_stream_capturing()
