"""Where in a chosen model the current thread is: a `ModelCall` for each forward of the model, found by its calls."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from ...backends.config.layers import Choice, resolve
from ...backends.config.names import AUTO, AUTOTUNE
from ...backends.config.timetable import ALWAYS, Window
from ...backends.engine.call_checks import differing
from ...backends.engine.mask_reader import inspect
from ...backends.engine.plan import CallKind, Slot
from ...backends.engine.priorities import LAST_RESORT
from ...backends.engine.sub_calls import calls_of, fits, plan_sub_calls
from ...backends.values.errors import NoBackendError
from ...backends.values.grid import TokenGrid
from ...backends.values.mask_plan import NOTHING_HIDDEN, MaskPlan
from ...backends.values.reasons import Reason
from ...backends.values.request import AttentionCall, AttentionRequest

if TYPE_CHECKING:
    from .runs import DeviceSession, Run
    from .stand_ins import AttentionModule


_current: ContextVar[ModelCall | None] = ContextVar("attention_backends.diffusers", default=None)
current = _current.get
"""The forward of a chosen model that this thread is in, or None."""
set_current = _current.set

MOST_APART = 4
"""Calls of one module's forward that can have roles of their own; later ones share the last one's plan."""
HOST = "diffusers"
"""In run reports: Diffusers' own function computed the call."""
KEPT = 4096
"""Most kinds of call in a cache, which is cleared then."""


class CallPlan:
    """How every call of one kind runs."""

    __slots__ = (
        "bshd", "checks_tensors", "choice", "device_index", "dtype", "grouped", "has_no_options", "k_shape", "kind",
        "kv_len", "only_host", "q_len", "q_shape", "session", "slot", "v_shape", "window",
    )  # fmt: skip

    def __init__(
        self, session: DeviceSession, window: Window,
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bshd: bool,
    ) -> None:  # fmt: skip
        """The tensors are the first call's; `bshd`: (batch, length, heads, head_dim), else (batch, heads, ...)."""
        self.session = session
        self.window = window
        self.bshd = bshd
        self.q_shape, self.k_shape, self.v_shape = query.shape, key.shape, value.shape
        self.dtype, self.device_index = query.dtype, query.get_device()
        length = -3 if bshd else -2
        self.q_len, self.kv_len = (tensor.shape[length] if tensor.ndim > 2 else 0 for tensor in (query, key))
        self.has_no_options = False
        """No mask, not causal, the default scale, heads not grouped; and there is a `slot`."""
        self.only_host = ""
        """Why Diffusers' own function computes these calls; empty where a kernel does."""
        self.slot: Slot | None = None
        """None where the values of the mask are read before each call."""
        self.grouped = False
        self.checks_tensors = True
        self.kind: CallKind | None = None
        self.choice: Choice | None = None


class ModelCall:
    """One forward of a chosen model in one thread; used again for later ones of the same run."""

    __slots__ = (
        "grids", "mask_plans", "module", "ordinal", "plans", "routing", "run", "session", "step", "window",
    )  # fmt: skip

    def __init__(self, run: Run, session: DeviceSession) -> None:
        self.run = run
        self.routing = run.routing
        self.session = session
        self.plans: dict[tuple[Any, ...], CallPlan] = session.plans
        self.window: Window = ALWAYS
        self.module: AttentionModule | None = None
        """The attention module whose forward is running."""
        self.ordinal = 0
        """Calls that its forward has made so far."""
        self.step: int | None = None
        self.grids: Callable[[str, str, int], TokenGrid | None] | None = None
        """(role, category, q_len) -> the token grid; None where no sparse backend is asked for."""
        self.mask_plans: dict[int, tuple[torch.Tensor, int, bool, MaskPlan]] = {}
        """Mask plans of this forward by the id of the mask, which is held here."""

    def choice(self, role: str, category: str, block: str, masked: bool) -> Choice:
        """What is asked for such calls now."""
        timetable = self.run.timetable
        if timetable is None:
            return resolve(self.session.layers, role, category)
        choice, note = timetable.resolve(self.window.entries, role, category, block, masked)
        if note:
            self.run.note(note)
        return choice

    def new_plan(
        self, plan_key: tuple[Any, ...], ordinal: int,
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
        is_causal: bool, scale: float | None, enable_gqa: bool, bshd: bool,
    ) -> CallPlan:  # fmt: skip
        """Decide how calls of one kind run, and keep it where it holds for all of them.

        Raises:
            NoBackendError: strict, and the named backend cannot run such calls.
        """
        session = self.run.session(query.device)
        plan = CallPlan(session, self.window, query, key, value, bshd)
        text = differing(query, key, value, mask)
        plan.only_host = text or _only_host(query, key, value, mask, bshd, enable_gqa)
        if not plan.only_host:
            if bshd:
                query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            if mask is not None:
                mask = mask[(None,) * (4 - mask.ndim)]
            call = AttentionCall(query, key, value, mask, is_causal, scale, enable_gqa)
            if not fits(call):
                plan.only_host = f"mask {tuple(mask.shape) if mask is not None else ''} does not fit the call"
            elif mask is not None and is_causal:
                plan.only_host = "is_causal together with a mask"
            else:
                self._plan(plan, ordinal, call)
        if plan.only_host:
            plan.kind, plan.choice = self._kind_of_host(ordinal, plan.q_len, plan.kv_len)
        plan.has_no_options = plan.slot is not None and mask is None and scale is None and not (is_causal or enable_gqa)
        if text:  # of this call alone: a key has the query's dtype and device
            return plan
        if len(self.plans) >= KEPT:
            self.session.forget()
        self.plans[plan_key] = plan
        return plan

    def _plan(self, plan: CallPlan, ordinal: int, call: AttentionCall) -> None:
        session, module = plan.session, self.module
        assert module is not None  # noqa: S101  # a call is planned while a module runs
        kind = self._kind(ordinal, call.request())
        request = kind.request
        masked = request.mask != "none"
        choice = self.choice(kind.role, kind.category, kind.block, masked)
        plan.kind, plan.choice, plan.grouped = kind, choice, request.grouped
        if masked and self._reads_mask(choice, request, session):
            return
        plan.slot = session.plan(kind, choice=choice)
        # PyTorch's own function compares dtypes and devices; its operators, and packages, need not.
        decision = plan.slot.plan.decision
        plan.checks_tensors = not (decision.backend == LAST_RESORT and session.router.platform.kind == "cpu")

    def _kind(self, ordinal: int, request: AttentionRequest) -> CallKind:
        module = self.module
        assert module is not None  # noqa: S101
        role = module.role(ordinal, request.q_len, request.kv_len)
        self.run.run_report.categories[role.name] = role.category
        if role.guessed:
            self.run.note(Reason("role.guessed", role=role.name, path=module.pattern))
        if self.grids is not None:
            request = request._replace(grid=self.grids(role.name, role.category, request.q_len))
        return CallKind(request, role.name, role.category, module.block)

    def _reads_mask(self, choice: Choice, request: AttentionRequest, session: DeviceSession) -> bool:
        """Whether the values of the mask are read: only for a named backend that refuses the mask and takes the call
        without it. Else the kernel gets the mask as the model made it.
        """
        asked = choice.asked
        if asked in (None, AUTO, AUTOTUNE) or not session.router.reasons_against(asked, request):
            return False
        return not session.router.reasons_against(asked, request._replace(mask="none"))

    def slot_by_mask(self, plan: CallPlan, plan_key: tuple[Any, ...], call: AttentionCall) -> tuple[Slot, MaskPlan]:
        """Read the mask of a call, once per forward of the model; returns the slot and the mask plan."""
        mask, kv_len, on_grid = call.attn_mask, call.key.shape[2], self.grids is not None
        assert mask is not None  # noqa: S101
        known = self.mask_plans.get(id(mask))
        if known is None or known[0] is not mask or known[1:3] != (kv_len, on_grid):
            known = self.mask_plans[id(mask)] = mask, kv_len, on_grid, inspect(mask, kv_len, on_grid)
        mask_plan = known[3]
        by_mask = plan.session.by_mask
        key = (*plan_key, mask_plan.facts)
        slot = by_mask.get(key)
        if slot is None:
            if len(by_mask) >= KEPT:
                by_mask.clear()
            slot = by_mask[key] = self._planned_by_mask(plan, mask_plan, call)
        return slot, mask_plan

    def _planned_by_mask(self, plan: CallPlan, mask_plan: MaskPlan, call: AttentionCall) -> Slot:
        session, kind = plan.session, plan.kind
        assert kind is not None  # noqa: S101
        masked = mask_plan.strategy not in ("none", NOTHING_HIDDEN)
        choice = self.choice(kind.role, kind.category, kind.block, masked)
        grid = kind.request.grid
        calls = calls_of(session, mask_plan, call, choice.asked, grid)
        if not calls:
            return session.plan(kind, choice=choice)

        def planned(part: AttentionCall, mask_text: str, of_part: TokenGrid | None) -> Slot:
            return session.plan(kind._replace(request=part.request(grid=of_part), mask=mask_text), choice=choice)

        return plan_sub_calls(session, mask_plan, call, calls, planned, grid)

    def _kind_of_host(self, ordinal: int, q_len: int, kv_len: int) -> tuple[CallKind, Choice]:
        module = self.module
        assert module is not None  # noqa: S101
        role = module.role(ordinal, q_len, kv_len)
        self.run.run_report.categories[role.name] = role.category
        request = AttentionRequest(1, 1, q_len, kv_len, 1, "float32")
        kind = CallKind(request, role.name, role.category, module.block)
        return kind, self.choice(role.name, role.category, module.block, masked=False)

    def by_host(
        self, host: Callable[[], torch.Tensor], text: str, q_len: int, kv_len: int, ordinal: int | None = None
    ) -> torch.Tensor:
        """Let Diffusers' own function compute a call, and count it.

        Raises:
            NoBackendError: strict, and a backend was named.
        """
        if ordinal is None:
            ordinal = self.ordinal
            self.ordinal = ordinal + 1
        kind, choice = self._kind_of_host(ordinal, q_len, kv_len)
        return self._count_host(host, kind, choice, text or "the tensors differ in dtype or device")

    def planned_by_host(self, host: Callable[[], torch.Tensor], plan: CallPlan) -> torch.Tensor:
        """The same for a call whose plan says so; raises as `by_host`."""
        assert plan.kind is not None  # noqa: S101
        assert plan.choice is not None  # noqa: S101
        return self._count_host(host, plan.kind, plan.choice, plan.only_host)

    def _count_host(self, host: Callable[[], torch.Tensor], kind: CallKind, choice: Choice, text: str) -> torch.Tensor:
        if choice.asked not in (None, AUTO, AUTOTUNE) and self.session.settings.strict:
            raise NoBackendError(
                f"only Diffusers' own function can compute a call of role {kind.role}: {text}\n"
                f"  asked for: {choice.asked} via {choice.source}\n"
                "  what to do: leave strict off to fall back"
            )
        output = host()
        row = self.run.run_report.row(kind.role, kind.block, HOST, choice.source, "-", text, choice.asked)
        row.calls += 1
        return output


def _only_host(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, bshd: bool,
    enable_gqa: bool,
) -> str:  # fmt: skip
    """Why Diffusers' own function must compute such calls; empty where kernels may."""
    if not query.ndim == key.ndim == value.ndim == 4:
        return f"query, key and value have {query.ndim}, {key.ndim} and {value.ndim} dimensions, not 4 each"
    if not (query.shape[0] == key.shape[0] == value.shape[0]):
        return f"batches {query.shape[0]}, {key.shape[0]} and {value.shape[0]} differ"
    heads = 2 if bshd else 1
    grouped = query.shape[heads] != key.shape[heads]
    uneven = key.shape[heads] != value.shape[heads] or query.shape[heads] % max(key.shape[heads], 1)
    if uneven or (grouped and not enable_gqa):
        return f"{query.shape[heads]} heads of queries over {key.shape[heads]} and {value.shape[heads]}"
    if 0 in (*query.shape, *key.shape, *value.shape):
        return "a tensor without elements"
    if mask is not None and (mask.ndim > 4 or mask.is_complex()):
        return f"mask {tuple(mask.shape)} of {mask.dtype}"
    return ""


__all__ = ["HOST", "CallPlan", "ModelCall", "current", "set_current"]
