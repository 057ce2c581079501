"""One configuration in use on one device: plans each kind of call once, runs it, and falls back when a kernel fails.

A host keeps the `Slot` of a kind of call (`plan.py`) and runs later calls of that kind through it; that is the warm
path. Choosers and observers register here (`observer.py`). Errors that end a run are in `values/faults.py`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import AttentionConfig, frozen
from ..config.layers import Choice, resolve, settings_of
from ..config.names import COMFY
from ..config.schedule import OUTSIDE_A_SAMPLER, is_scheduled
from ..config.timetable import Timetable
from ..kernels.backend import Backend, Kernel, for_scale
from ..kernels.support.lse import kept
from ..report import Row, RunReport
from ..report.timed_kernel import timed_kernel
from ..values.errors import NoBackendError
from ..values.faults import KernelFaultError, KernelOutputError, is_cuda_fault, is_out_of_memory
from ..values.grid import Kept, Place, Progress
from ..values.mask_plan import PASSED_ON, MaskPlan
from ..values.reasons import Reason
from ..values.request import AttentionCall, Host, HostedCall, SplitCall, hosted
from .call_checks import CheckError, DifferingTensorsError, checked, checks_from_environment, differing
from .observer import Chooser, Divider, KernelVetoed, Observer, Veto
from .plan import CPU, CallKind, Plan, Slot
from .router import NO_OPTIONS, Decision, Failed, Rejection, Router, forbidden
from .sub_calls import run_sub_calls

if TYPE_CHECKING:
    import torch

    from ..kernels.comfy import HostFunction

log = logging.getLogger("attention_backends")

Registered = TypeVar("Registered")


class Session:
    """Plans and runs calls under one configuration. Not shared between threads."""

    def __init__(
        self,
        router: Router,
        layers: tuple[AttentionConfig, ...] = (),
        run_report: RunReport | None = None,
        checks: bool | None = None,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            checks: validate each call before its kernel runs; None reads that from the environment, now.
            device: of all calls, with its index; None: read from each call.
        """
        self.router = router
        self.layers = layers
        self.settings = settings_of(layers)
        """Accuracy, strictness and guard, which hold for every role."""
        self.run_report = (
            run_report if run_report is not None else RunReport(device=router.platform.kind, layers=layers)
        )
        self.device_clock = self.run_report.new_clock(router.platform.kind)
        """Times the kernels of this session's plans; None with times off, or where the device has no such clock."""
        self.checks = checks_from_environment() if checks is None else checks
        kind = router.platform.kind if device is None else device.type
        self.device_index = CPU if kind == "cpu" else device.index if device is not None else None
        self.failed: dict[Failed, str] = {}
        """Rejected for the life of this session only: an error may be due to one run's inputs."""
        self.choosers: list[Chooser] = []
        self.observers: list[Observer] = []
        self.divider: Divider | None = None
        """Computes parts of calls on other devices, where a host sets it."""
        self.progress = Progress()
        """Where in the run the current model call is; the host changes it."""
        self._logged: set[object] = set()

    def register(self, *members: Chooser | Observer) -> None:
        """Add choosers and observers, which are called in this order."""
        self.choosers += [member for member in members if isinstance(member, Chooser)]
        self.observers += [member for member in members if isinstance(member, Observer)]

    def registered(self, kind: type[Registered]) -> Registered | None:
        """The first registered member of a class; None where there is none."""
        return next((member for member in (*self.observers, *self.choosers) if isinstance(member, kind)), None)

    def attention(
        self, slot: Slot, call: AttentionCall, mask_plan: MaskPlan | None = None, host: Host | None = None,
        arguments: tuple[Any, ...] = (),
    ) -> torch.Tensor:  # fmt: skip
        """Run one call by its slot's plan; the entry point of every host.

        If the kernel fails, the remaining priorities run it, then the host's own function, each once.

        Args:
            mask_plan: of this call's mask, with the facts that the slot was planned for.
            host, arguments: run the host's own function on the call, or on a sub-call where the slot has a `split`.

        Returns:
            (batch, num_heads, q_len, v_head_dim).

        Raises:
            KernelFaultError: the device is unusable; the message names the kernel and the call.
            torch.OutOfMemoryError: never retried with another kernel.
            KernelOutputError: the output is wrong, and the kernel has freed the inputs of an owned call.
            DifferingTensorsError: there is a `host`, and the tensors' dtypes or devices differ.
            NoBackendError: strict, and the named backend failed; or every backend failed.
        """
        if mask_plan is not None:
            if slot.split is not None:
                return run_sub_calls(self, slot.split, mask_plan, call, host, arguments)
            if mask_plan.strategy == PASSED_ON:
                call.memo = mask_plan.sub_calls[0].memo
        plan = slot.plan
        if plan.hosted and host is not None and not isinstance(call, HostedCall):
            call = HostedCall(call, host, arguments)  # `hosted`, without its frame
        try:
            output = plan.compute(call)
        except Exception as error:
            output = self.recover(slot, call, error, host, arguments)
        slot.plan.row.calls += 1
        return output

    def attention_varlen(self, slot: Slot, call: AttentionCall, mask_plan: MaskPlan) -> torch.Tensor | None:
        """One varlen call for all sub-calls, under their common decision; None if it failed: they run one by one then.

        Raises:
            KernelFaultError, torch.OutOfMemoryError: as in `attention`.
        """
        plan = slot.plan
        try:
            output = plan.compute(SplitCall(call, mask_plan))
        except KernelVetoed:
            return None  # the sub-calls are guarded too, and fall back to exact kernels
        except Exception as error:
            reraise_if_fatal(plan, error)
            text = (
                f"{plan.decision.backend}: its varlen call failed ({type(error).__name__}: {error}); its sub-calls "
                "run instead"
            )
            if self.run_report.note(text):
                log.warning("%s", text)
            return None
        plan.row.calls += 1
        return output

    def plan(
        self,
        kind: CallKind,
        *,
        choice: Choice | None = None,
        preferred: Choice | None = None,
        function: HostFunction | None = None,
        last_resort: HostFunction | None = None,
    ) -> Slot:
        """Decide how calls of one kind run.

        Args:
            choice: default: resolved from `layers`. A host with a schedule resolves it itself.
            preferred: the checkpoint's preference; it applies only where no person named a backend.
            function: the host's own function for these calls: the preferred one, if there is one.
            last_resort: the host's function for when every kernel fails; default: `function`.

        Raises:
            NoBackendError: strict was asked for and the named backend cannot run.
        """
        request, strict = kind.request, self.settings.strict
        self.run_report.categories[kind.role] = kind.category
        choice = self._resolved(kind) if choice is None else choice
        if self.choosers:
            choice = self.asked(kind, choice)
        refused, label = None, None
        """`label`: the name of the host's function in the run report, where a checkpoint prefers it."""
        if preferred is not None and choice.no_backend_named:
            strict = False  # a preference may fall back
            if function is None or function.may_run(request):
                choice, label = preferred, None if function is None else function.id
            else:
                refused = Rejection(function.id, (forbidden(function.accuracy),))
                choice = Choice(None, preferred.source)
        decision = self.select(kind, choice, strict=strict)
        strict = strict and not decision.expected
        if refused is not None:
            decision = replace(decision, asked=refused.backend, rejected=(refused, *decision.rejected))
        if decision.options:
            decision = self._loaded(decision, kind, choice, strict)
        backend = self.router.backends[decision.backend]
        label = label if backend.hosted else None
        function = last_resort or function if label is None and decision.asked != COMFY else function
        slot, reason, plan = Slot(), None, None
        veto = self._veto(kind, function.accuracy if function is not None and backend.hosted else backend.accuracy)
        if veto is not None:
            reason = Reason("named", name=label or decision.backend, reason=veto.reason)
            decision, label = self._exact(decision, kind, veto), None
        else:
            for chooser in self.choosers:
                plan = plan or chooser.plan(slot, kind, decision)
        self._log_decision(decision if plan is None else plan.decision, kind, label)
        slot.plan = plan or self.plan_of(kind, decision, strict=strict, reason=reason, function=function, label=label)
        for observer in self.observers:
            observer.planned(slot, self.router)
        return slot

    def asked(self, kind: CallKind, choice: Choice, *, planned: bool = True) -> Choice:
        """The choice after every chooser; see `Chooser.choice`."""
        for chooser in self.choosers:
            choice = chooser.choice(kind, choice, planned=planned)
        return choice

    def select(self, kind: CallKind, choice: Choice, *, strict: bool) -> Decision:
        """The router's decision under this session's settings; what failed in this session is rejected.

        Raises:
            NoBackendError: strict, and the named backend cannot run.
        """
        return self.router.select(
            kind.request, choice, accuracy=self.settings.accuracy, strict=strict, failed=self.failed,
            category=kind.category,
        )  # fmt: skip

    def _resolved(self, kind: CallKind) -> Choice:
        """The choice outside a sampler, where only schedule entries without a time window apply."""
        if not is_scheduled(self.layers):
            return resolve(self.layers, kind.role, kind.category)
        timetable = Timetable(self.layers, blocks=(kind.block,))
        if timetable.timed and self.run_report.note(OUTSIDE_A_SAMPLER):
            log.warning("%s", OUTSIDE_A_SAMPLER)
        masked = kind.request.mask != "none"
        return timetable.resolve(timetable.at(None), kind.role, kind.category, kind.block, masked)[0]

    def _veto(self, kind: CallKind, accuracy: str) -> Veto | None:
        for observer in self.observers:
            veto = observer.veto(kind, accuracy)
            if veto is not None:
                return veto
        return None

    def _backend(self, decision: Decision, function: HostFunction | None) -> Backend:
        """The backend of a decision; for the host's own attention the known function, if there is one."""
        backend = self.router.backends[decision.backend]
        return function if function is not None and backend.hosted else backend

    def _exact(self, decision: Decision, kind: CallKind, veto: Veto) -> Decision:
        """The platform's exact backend instead of one that an observer vetoes; strict allows that."""
        caught = {decision.backend, veto.backend} - {None}
        failed = {**self.failed, **{(str(name), frozen(NO_OPTIONS), kind.request): veto.reason for name in caught}}
        return replace(
            self.router.select(kind.request, Choice(None, decision.source), failed=failed),
            asked=decision.asked,
            asked_options=decision.asked_options,
            rejected=(Rejection(decision.backend, (veto.reason,)),),
        )

    def _loaded(self, decision: Decision, kind: CallKind, choice: Choice, strict: bool) -> Decision:
        """The decision, or a fallback where loading with its options fails."""
        try:
            self.router.kernel(decision.backend, decision.options)
        except Exception as error:  # of a package without such an option
            if is_out_of_memory(error) or is_cuda_fault(error):
                raise
            self.failed[decision.backend, frozen(decision.options), kind.request] = f"{type(error).__name__}: {error}"
            return self.select(kind, choice, strict=strict)
        return decision

    def plan_of(
        self,
        kind: CallKind,
        decision: Decision,
        *,
        strict: bool | None = None,
        reason: str | None = None,
        kernel: Kernel | None = None,
        function: HostFunction | None = None,
        label: str | None = None,
    ) -> Plan:
        """Make the plan of a decision: load the kernel, wrap it, find its row.

        Args:
            strict: default: the session's.
            reason: of the fallback; default: the decision's.
            kernel: default: the kernel of the decision's backend.
            label: the name of the host's function in the run report, where a checkpoint prefers it.
        """
        request, backend = kind.request, self._backend(decision, function)
        row = self.run_report.row(
            kind.role, kind.block, label or decision.backend, decision.source, kind.mask or request.mask,
            reason or (decision.reason if decision.rejected else None), label or decision.asked,
        )  # fmt: skip
        row.expected = row.expected or (decision.expected and reason is None)
        row.member = None if label else backend.kernel_name(request, self.router.platform)
        divider = self.divider if kernel is None else None
        if kernel is None:
            kernel = self.kernel_of_row(decision, kind, row) if backend.sparse else self.kernel(decision, kind)
        wrappers = []
        for observer in self.observers:
            wrapper = observer.wrapper(kind, backend, row, self.router.platform)
            if wrapper is not None:
                wrappers.append(wrapper)
        clock = self.device_clock
        if clock is not None and (clock.has_events or wrappers or self.checks or divider):  # to time the kernel only
            kernel, clock = timed_kernel(kernel, clock, row), None
        if divider is not None:
            kernel = divider.divided(kind, decision, backend, kernel)
        for wrap in wrappers:
            kernel = wrap(kernel)
        return Plan(
            kind, decision, checked(kernel) if self.checks else kernel, row,
            self.settings.strict if strict is None else strict,
            clock=clock, function=function, hosted=backend.hosted, device_index=self.device_index,
        )  # fmt: skip

    def kernel_of_row(self, decision: Decision, kind: CallKind, row: Row) -> Kernel:
        """The kernel of a decision; a sparse one knows its place in the model, and the row counts what it keeps."""
        if not self.router.backends[decision.backend].sparse:
            return self.kernel(decision, kind)
        row.kept = row.kept or Kept()
        place, dense = Place(kind.role, kind.category, kind.block), partial(self._dense, kind)
        kernel = self.router.kernel(decision.backend, decision.options)
        backend = self.router.backends[decision.backend]
        return backend.bind(kernel, kind.request, place, self.progress, row.kept, dense)

    def _dense(self, kind: CallKind, named: str | None = None) -> Kernel:
        """The exact kernel of the platform's priorities, or of a backend where it can run such calls."""
        source = "the platform's priorities" if named is None else "dense_backend"
        return self.kernel(self.router.select(kind.request, Choice(named, source)), kind)

    def kernel(self, decision: Decision, kind: CallKind) -> Kernel:
        """The kernel of a decision, with scale and LSE as the request needs."""
        backend, request = self.router.backends[decision.backend], kind.request
        if request.lse:
            return kept(for_scale(self.router.lse(decision.backend, decision.options), request.scale))
        kernel = self.router.kernel(decision.backend, decision.options)
        # The host's function gets the program's own arguments, with their scale.
        return kernel if backend.hosted or request.scale is None else for_scale(kernel, request.scale)

    def recover(
        self, slot: Slot, call: AttentionCall, error: Exception, host: Host | None = None,
        arguments: tuple[Any, ...] = (),
    ) -> torch.Tensor:  # fmt: skip
        """Try the remaining backends until one computes the call, and put its plan into `slot`.

        Raises:
            Exception: as in `attention`.
        """
        if host is not None and call.query is not None:
            text = differing(call.query, call.key, call.value, call.attn_mask)
            if text:  # not the kernel's fault
                raise DifferingTensorsError(text) from error
        while True:
            if isinstance(error, NoBackendError):
                raise error  # from another configuration, called by the host's function
            if isinstance(error, KernelVetoed):
                self._replace_vetoed(slot, error.reason)
            else:
                self._replace_failed(slot, error)
                if call.query is None:  # an owned call whose kernel has freed its tensors
                    if isinstance(error, KernelOutputError):
                        raise KernelOutputError(f"{error}; no other kernel can run it: its tensors were freed")
                    raise error
            try:
                return slot.plan.compute(hosted(call, host, arguments) if slot.plan.hosted else call)
            except Exception as another:
                error = another

    def _replace_failed(self, slot: Slot, error: Exception) -> None:
        """Reject the backend for this kind of call in this session, and put the next one's plan into the slot.

        Raises:
            Exception: `error` is fatal (`reraise_if_fatal`), or no backend is left.
        """
        plan = slot.plan
        if not isinstance(error, CheckError):
            for observer in self.observers:
                observer.failed(plan, error)
        reraise_if_fatal(plan, error)
        before, row, kind = plan.decision, plan.row, plan.kind
        failed, text = before.backend, f"{type(error).__name__}: {error}"
        self.failed[failed, frozen(before.options), kind.request] = text
        choice = Choice(before.asked, before.source, before.asked_options, before.accuracy)
        try:
            decision = self.select(kind, choice, strict=plan.strict)
            veto = self._veto(kind, self._backend(decision, plan.function).accuracy)
            if veto is not None:
                decision = self._exact(decision, kind, veto)
        except NoBackendError as refused:
            raise refused from error
        log.warning("attention backend %s failed (%s); %s runs instead for: %s", failed, text, decision.backend,
                    kind.request.describe())  # fmt: skip
        reason = Reason("failed", backend=failed, error=text)
        self._replace(
            slot, decision, Reason("failed.later", earlier=row.reason, reason=reason) if row.reason else reason
        )

    def _replace_vetoed(self, slot: Slot, refusal: str) -> None:
        """Put the plan of an exact backend into the slot."""
        plan, row = slot.plan, slot.plan.row
        veto = self._veto(plan.kind, self._backend(plan.decision, plan.function).accuracy)
        decision = self._exact(plan.decision, plan.kind, Veto(refusal, None if veto is None else veto.backend))
        if (row.backend, refusal) not in self._logged:
            self._logged.add((row.backend, refusal))
            log.warning("%s in %s %s: %s; %s runs there from now on", row.backend, row.role, row.block, refusal,
                        decision.backend)  # fmt: skip
        self._replace(slot, decision, f"{row.backend}: {refusal}")

    def _replace(self, slot: Slot, decision: Decision, reason: str) -> None:
        before = slot.plan
        slot.plan = self.plan_of(before.kind, decision, strict=before.strict, reason=reason, function=before.function)
        self.notify_changed(slot)

    def notify_changed(self, slot: Slot) -> None:
        """Notify the observers that the slot has another plan."""
        for observer in self.observers:
            observer.changed(slot, self.router)

    def _log_decision(self, decision: Decision, kind: CallKind, label: str | None) -> None:
        """Log each role's decision once, and each reason for a fallback once."""
        role, category, backend = kind.role, kind.category, label or decision.backend
        key = (role, backend, decision.source)
        if key not in self._logged:
            self._logged.add(key)
            of = f" (category={category!r})" if category and category != role else ""
            log.info("Resolved diffusion attention backend %r for role=%r%s via %s", backend.upper(), role, of,
                     decision.source)  # fmt: skip
        for note in decision.notes:
            if note not in self._logged:  # once per run
                self._logged.add(note)
                self.run_report.note(note)
        if decision.rejected and decision.reason and (role, decision.reason) not in self._logged:
            self._logged.add((role, decision.reason))
            say = log.info if decision.expected else log.warning
            say("role %s: %s runs instead of %s (%s)", role, decision.backend, decision.asked, decision.reason)


def reraise_if_fatal(plan: Plan, error: Exception) -> None:
    """Raise where no other kernel may be tried: a refused call, out of memory, a fault of the device."""
    failed = plan.decision.backend
    if isinstance(error, CheckError) or is_out_of_memory(error):
        raise error
    if is_cuda_fault(error):
        raise KernelFaultError(
            f"the attention kernel {failed} left the GPU unusable: {error}\n"
            f"  call: {plan.request.describe()}\n"
            "  what to do: restart ComfyUI and choose another backend for this role"
        ) from error
