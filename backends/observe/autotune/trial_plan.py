"""The plan of a kind of call whose kernel is still being chosen: candidates take turns, each call is computed once.

`TrialPlan.decision` and `row` are those of the kernel that ran the latest call, so that counts go to it. A candidate
that fails, runs out of memory or exceeds its error budget is rejected, and the incumbent computes the call from the
same tensors. `tuner.py` decides when a slot gets such a plan.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...engine.call_checks import CheckError, checked
from ...engine.plan import Plan
from ...engine.router import Decision
from ...kernels.backend import Kernel
from ...report import Row
from ...report.timed_kernel import timed_kernel
from ...report.tuning import DECIDED, NOT_TUNED
from ...values.faults import check_output, is_cuda_fault, is_out_of_memory
from ...values.grid import Kept
from ...values.request import AttentionCall
from ..guard import GuardAlarm, GuardedKernel

if TYPE_CHECKING:
    import torch

    from ...engine.plan import Slot
    from .contest import Contest
    from .tuner import Tuner

LONGEST_REASON = 300


class TrialPlan(Plan):
    """Runs the calls of one slot until the contest is decided; then the slot gets the winner's plan."""

    __slots__ = ("_contest", "_decided", "_plans", "_ran", "_refused", "_slot", "_tuner", "_usual")

    def __init__(self, tuner: Tuner, contest: Contest, slot: Slot, usual: Plan, decided: Decision) -> None:
        """
        Args:
            slot: where this plan will be.
            usual: the incumbent's plan.
            decided: what `auto` takes.
        """
        self._tuner, self._contest, self._slot, self._usual, self._decided = tuner, contest, slot, usual, decided
        self.kind, self.strict, self.function, self.hosted = usual.kind, usual.strict, usual.function, usual.hosted
        self._ran = usual
        """The plan that computed the latest call."""
        self._plans: dict[str, Plan] = {}
        self._refused: set[str] = set()
        """Candidates that cannot run this very kind of call."""

    @property
    def is_trial(self) -> bool:
        return True

    @property
    def decision(self) -> Decision:  # type: ignore[override]  # of the latest call; nothing sets it
        return self._ran.decision

    @property
    def row(self) -> Row:  # type: ignore[override]  # likewise
        return self._ran.row

    def compute(self, call: AttentionCall) -> torch.Tensor:
        """Run the call by the candidate whose turn it is.

        Raises:
            KernelOutputError: as in `Plan.compute`, and whatever the incumbent's kernel raises.
        """
        tuner, contest = self._tuner, self._contest
        if not contest.is_open:
            self._settle()
            return self._slot.plan.compute(call)
        if contest.request != self.request or self._is_refused() or _is_recorded(call):
            return self._usually(call)
        tuner.clock.collect()
        with tuner.store.lock:
            refused = self._refused | contest.whole_in(tuner.steps)
            name = contest.next(tuner.share(contest), refused) if contest.is_open else None
            if name is None or not self._can(name):
                return self._usually(call)
            is_first = contest.begin(name)
        if name == contest.incumbent:
            return self._usually(call, timed=True)
        output = self._tried(name, call, is_first)
        return self._usually(call) if output is None else output

    def _is_refused(self) -> bool:
        """Whether the guard refuses inexact kernels in this role and block."""
        guard = self._tuner.guard
        return guard is not None and guard.refusal(self.kind.role, self.kind.block) is not None

    def _usually(self, call: AttentionCall, *, timed: bool = False) -> torch.Tensor:
        """Let the incumbent compute the call."""
        contest, self._ran = self._contest, self._usual
        kernel = self._usual.kernel
        if timed and isinstance(kernel, GuardedKernel) and kernel.may_check:  # its check is no part of the work
            timed = False
            with self._tuner.store.lock:
                contest.untimed(contest.incumbent)
        compute = self._timed(contest.incumbent, self._usual.compute) if timed else self._usual.compute
        try:
            return compute(call)
        except Exception as error:
            if not isinstance(error, GuardAlarm | CheckError) and not is_out_of_memory(error):
                contest.ended = f"{contest.incumbent} failed while it was measured"
                self._tuner.store.contests.pop(contest.location, None)  # for this run; the next one may try again
            raise

    def _tried(self, name: str, call: AttentionCall, is_first: bool) -> torch.Tensor | None:
        """Run the call with a candidate; None: it was rejected, and the incumbent must run the call."""
        tuner, contest, self._ran = self._tuner, self._contest, self._plans[name]
        call.owned = False  # if it fails, the incumbent needs the tensors
        run = self._timed(name, self._ran.kernel, self._ran.row.kept)
        guard, router = tuner.guard, tuner.session.router
        backend = router.backends[name]
        try:
            if not is_first and not (guard is not None and guard.enforces and guard.covers(backend.accuracy)):
                output = run(call)
                check_output(output, call)
                return output
            budget = backend.tolerance_on(router.platform)
            guarded = GuardedKernel(tuner.judge, run, budget, Row(self.kind.role, self.kind.block, name, "", ""))
            return tuner.judge.check(guarded, call, 0)
        except GuardAlarm as alarm:
            reason = str(alarm).removeprefix("guard: ").removesuffix(" in call 1 of the block")
        except CheckError:
            raise
        except Exception as error:
            failed = failure(error)
            if is_cuda_fault(error):
                tuner.fault(contest, name, failed)
                raise  # the session names the kernel
            reason = "out of memory in a trial" if is_out_of_memory(error) else failed
        tuner.judge.refused.clear()
        tuner.reject(contest, name, reason)
        if call.query.is_cuda:
            import torch

            torch.cuda.empty_cache()  # memory that the candidate cached
        return None

    def _timed(self, name: str, kernel: Kernel, kept: Kept | None = None) -> Kernel:
        """The kernel, with its times recorded in the contest.

        `kept`: of a sparse kernel. Where it computes a call whole, its time and its error are no evidence.
        """
        tuner, contest = self._tuner, self._contest

        def run(call: AttentionCall) -> torch.Tensor:
            before = 0 if kept is None else kept.calls
            token = tuner.clock.start(call.query.device)
            output = kernel(call)
            if kept is not None and kept.calls == before:
                tuner.computed_whole(contest, name)
            elif token is None:
                with tuner.store.lock:
                    contest.untimed(name)
            else:
                tuner.clock.stop(token, lambda ms: tuner.record_time(contest, name, ms))
            return output

        return run

    def _can(self, name: str) -> bool:
        """Whether a candidate can run this plan's calls; makes its row and kernel once."""
        if name == self._contest.incumbent or name in self._plans:
            return True
        session, usual, platform = self._tuner.session, self._usual, self._tuner.session.router.platform
        if session.router.reasons_against(name, self.request, session.failed):
            self._refused.add(name)
            return False
        decision, backend = replace(usual.decision, backend=name, rejected=()), session.router.backends[name]
        row = session.run_report.row(
            self.kind.role, self.kind.block, name, decision.source, usual.row.mask, None, decision.asked
        )
        row.member = backend.kernel_name(self.request, platform)
        kernel = session.kernel_of_row(decision, self.kind, row)
        if session.device_clock is not None:
            kernel = timed_kernel(kernel, session.device_clock, row)
        guard = self._tuner.guard
        if guard is not None and guard.covers(backend.accuracy):
            # So that the run's guard checks the model's outputs; the candidate's own output is checked in `_tried`.
            guard.watched(kernel, backend.accuracy, row, backend.tolerance_on(platform))
        kernel = checked(kernel) if session.checks else kernel
        self._plans[name] = Plan(self.kind, decision, kernel, row, self.strict)
        return True

    def _settle(self) -> None:
        """Put the winner's plan into the slot."""
        tuner, slot, contest = self._tuner, self._slot, self._contest
        slot.plan = self._usual
        if self._is_refused():
            return
        tuner.session.run_report.tuning.kinds[contest.location[2]] = NOT_TUNED if contest.entry is None else DECIDED
        backend, why = self._usual.decision.backend, str(contest.ended)
        if contest.entry is not None:
            backend, why = tuner.winner_for(contest.entry, self.request, backend)
        slot.plan = tuner.plain(self.kind, self._decided, backend, why)
        tuner.session.notify_changed(slot)


def failure(error: Exception) -> str:
    """The reason against a kernel that raised `error`."""
    return f"failed: {type(error).__name__}: {error}"[:LONGEST_REASON]


def _is_recorded(call: AttentionCall) -> bool:
    """Whether a compiler traces this call or a CUDA graph captures it: a trial must not be part of either."""
    import torch

    if torch.compiler.is_compiling():
        return True
    return call.query.is_cuda and torch.cuda.is_current_stream_capturing()
