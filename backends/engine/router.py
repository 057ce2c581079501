"""Selects a backend for a request; returns a `Decision` with its source and every rejection.

Selection is pure. The only state is per process: which backends loaded, and which packages turned out to be broken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..config import AttentionConfig, frozen
from ..config.layers import Choice, resolve, settings_of
from ..config.names import AUTOTUNE, COMFY
from ..kernels import BACKENDS
from ..kernels.backend import Backend, Kernel, LseKernel
from ..kernels.group import BackendGroup
from ..measure import remembered
from ..values.errors import NoBackendError
from ..values.platform import Platform
from ..values.reasons import Reason, error_text, reason_id
from ..values.request import AttentionRequest
from ..values.tolerance import ACCURACY
from .call_checks import VARIABLE as CHECKS
from .priorities import LAST_RESORT, priority_for

if TYPE_CHECKING:
    from ..kernels.support.varlen import VarlenKernel

log = logging.getLogger("attention_backends")

Failed = tuple[str, tuple[tuple[str, str], ...], AttentionRequest]
"""Backend, its options as a hashable key, request."""
Failures = Mapping[Failed, str]
"""Text of the error that each raised before. With other options the same backend may work."""
NO_FAILURES: Failures = {}
NO_OPTIONS: Mapping[str, object] = MappingProxyType({})
NOTHING_MEASURES = Reason("autotune.no_times")
"""Note of a decision for `autotune`: the router has no times, `observe/autotune/tuner.py` has."""


@dataclass(frozen=True)
class Rejection:
    """A backend that was considered and rejected, with its reasons."""

    backend: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.backend}: {'; '.join(self.reasons)}"

    @property
    def reason(self) -> Reason:
        """The same text, as an id with values."""
        return Reason("named", name=self.backend, reason=self.reasons)


@dataclass(frozen=True)
class Decision:
    """What runs for one kind of call."""

    backend: str
    source: str
    """Where the choice came from, e.g. `per_role['cross'] (category of 'ltx2.audio_to_video')`."""
    asked: str | None = None
    """The backend that was asked for by name; None when the platform's priorities decided."""
    rejected: tuple[Rejection, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    """Options that the backend runs with; empty for a fallback."""
    asked_options: Mapping[str, object] = field(default_factory=dict)
    """Options that were asked for, kept for a fallback too."""
    notes: tuple[str, ...] = ()
    """Why the priorities would have avoided a backend that was named (`Backend.avoid_reasons`)."""
    accuracy: str | None = None
    """The least exact class allowed for this call; None: the run's."""
    expected: bool = False
    """The backend was asked for in all roles and is not for this one (`Backend.is_not_for`), so nothing failed."""

    @property
    def is_fallback(self) -> bool:
        """True when something else runs than what was asked for."""
        return self.asked not in (None, AUTOTUNE, self.backend)

    @property
    def reason(self) -> str | None:
        """Why something else runs than what was asked for."""
        return self.rejected[0].reason if self.rejected and self.is_fallback else None


def forbidden(accuracy: str) -> Reason:
    """Why a kernel of this accuracy may not run a call with `exact_only`."""
    return Reason("accuracy.forbidden", accuracy=accuracy)


class Router:
    """Selects backends on one platform. Safe to share between threads: entries of its caches are only added."""

    def __init__(
        self, platform: Platform, backends: Mapping[str, Backend] = BACKENDS, *, use_probe_results: bool = True
    ) -> None:
        """`use_probe_results`: a backend that crashed or was wrong in `doctor --probe` counts as unavailable."""
        self.platform = platform
        self.use_probe_results = use_probe_results
        self.backends = backends
        self.priority = priority_for(platform)
        self._unavailable: dict[str, tuple[str, ...]] = {}
        self._kernels: dict[tuple[str, tuple[tuple[str, str], ...]], Kernel] = {}
        self._varlen: dict[tuple[str, tuple[tuple[str, str], ...]], VarlenKernel | None] = {}
        self._lse: dict[tuple[str, tuple[tuple[str, str], ...]], LseKernel | str] = {}

    def unavailable(self, backend_id: str) -> tuple[str, ...]:
        """Why a backend cannot run on this platform; empty when it can. On a real machine it is loaded, once."""
        known = self._unavailable.get(backend_id)
        if known is not None:
            return known
        backend = self.backends.get(backend_id)
        reasons = [Reason("not_a_backend")] if backend is None else backend.unavailable_reasons(self.platform)
        if backend is not None and not reasons and not self.platform.described:
            reasons = self._probe_result(backend_id) or self._loading(backend_id, backend)
        self._unavailable[backend_id] = tuple(reasons)
        return self._unavailable[backend_id]

    def _probe_result(self, backend_id: str) -> list[Reason]:
        # The last resort stays available: without PyTorch's own attention there is no fallback.
        if not self.use_probe_results or backend_id == LAST_RESORT:
            return []
        ids, backend = [backend_id], self.backends[backend_id]
        if isinstance(backend, BackendGroup):  # it loads the first member that is installed
            members = backend.members(self.platform)
            able = (member.id for member in members if not member.unavailable_reasons(self.platform))
            ids += [next(able, backend_id)]
        refusals = (remembered.refusal(name, self.platform) for name in ids)
        return [reason for reason in refusals if reason][:1]

    def _loading(self, backend_id: str, backend: Backend) -> list[Reason]:
        try:
            self._kernels[backend_id, ()] = backend.load(self.platform)
        except (Exception, SystemExit) as error:  # a broken package must not end the process
            return [Reason("loading", error=error_text(error))]
        return []

    def kernel(self, backend_id: str, options: Mapping[str, object] = NO_OPTIONS) -> Kernel:
        """The loaded kernel of an available backend, with options that its declaration allows.

        Raises:
            NoBackendError: it is unavailable, or the machine is only described.
            Exception: raised by the package while it loads with these options.
        """
        reasons = self._unavailable.get(backend_id)
        if reasons is None:
            reasons = self.unavailable(backend_id)
        if reasons:
            raise NoBackendError(f"{backend_id}: {'; '.join(reasons)}")
        if self.platform.described:
            raise NoBackendError(f"{backend_id}: this machine was described, nothing can run on it")
        key = (backend_id, frozen(options) if options else ())
        if key not in self._kernels:
            load: Callable[..., Kernel] = self.backends[backend_id].load
            self._kernels[key] = load(self.platform, **options)
        return self._kernels[key]

    def varlen(self, backend_id: str, options: Mapping[str, object] = NO_OPTIONS) -> VarlenKernel | None:
        """The varlen kernel of a loaded backend; None where it declares none, or the package lacks it."""
        key = (backend_id, frozen(options))
        if key not in self._varlen:
            load: Callable[..., VarlenKernel] = self.backends[backend_id].load_varlen
            try:
                self._varlen[key] = load(self.platform, **options)
            except Exception as error:  # a build without it is no reason against the backend
                log.info("%s has no varlen kernel here: %s: %s", backend_id, type(error).__name__, error)
                self._varlen[key] = None
        return self._varlen[key]

    def lse(self, backend_id: str, options: Mapping[str, object] = NO_OPTIONS) -> LseKernel:
        """The kernel of an available backend that also gives the log-sum-exp, where it has one (`reasons_against`).

        Raises:
            NoBackendError: the package lacks it. Loading is tried once.
        """
        key = (backend_id, frozen(options))
        if key not in self._lse:
            load: Callable[..., LseKernel] = self.backends[backend_id].load_lse
            try:
                self._lse[key] = load(self.platform, **options)
            except (Exception, SystemExit) as error:  # of a broken package
                self._lse[key] = Reason("loading.lse", error=error_text(error))
        loaded = self._lse[key]
        if isinstance(loaded, str):
            raise NoBackendError(loaded)
        return loaded

    def _without_lse(
        self, backend_id: str, request: AttentionRequest, options: Mapping[str, object]
    ) -> tuple[str, ...]:
        """Why a backend cannot give the log-sum-exp of `request`; empty when it can. Loads that kernel, once."""
        limits = self.backends[backend_id].lse_limits(self.platform)
        if limits is None:
            return (Reason("lse.none"),)
        reasons = tuple(limits.reasons(request))
        if reasons or self.platform.described:
            return reasons
        try:
            self.lse(backend_id, options)
        except NoBackendError as error:
            return (str(error),)
        return ()

    def reasons_against(
        self,
        backend_id: str,
        request: AttentionRequest,
        failed: Failures = NO_FAILURES,
        options: Mapping[str, object] = NO_OPTIONS,
    ) -> tuple[str, ...]:
        """Why a backend cannot run `request`, unavailability and earlier failures included; empty when it can."""
        reasons = self.unavailable(backend_id)
        if reasons:
            return reasons
        backend = self.backends[backend_id]
        if options and (wrong := backend.option_reasons(self.platform, options)):
            return tuple(wrong)
        if failed and (error := failed.get((backend_id, frozen(options), request))):
            return (Reason("failed_before", error=error),)
        if request.exact_only and backend.accuracy != "exact":
            return (forbidden(backend.accuracy),)
        reasons = tuple(backend.unsupported_reasons(request, self.platform))
        if options and not reasons:
            reasons = tuple(backend.unsupported_option_reasons(request, self.platform, options))
        return reasons if reasons or not request.lse else self._without_lse(backend_id, request, options)

    def select(
        self,
        request: AttentionRequest,
        choice: Choice,
        *,
        accuracy: str = "exact",
        strict: bool = False,
        failed: Failures = NO_FAILURES,
        category: str = "self",
    ) -> Decision:
        """Choose the backend for `request`, of a role of this category.

        A named backend runs if it can. Otherwise, and for `auto` and `autotune`, the first of the platform's
        priorities without a reason against it runs, within the accuracy of `choice`, else `accuracy`; lossy backends
        come first where they are allowed. `failed` has the backends that raised in the same session.

        Raises:
            NoBackendError: `strict`, and the named backend cannot run the call, except where the model forbids low
                precision (`request.exact_only`) or the backend is `expected` not to; or no backend can. The message has
                the request and every rejection.
        """
        rejected: list[Rejection] = []
        expected = False
        if choice.asked not in (None, AUTOTUNE):
            reasons = self.reasons_against(choice.asked, request, failed, choice.extra)
            if not reasons:
                against = self.backends[choice.asked].avoid_reasons(request, self.platform)
                notes: tuple[str, ...] = ()
                if against:
                    notes = tuple(Reason("named", name=choice.asked, reason=reason) for reason in against)
                extra = choice.extra
                return Decision(choice.asked, choice.source, choice.asked, (), extra, extra, notes)
            rejected.append(Rejection(choice.asked, reasons))
            forbidden = request.exact_only and self._accuracy(choice.asked) != "exact"
            named = self.backends.get(choice.asked)
            expected = choice.for_all_roles and named is not None and named.is_not_for(category, reasons)
            if strict and not forbidden and not expected:
                raise NoBackendError(self.explain_refusal(request, choice, rejected, strict=True))
        accuracy = choice.accuracy or accuracy
        allowed = ACCURACY[: ACCURACY.index(accuracy) + 1]
        lossy = () if accuracy == "exact" else self.priority.lossy
        for backend_id in (*lossy, *self.priority.order):
            if backend_id == choice.asked:
                continue
            reasons = self.reasons_against(backend_id, request, failed)
            if not reasons and self._accuracy(backend_id) not in allowed:
                reasons = (Reason("accuracy.not_allowed", accuracy=self._accuracy(backend_id)),)
            if not reasons:
                reasons = tuple(self.backends[backend_id].avoid_reasons(request, self.platform))
            if not reasons:
                return self._fallback_decision(backend_id, choice, rejected, expected)
            rejected.append(Rejection(backend_id, reasons))
        if choice.asked != COMFY:
            reasons = self.reasons_against(COMFY, request, failed)
            if not reasons:
                return self._fallback_decision(COMFY, choice, rejected, expected)
            rejected.append(Rejection(COMFY, reasons))
        raise NoBackendError(self.explain_refusal(request, choice, rejected))

    def _fallback_decision(
        self, backend_id: str, choice: Choice, rejected: list[Rejection], expected: bool
    ) -> Decision:
        extra, accuracy = choice.extra, choice.accuracy
        notes = (NOTHING_MEASURES,) if choice.asked == AUTOTUNE else ()
        return Decision(backend_id, choice.source, choice.asked, tuple(rejected), {}, extra, notes, accuracy, expected)

    def decide(
        self, request: AttentionRequest, layers: tuple[AttentionConfig, ...], role: str, category: str
    ) -> Decision:
        """Resolve the role in `layers`, then select."""
        settings = settings_of(layers)
        choice = resolve(layers, role, category)
        return self.select(request, choice, accuracy=settings.accuracy, strict=settings.strict, category=category)

    def default_backend(self) -> str:
        """The first available backend of the priorities, before any call is known."""
        return next((backend_id for backend_id in self.priority.order if not self.unavailable(backend_id)), LAST_RESORT)

    def explain_refusal(
        self, request: AttentionRequest, choice: Choice, rejected: list[Rejection], *, strict: bool = False
    ) -> str:
        """The text of an error: the request, each backend with its reasons, and what to do."""
        lines = [
            f"no attention backend for this call (asked for {choice.asked or 'auto'} via {choice.source})",
            f"  call: {request.describe()}",
            f"  machine: {self.platform.describe()}",
            *(f"  {rejection}" for rejection in rejected),
        ]
        tried = {rejection.backend for rejection in rejected}
        able: list[str] = []
        others: dict[tuple[str, ...], list[str]] = {}  # backends that share their reasons share a line
        for backend_id, backend in self.backends.items():
            reasons = self.reasons_against(backend_id, request)
            if backend_id in tried:
                continue
            if reasons:
                others.setdefault(reasons, []).append(backend_id)
            elif backend.accuracy == "exact" and backend.candidate:
                able.append(backend_id)
        lines += [f"  {', '.join(names)}: {'; '.join(reasons)}" for reasons, names in others.items()]
        advice = [f"choose one that can run it ({', '.join(able)})"] if able else []
        advice += ["switch strict off to fall back"] if strict else []
        if any(reason_id(reason) == "failed_before" for rejection in rejected for reason in rejection.reasons):
            advice.append(f"set {CHECKS}=1 to learn whether the call's tensors fit together")
        lines += [f"  what to do: {', or '.join(advice)}"] if advice else []
        return "\n".join(lines)

    def _accuracy(self, backend_id: str) -> str:
        backend = self.backends.get(backend_id)
        return backend.accuracy if backend is not None else "exact"
