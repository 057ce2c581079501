"""One configuration in use on one device: plans each kind of call once, runs it, falls back, keeps account.

A host keeps the `Plan` of a kind of call (`plan.py`) and runs later calls of that kind through it; that is the warm
path. Words of errors that end a run, and are not fallen back from, are in `values/faults.py`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from ..config import AttentionConfig, frozen
from ..config.layers import Choice, Settings, resolve, settings_of
from ..config.names import AUTOTUNE, COMFY
from ..config.schedule import OUTSIDE_A_SAMPLER, is_scheduled
from ..config.timetable import Timetable
from ..guard import Guard, GuardAlarm
from ..kernels.backend import Backend, Kernel, for_scale, on_copies
from ..kernels.support.lse import kept
from ..report import RunReport
from ..report.timed_kernel import timed_kernel
from ..values.errors import NoBackendError
from ..values.faults import KernelFaultError, KernelOutputError, is_cuda_fault, is_out_of_memory
from ..values.request import AttentionCall, AttentionRequest
from .call_checks import CheckError, DifferingTensorsError, checked, checks_from_environment, differing
from .plan import Plan
from .router import NO_OPTIONS, Decision, Failed, Rejection, Router, forbidden

if TYPE_CHECKING:
    import torch

    from ..kernels.comfy import HostFunction
    from .chooser import Chooser

log = logging.getLogger("attention_backends")


class Session:
    """Plans and runs calls under one configuration. Not shared between threads."""

    def __init__(
        self,
        router: Router,
        layers: tuple[AttentionConfig, ...] = (),
        run_report: RunReport | None = None,
        checks: bool | None = None,
    ) -> None:
        """`checks`: look over each call before its kernel runs; None leaves it to the environment, as it is now."""
        self.router = router
        self.layers = layers
        self.run_report = (
            run_report if run_report is not None else RunReport(device=router.platform.kind, layers=layers)
        )
        self.device_clock = self.run_report.new_clock(router.platform.kind)
        """Times the kernels of this session's plans; None where the trace is off or the device has no such clock."""
        self.checks = checks_from_environment() if checks is None else checks
        self.failed: dict[Failed, str] = {}
        """Quarantine, for as long as this session: an error may be the fault of one run's inputs."""
        self._logged: set[object] = set()
        self._recorded: dict[str, set[bool]] = {}
        """Role -> whether the record that is repeated knows its calls: True, False, or both of different calls."""
        mode = self.settings.guard
        self.guard = Guard(mode, self.run_report) if mode != "off" else None
        self.tuner: Chooser | None = None
        """Decides where `autotune` is asked for; without one that is `auto`."""

    def plan(
        self,
        request: AttentionRequest,
        role: str,
        category: str,
        block: str = "",
        preferred: Choice | None = None,
        mask: str = "",
        choice: Choice | None = None,
        function: HostFunction | None = None,
        last_resort: HostFunction | None = None,
    ) -> Plan:
        """Decide how calls with these facts run in this role and block.

        `choice` is what was asked for, where the host knows it already: a schedule depends on more than the role.
        `mask` says for the account how the mask is honoured, where that is not its kind alone.
        `preferred` is what the checkpoint itself asks for; it counts only where no person named a backend. `function`
        is what the host runs by itself for such calls: the preferred one, where there is one. `last_resort` is what it
        is asked for where every kernel fails; `function` where that is not said.

        Raises:
            NoBackendError: strict was asked for and the named backend cannot run.
        """
        self.run_report.categories[role] = category
        choice = self._choice(role, category, block, request.mask != "none") if choice is None else choice
        if choice.record is not None:
            choice = self._as_recorded(choice, role, block, request)
        strict = self.settings.strict
        refused = None
        label = None
        if choice.is_open and preferred is not None:
            strict = False  # nobody insists on what a checkpoint prefers
            if function is None or function.may_run(request):
                choice, label = preferred, None if function is None else function.id
            else:
                refused = Rejection(function.id, (forbidden(function.accuracy),))
                choice = Choice(None, preferred.source)
        decision = self.router.select(
            request, choice, accuracy=self.settings.accuracy, strict=strict, failed=self.failed
        )
        if refused is not None:
            decision = replace(decision, asked=refused.backend, rejected=(refused, *decision.rejected))
        elif not self.router.backends[decision.backend].hosted:
            label = None
        function = last_resort or function if label is None and decision.asked != COMFY else function
        if decision.options:
            decision = self._loaded(decision, request, choice, strict)
        reason = None
        if (
            self.guard is not None
            and (refusal := self.guard.refusal(role, block))
            and self._is_guarded(decision, function)
        ):
            reason = f"{label or decision.backend}: {refusal}"
            decision, label = self._exact(decision, request, role, block, refusal), None
        plan = None
        if choice.asked == AUTOTUNE and self.tuner is not None and reason is None:
            plan = self.tuner.plan(request, decision, role, category, block, mask or request.mask)
        self._log_decision(decision if plan is None else plan.decision, role, category, label)
        if plan is None:
            plan = self._plan(
                request, decision, role, block, strict, mask or request.mask, reason, None, function, label
            )
        if self.run_report.recorder is not None:
            self.run_report.recorder.planned(plan, category, self.router)
        return plan

    def recorded(self, choice: Choice, role: str, block: str, request: AttentionRequest) -> Choice | None:
        """What the record of a choice says of a call with these facts now; None where it does not know, or is none."""
        if choice.record is None:
            return None
        run = choice.record.run_of(self.run_report.node_id)
        return run.choice(role, block, request, self.run_report.timeline.model_calls + 1)

    def _as_recorded(self, choice: Choice, role: str, block: str, request: AttentionRequest) -> Choice:
        found = self.recorded(choice, role, block, request)
        knows = self._recorded.setdefault(role, set())
        if (found is not None) not in knows:
            knows.add(found is not None)
            if False in knows:
                self._note_unknown(choice, role, block, request, "some" if True in knows else "any")
        return replace(choice, record=None) if found is None else found

    def _note_unknown(self, choice: Choice, role: str, block: str, request: AttentionRequest, how_many: str) -> None:
        """Say in the account that the record does not know calls of a role: any so far, or some."""

        def text(how_many: str) -> str:
            decides = f"{choice.asked or 'auto'} via {choice.source} decides"
            return f"role {role}: the record does not know {how_many} of its calls; {decides}"

        if self.run_report.notes.pop(text("any"), None) is None:
            log.warning("role %s %s: the record does not know this call: %s", role, block, request.describe())
        self.run_report.note(text(how_many))

    def _choice(self, role: str, category: str, block: str, masked: bool) -> Choice:
        """What is asked for where no sampler runs: of a schedule only what is not over time holds."""
        if not is_scheduled(self.layers):
            return resolve(self.layers, role, category)
        timetable = Timetable(self.layers, blocks=(block,))
        if timetable.timed and self.run_report.note(OUTSIDE_A_SAMPLER):
            log.warning("%s", OUTSIDE_A_SAMPLER)
        return timetable.resolve(timetable.at(None), role, category, block, masked)[0]

    def _is_guarded(self, decision: Decision, function: HostFunction | None) -> bool:
        return self.guard is not None and self.guard.covers(self._backend(decision, function).accuracy)

    def _backend(self, decision: Decision, function: HostFunction | None) -> Backend:
        """What a decision runs; of the host's own attention the very function, where it is known."""
        backend = self.router.backends[decision.backend]
        return function if function is not None and backend.hosted else backend

    def _exact(self, decision: Decision, request: AttentionRequest, role: str, block: str, refusal: str) -> Decision:
        """An exact backend of the route in place of one that the guard refuses; strict does not forbid that."""
        caught = {decision.backend}
        if self.guard is not None and (role, block) in self.guard.refused:
            caught.add(self.guard.refused[role, block][0])
        failed = {**self.failed, **{(backend, frozen(NO_OPTIONS), request): refusal for backend in caught}}
        found = self.router.select(request, Choice(None, decision.source), failed=failed)
        return replace(
            found,
            asked=decision.asked,
            asked_options=decision.asked_options,
            rejected=(Rejection(decision.backend, (refusal,)),),
        )

    def _loaded(self, decision: Decision, request: AttentionRequest, choice: Choice, strict: bool) -> Decision:
        """The decision itself, or another one where the installed package refuses its options."""
        try:
            self.router.kernel(decision.backend, decision.options)
        except Exception as error:  # whatever a package raises about an option that it does not have
            if is_out_of_memory(error) or is_cuda_fault(error):
                raise
            self.failed[decision.backend, frozen(decision.options), request] = f"{type(error).__name__}: {error}"
            return self.router.select(
                request, choice, accuracy=self.settings.accuracy, strict=strict, failed=self.failed
            )
        return decision

    @property
    def settings(self) -> Settings:
        """Accuracy, strictness and guard, which hold for every role."""
        return settings_of(self.layers)

    def _plan(
        self,
        request: AttentionRequest,
        decision: Decision,
        role: str,
        block: str,
        strict: bool,
        mask: str,
        reason: str | None = None,
        kernel: Kernel | None = None,
        function: HostFunction | None = None,
        label: str | None = None,
    ) -> Plan:
        """`label`: what the account calls the host's own function, where a checkpoint asked for it."""
        backend = self._backend(decision, function)
        row = self.run_report.row(
            role, block, label or decision.backend, decision.source, mask, reason or decision.reason,
            label or decision.asked,
        )  # fmt: skip
        row.member = None if label else backend.member(request, self.router.platform)
        kernel = self._kernel(decision) if kernel is None else kernel
        if request.lse:
            kernel = self._lse_kernel(decision, request)
        elif not backend.hosted:  # the host's own function gets what its program called with
            kernel = for_scale(kernel, request.scale)
        guard, clock = self.guard, self.device_clock
        if guard is not None and (not guard.covers(backend.accuracy) or guard.refusal(role, block) is not None):
            guard = None
        if clock is not None and (clock.has_events or guard is not None or self.checks):  # the kernel's time alone
            kernel, clock = timed_kernel(kernel, clock, row), None
        if guard is not None:
            kernel = guard.watched(kernel, backend.accuracy, row, backend.tolerance_on(self.router.platform))
        return Plan(request, decision, checked(kernel) if self.checks else kernel, row, strict, clock, function)

    def plan_varlen(self, part: Plan, request: AttentionRequest, kernel: Kernel) -> Plan | None:
        """The plan of a whole masked call over packed tokens, on the word of the plan that each of its parts has.

        None while parts are measured, which is done one by one.
        """
        row = part.row
        if self.tuner is not None and self.tuner.is_trying(part):
            return None
        packed = self._plan(
            request, part.decision, row.role, row.block, part.strict, f"{row.mask}, varlen", row.reason, kernel
        )
        packed.index = part.index
        return packed

    def _kernel(self, decision: Decision) -> Kernel:
        kernel = self.router.kernel(decision.backend, decision.options)
        return on_copies(kernel) if self.router.backends[decision.backend].changes_inputs else kernel

    def _lse_kernel(self, decision: Decision, request: AttentionRequest) -> Kernel:
        kernel = self.router.lse(decision.backend, decision.options)
        if self.router.backends[decision.backend].changes_inputs:
            kernel = on_copies(kernel)
        return kept(for_scale(kernel, request.scale))

    def run(self, plan: Plan, call: AttentionCall) -> torch.Tensor:
        """Run one call; on failure the next backend runs it: the platform's, then the host's own, each once.

        Raises:
            KernelFaultError: the device is unusable; the message names the kernel and the call.
            torch.OutOfMemoryError: passed on, never retried with another kernel.
            KernelOutputError: the kernel gave the call's tensors up, and what it returned is not their output.
            NoBackendError: strict, and the named backend failed; or every backend failed.
        """
        try:
            output = plan.compute(call)
        except Exception as error:
            output = self._recover(plan, call, error)
        plan.row.calls += 1
        return output

    def run_varlen(self, plan: Plan, call: AttentionCall) -> torch.Tensor | None:
        """Run a call that `plan_varlen` planned; None where that failed, and its parts are to run one by one.

        Raises:
            KernelFaultError, torch.OutOfMemoryError: as in `run`.
        """
        try:
            output = plan.compute(call)
        except GuardAlarm:
            return None  # the parts are watched too, and run exactly from here on
        except Exception as error:
            reraise_if_fatal(plan, error)
            failed = f"{type(error).__name__}: {error}"
            said = f"{plan.decision.backend}: its packed call failed ({failed}); a call for each part runs instead"
            if self.run_report.note(said):
                log.warning("%s", said)
            return None
        plan.row.calls += 1
        return output

    def _recover(self, plan: Plan, call: AttentionCall, error: Exception) -> torch.Tensor:
        """Run the backends that are left, one after the other, until one computes the call; change `plan` to it."""
        held = call.host is not None and call.query is not None
        if held and (text := differing(call.query, call.key, call.value, call.attn_mask)):  # not the kernel's fault
            raise DifferingTensorsError(text) from error
        while True:
            if isinstance(error, NoBackendError):
                raise error  # of another configuration below the host's own function
            if isinstance(error, GuardAlarm):
                self._replace_by_exact(plan, str(error))
            else:
                self._replace_failed(plan, error)
                if call.query is None:  # an owned call whose kernel has given its tensors up
                    if isinstance(error, KernelOutputError):
                        raise KernelOutputError(f"{error}; no other kernel can run it: its tensors were given up")
                    raise error
            try:
                return plan.compute(call)
            except Exception as another:
                error = another

    def _replace_failed(self, plan: Plan, error: Exception) -> None:
        """Quarantine the backend for this kind of call and change `plan` to the next one.

        Raises:
            Exception: `error` leaves nothing to try, see `reraise_if_fatal`, or no backend is left.
        """
        if self.tuner is not None and not isinstance(error, CheckError):
            self.tuner.failed(plan, error)
        reraise_if_fatal(plan, error)
        decided, row = plan.decision, plan.row
        failed = decided.backend
        said = f"{type(error).__name__}: {error}"
        self.failed[failed, frozen(decided.options), plan.request] = said
        choice = Choice(decided.asked, decided.source, decided.asked_options, decided.accuracy)
        try:
            decision = self.router.select(
                plan.request, choice, accuracy=self.settings.accuracy, strict=plan.strict, failed=self.failed
            )
            refusal = None if self.guard is None else self.guard.refusal(row.role, row.block)
            if refusal and self._is_guarded(decision, plan.function):
                decision = self._exact(decision, plan.request, row.role, row.block, refusal)
        except NoBackendError as refused:
            raise refused from error
        log.warning("attention backend %s failed (%s); %s runs instead for: %s", failed, said, decision.backend,
                    plan.request.describe())  # fmt: skip
        before = f"{row.reason}; " if row.reason else ""
        self._change(plan, decision, f"{before}{failed}: failed: {said}")

    def _replace_by_exact(self, plan: Plan, refusal: str) -> None:
        """Have an exact backend run what the guard took from its kernel, and from now on this kind of call."""
        row = plan.row
        decision = self._exact(plan.decision, plan.request, row.role, row.block, refusal)
        if (row.backend, refusal) not in self._logged:
            self._logged.add((row.backend, refusal))
            log.warning("%s in %s %s: %s; %s runs there from now on", row.backend, row.role, row.block, refusal,
                        decision.backend)  # fmt: skip
        self._change(plan, decision, f"{row.backend}: {refusal}")

    def _change(self, plan: Plan, decision: Decision, reason: str) -> None:
        """Change `plan` to another decision; the account has the reason."""
        row = plan.row
        plan.become(
            self._plan(
                plan.request, decision, row.role, row.block, plan.strict, row.mask, reason, function=plan.function
            )
        )
        if self.run_report.recorder is not None:
            self.run_report.recorder.changed(plan, self.router)

    def _log_decision(self, decision: Decision, role: str, category: str, label: str | None) -> None:
        """Say once per role what it resolved to, and once per reason why something else runs."""
        backend = label or decision.backend
        key = (role, backend, decision.source)
        if key not in self._logged:
            self._logged.add(key)
            of = f" (category={category!r})" if category and category != role else ""
            log.info("Resolved diffusion attention backend %r for role=%r%s via %s", backend.upper(), role, of,
                     decision.source)  # fmt: skip
        for note in decision.notes:
            if note not in self._logged:  # once, however many kinds of call there are
                self._logged.add(note)
                self.run_report.note(note)
        if decision.reason and (role, decision.reason) not in self._logged:
            self._logged.add((role, decision.reason))
            log.warning("role %s: %s runs instead of %s (%s)", role, decision.backend, decision.asked, decision.reason)


def reraise_if_fatal(plan: Plan, error: Exception) -> None:
    """Raise where no other kernel may be tried after `error`."""
    failed = plan.decision.backend
    if isinstance(error, CheckError) or is_out_of_memory(error):
        raise error
    if is_cuda_fault(error):
        raise KernelFaultError(
            f"the attention kernel {failed} left the GPU unusable: {error}\n"
            f"  call: {plan.request.describe()}\n"
            "  what to do: restart ComfyUI and choose another backend for this role"
        ) from error
