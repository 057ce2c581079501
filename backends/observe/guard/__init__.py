"""The guard: compares sampled query rows of an inexact kernel's output with exact attention.

Roles and blocks take turns over the steps of a run (`turns.py`). In mode `enforce` the first alarm of a backend makes
its kernels in all other roles and blocks check their next call. The exact rows are computed before the kernel runs, so
that a kernel which changes its inputs is detected. Figures stay on the device and are read once per step; on the CPU,
and in mode `enforce`, at once. What the guard cannot see is in docs/guard.md.

It knows nothing of ComfyUI. In mode `enforce` an alarm is a `KernelVetoed`, after which the session runs an exact
backend.
"""

from __future__ import annotations

import logging
import os
import random
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ...engine.observer import KernelVetoed, Observer, Veto
from ...kernels.backend import Backend, Kernel
from ...report.findings import Findings
from ...values.faults import check_output, is_cuda_fault
from ...values.reasons import Reason
from ...values.request import AttentionCall
from ...values.tolerance import Tolerance, tolerance
from .turns import FIRST_GAP, LONGEST_GAP, NEVER, Step, Turns, following

if TYPE_CHECKING:
    import torch

    from ...engine.plan import CallKind
    from ...report import Row, RunReport
    from ...values.platform import Platform
    from .rows import Figures

log = logging.getLogger("attention_backends")

VARIABLE = "ATTENTION_BACKENDS_GUARD"
"""`all`: exact kernels are checked too, where a guard is on."""
MOST_PENDING = 256
"""Checks whose figures wait on a device before they are read; matters for programs without steps."""


Budget = Tolerance
"""Largest relative L2 of the worst head, of the worst row, and of the whole call that a check accepts."""

BUDGETS: Mapping[str, Budget] = {
    "exact": tolerance("half"),
    "quantized": tolerance("int8"),
    "sparse": tolerance("half", sparse=True),
}
"""By accuracy class, for a kernel without a budget of its backend (`Backend.tolerance_on`)."""


class GuardAlarm(KernelVetoed):
    """A check in mode `enforce` failed; the inputs of the call are restored."""


class Guard(Observer):
    """Checks the kernels of one session in mode `watch` or `enforce`. Not shared between threads."""

    def __init__(self, mode: str, run_report: RunReport, *, everything: bool | None = None, seed: int = 0) -> None:
        """`everything`: check exact kernels too; None: as the environment says. `seed`: for the choice of rows."""
        self.enforces = mode == "enforce"
        self.run_report = run_report
        self.everything = os.environ.get(VARIABLE, "").strip().lower() == "all" if everything is None else everything
        self.refused: dict[tuple[str, str], tuple[str, str]] = {}
        """(role, block) -> the backend that failed a check there, and the reason."""
        self.refused_everywhere: str | None = None
        self._source = random.Random(seed)  # noqa: S311  # leaves the global generator alone
        self.turns = Turns()
        self._watched = 0
        self._backends: set[str] = set()
        """Backends of the guarded kernels."""
        self._caught: set[str] = set()
        """Backends with an alarm in mode `enforce`."""
        self._guarded_kernels: weakref.WeakSet[GuardedKernel] = weakref.WeakSet()
        self._pending: list[tuple[Callable[[list[float]], None], torch.Tensor]] = []
        self._step: object = None
        self._model_calls = 0
        self._logged: set[str] = set()

    def covers(self, accuracy: str) -> bool:
        """Whether kernels of this accuracy class are checked."""
        return self.everything or accuracy != "exact"

    def watched(self, kernel: Kernel, accuracy: str, row: Row, budget: Budget | None = None) -> Kernel:
        """The kernel with sampled checks, whose figures go to `row`. `budget`: default: of the accuracy class."""
        self._watched += 1
        guarded = GuardedKernel(self, kernel, budget or BUDGETS[accuracy], row)
        if row.backend not in self._backends or row.backend in self._caught:
            self._backends.add(row.backend)
            guarded.check_next()
        self._guarded_kernels.add(guarded)
        return guarded

    def wrapper(
        self, kind: CallKind, backend: Backend, row: Row, platform: Platform
    ) -> Callable[[Kernel], Kernel] | None:
        """Sampled checks for an inexact kernel, unless its role and block are refused already."""
        if not self.covers(backend.accuracy) or self.refusal(kind.role, kind.block) is not None:
            return None
        return partial(self.watched, accuracy=backend.accuracy, row=row, budget=backend.tolerance_on(platform))

    def veto(self, kind: CallKind, accuracy: str) -> Veto | None:
        """The veto of an inexact backend where only exact kernels may run."""
        reason = self.refusal(kind.role, kind.block)
        if reason is None or not self.covers(accuracy):
            return None
        return Veto(reason, self.refused.get((kind.role, kind.block), (None, None))[0])

    def refusal(self, role: str, block: str) -> str | None:
        """Why only exact kernels may run in this role and block; None: any may."""
        return self.refused_everywhere or self.refused.get((role, block), (None, None))[1]

    def check(self, guarded: GuardedKernel, call: AttentionCall, number: int) -> torch.Tensor:
        """Run one call and compare sampled rows of its output.

        Args:
            number: of the call in its role and block, from 0.

        Raises:
            GuardAlarm: mode `enforce`, and the error exceeds the budget or an input changed.
        """
        import torch

        from . import rows as guard_rows

        if not call.query.numel():
            return guarded.kernel(call)
        call.owned = False  # the kernel may not free its inputs: they are compared afterwards
        sampled = guard_rows.SampledRows.draw(call, self._source)
        with torch.no_grad():
            # In mode enforce whole copies, to restore the inputs for the exact kernel.
            inputs = [call.query, call.key, call.value]
            before = [tensor.clone() for tensor in inputs] if self.enforces else sampled.inputs(call)
            expected, unmasked_rows = guard_rows.exact_rows(call, sampled, None if self.enforces else before[0])
        try:
            output = guarded.kernel(call)
            check_output(output, call)  # else indexing could fault the device
        except Exception as error:
            if self.enforces and not is_cuda_fault(error):  # the context is unusable after one
                _restore(inputs, before)
            raise
        with torch.no_grad():
            changed = guard_rows.differ(before, inputs if self.enforces else sampled.inputs(call))
            rows = guard_rows.take(output[sampled.samples], sampled.rows)
            figures = guard_rows.compared(rows, expected, unmasked_rows, changed)
            if self.enforces:
                on_host = guard_rows.Figures(*figures.tolist())
                reason = self._judged(guarded, on_host, number)
                if reason is not None:
                    if on_host.changed:
                        _restore(inputs, before)
                    self.refused[guarded.role_and_block] = (guarded.row.backend, reason)
                    self._suspect(guarded.row.backend)
                    raise GuardAlarm(reason)
            else:
                self._later(lambda values: self._warn(guarded, guard_rows.Figures(*values), number), figures)
        return output

    def _suspect(self, backend: str) -> None:
        """At a backend's first alarm, check the next call of each of its kernels."""
        if backend not in self._caught:
            self._caught.add(backend)
            for guarded in self._guarded_kernels:
                if guarded.row.backend == backend:
                    guarded.check_next()

    def _later(self, read: Callable[[list[float]], None], figures: torch.Tensor) -> None:
        self._pending.append((read, figures))
        if figures.device.type == "cpu" or len(self._pending) >= MOST_PENDING:
            self.flush()

    def flush(self) -> None:
        """Read the pending figures with one synchronisation; on the CPU none are pending."""
        import torch

        pending, self._pending = self._pending, []
        if not pending:
            return
        try:
            values = torch.cat([figures for _, figures in pending]).tolist()
        except RuntimeError as error:  # a device fault that an earlier error reports
            log.debug("the guard's figures could not be read: %s", error)
            return
        for read, figures in pending:
            read(values[: len(figures)])
            del values[: len(figures)]

    def _judged(self, guarded: GuardedKernel, figures: Figures, number: int) -> str | None:
        """Add the figures of one check to its row; the reason of an alarm, or None."""
        findings = guarded.row.guard
        if findings is None:
            findings = guarded.row.guard = Findings(*guarded.budget, guarded.budget.call_l2)
        if not figures.finite and not figures.changed:  # the inputs were not finite
            findings.checked += 1
            return None
        findings.add(figures.relative_l2, figures.row_error, figures.cosine, figures.call_l2, int(figures.head))
        reason = _reason(figures, guarded.budget)
        if reason is None:
            return None
        alarm = Reason("guard.alarm.call", reason=reason, number=number + 1)
        findings.alarms += 1
        findings.first_alarm = findings.first_alarm or alarm
        return Reason("guard.alarm", reason=alarm)

    def _warn(self, guarded: GuardedKernel, figures: Figures, number: int) -> None:
        reason = self._judged(guarded, figures, number)
        if reason is not None and guarded.row.backend not in self._logged:
            self._logged.add(guarded.row.backend)
            log.warning(
                "%s in %s %s: %s; further ones are in the report", guarded.row.backend, *guarded.role_and_block, reason
            )

    def model_call(
        self, step: object, run: Callable[[], Any], again: Callable[[], Any], at: Step | None = None,
        any_process: Callable[[bool], bool] | None = None,
    ) -> Any:  # fmt: skip
        """Run one model call and check that its output is finite.

        Args:
            step: identity of the evaluation of the model: one object for all model calls of it.
            run: the model call.
            again: repeats it from the same inputs; used in mode `enforce`.
            at: where in the run it is; None: evaluations are counted as steps.
            any_process: where processes compute a model call together, whether a value is true in one of them: then all
                repeat it.
        """
        import torch

        is_new = step is None or step is not self._step
        if is_new:
            self.flush()
            self._step = step
        self.turns.begin(at or Step(None), is_new=is_new)
        self._model_calls += 1
        output = run()
        tensors = [tensor for tensor in _tensors(output) if tensor.is_floating_point()]
        if not tensors or not (self._watched or (self.enforces and any_process is not None)):
            return output
        number = self._model_calls
        with torch.no_grad():
            flag = torch.stack([tensor.isfinite().all() for tensor in tensors]).all().reshape(1).float()
        if not self.enforces:
            self._later(lambda values: self._note_output(values, number), flag)
            return output
        is_wrong = not flag.item() and self.refused_everywhere is None
        if not (is_wrong if any_process is None else any_process(is_wrong)):
            return output
        text = Reason("guard.output", number=number)
        self.refused_everywhere = text
        output = again()
        if all(bool(tensor.isfinite().all()) for tensor in _tensors(output)):
            self._note(Reason("guard.output.again", text=text))
        else:
            self._note(Reason("guard.output.other", text=text))
        return output

    def _note_output(self, values: list[float], number: int) -> None:
        if not values[0] and "output" not in self._logged:
            self._logged.add("output")
            self._note(Reason("guard.output.first", text=Reason("guard.output", number=number)))

    def _note(self, text: str) -> None:
        if self.run_report.note(text):
            log.warning("%s", text)


class GuardedKernel:
    """A kernel in one role and block, some of whose calls are checked."""

    __slots__ = (
        "__weakref__", "_began", "_checks", "_is_waiting", "_last", "_number",
        "budget", "calls", "due_call", "due_step", "gap", "guard", "kernel", "role_and_block", "row", "turns",
    )  # fmt: skip

    def __init__(self, guard: Guard, kernel: Kernel, budget: Budget, row: Row) -> None:
        self.guard, self.kernel, self.budget, self.row = guard, kernel, budget, row
        self.role_and_block = (row.role, row.block)
        self.turns = guard.turns
        self._number = self.turns.number(*self.role_and_block)
        self._began = max(self.turns.step, 0)
        self._last = self._checks = 0
        """Step of the last check, and number of checks."""
        self._is_waiting = False
        """True: its turn has come, and call `due_call` is checked."""
        self.calls = 0
        self.due_call = 0 if self.turns.step < 0 else NEVER
        self.due_step = self.turns.first(self._number)
        """No call is checked before either of these is reached."""
        self.gap = FIRST_GAP + guard._watched % FIRST_GAP

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        guard = self.guard
        if guard.enforces and (reason := guard.refusal(*self.role_and_block)) is not None:
            raise GuardAlarm(reason)
        number = self.calls
        self.calls = number + 1
        if number < self.due_call and self.turns.step < self.due_step:
            return self.kernel(call)
        if call.query.is_cuda and _is_capturing():
            return self.kernel(call)
        return guard.check(self, call, number) if self._takes_its_turn(number) else self.kernel(call)

    def check_next(self) -> None:
        """Check the next call, out of turn."""
        self.due_call, self._is_waiting = self.calls, True

    @property
    def may_check(self) -> bool:
        """Whether the next call may be checked."""
        return self.calls >= self.due_call or self.turns.step >= self.due_step

    def _takes_its_turn(self, number: int) -> bool:
        """Whether call `number` is checked; sets the next due call and step."""
        turns, step = self.turns, self.turns.step
        if step < 0:
            self._is_waiting = False
            self.due_call = number + self.gap
            self.gap = min(2 * self.gap, LONGEST_GAP)
            return True
        length = turns.period
        if not self._is_waiting:
            due = following(self._number, step, length)
            if self._checks and due > step and step - self._last < length:
                self.due_call, self.due_step = NEVER, due
                return False
            # Rotate over the calls of a step: both prompts, both halves of a solver's step.
            each = round(number / (step - self._began)) if step > self._began else 1
            if each > 1 and not turns.is_last and (later := (self._number + self._checks) % each):
                self.due_call, self.due_step, self._is_waiting = number + later, step + 1, True
                return False
        self._is_waiting = False
        self._last, self._checks = step, self._checks + 1
        # In the first step the number of roles and blocks is not known yet.
        self.due_call, self.due_step = (
            NEVER,
            step + 1 if step == self._began else following(self._number, step + 1, length),
        )
        return True


def _restore(inputs: list[torch.Tensor], before: list[torch.Tensor]) -> None:
    """Copy query, key and value back, changed tensors only: expanded memory cannot be written."""
    import torch

    from .rows import differ

    with torch.no_grad():
        for tensor, original in zip(inputs, before, strict=True):
            if differ([original], [tensor]):
                tensor.copy_(original)


def _reason(figures: Figures, budget: Budget) -> str | None:
    """Value and limit of what is wrong; None where the check is good."""
    if figures.changed:
        return Reason("guard.changed")
    if figures.unmasked > 0.5:
        return Reason("guard.unmasked")
    if figures.relative_l2 != figures.relative_l2:
        return Reason("guard.not_finite")
    if figures.relative_l2 > budget.relative_l2:
        return Reason("guard.l2.head", found=f"{figures.relative_l2:.3g}", most=f"{budget.relative_l2:g}")
    if figures.call_l2 > budget.call_l2:
        return Reason("guard.l2.call", found=f"{figures.call_l2:.3g}", most=f"{budget.call_l2:g}")
    if figures.row_error > budget.row_error:
        return Reason("guard.row", found=f"{figures.row_error:.3g}", most=f"{budget.row_error:g}")
    return None


def _is_capturing() -> bool:
    """Whether a CUDA graph is captured now: no value may be read then."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of a model's output: a tensor, or a tuple or list with tensors."""
    import torch

    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for tensor in output if isinstance(tensor, torch.Tensor)] if isinstance(output, list | tuple) else []
