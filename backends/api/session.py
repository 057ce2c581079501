"""The session of `attention`: a thread has one for each context, device and `backend` of a call; it has the plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import AttentionConfig
from ..config.layers import cards_of, resolve
from ..config.text import parse_config
from ..engine.mask_reader import inspect
from ..engine.plan import CPU, CallKind, Slot
from ..engine.router import Router
from ..engine.routers import router_for
from ..engine.session import Session
from ..engine.sub_calls import calls_of, plan_sub_calls
from ..observe import observe
from ..report import RunReport
from ..values.grid import TokenGrid
from ..values.mask_plan import MaskPlan, passed_on
from ..values.request import AttentionCall
from ..values.roles import category_of
from .context import KEPT, Context, ThreadSessions

if TYPE_CHECKING:
    import torch


def new_session(
    context: Context, device: torch.device, backend: str | AttentionConfig | None, own: ThreadSessions
) -> CallSession:
    """The session of calls in one context, on one device, with `backend` as they give it."""
    layers = context.layers
    if backend is not None and not context.forced:
        layers = (parse_config(backend, "attention(backend)"), *layers)
    elif isinstance(backend, AttentionConfig) and backend.cards is not None:  # `force_backend` decides the backend only
        layers = (AttentionConfig(cards=backend.cards, source=backend.source), *layers)
    if len(own.sessions) >= KEPT:
        own.sessions.clear()
    own.run_report.device = device.type
    return CallSession(router_for(device), layers, device, context.checks, own.run_report)


class CallSession(Session):
    """A session with the slots of its calls, by everything that can change a decision."""

    def __init__(
        self, router: Router, layers: tuple[AttentionConfig, ...], device: torch.device, check_calls: bool,
        run_report: RunReport,
    ) -> None:  # fmt: skip
        super().__init__(router, layers, run_report, checks=False, device=device)
        observe(self)
        if cards_of(layers):
            from ..cards.over import divide

            divide(self, device, router_for)
        self.check_calls = check_calls
        """Whether each call is validated before it is planned."""
        self.slots: dict[tuple[object, ...], tuple[Slot | None, bool]] = {}
        """Call key -> (slot, grouped); the slot is None if the mask must be read first."""
        self.by_mask: dict[tuple[object, ...], Slot] = {}

    def keep(self, key: tuple[object, ...], kind: CallKind) -> tuple[Slot | None, bool]:
        """Plan a kind of call and store it under `key`."""
        if len(self.slots) >= KEPT:
            self.slots.clear()
        slot = None if self.reads_mask(kind) else self.plan(kind)
        planned = self.slots[key] = slot, kind.request.grouped
        return planned

    def reads_mask(self, kind: CallKind) -> bool:
        """Whether the values of a mask are read before the call runs.

        On the CPU always: it is cheap, and fewer keys are less work. On an accelerator reading synchronises, so only
        for a named backend that refuses the mask and accepts the call without it.
        """
        request = kind.request
        if request.lse:  # sub-calls would give the LSE of their own keys
            return False
        if request.mask == "none" or self.device_index == CPU:
            return request.mask != "none"
        asked = resolve(self.layers, kind.role, kind.category).asked
        if asked is None or not self.router.reasons_against(asked, request):
            return False
        return not self.router.reasons_against(asked, request._replace(mask="none"))

    def slot_by_mask(
        self, key: tuple[object, ...], call: AttentionCall, role: str, grid: TokenGrid | None = None
    ) -> tuple[Slot, MaskPlan]:
        """Read the mask of a call; returns its slot and mask plan."""
        mask_plan = passed_on(None)
        if call.attn_mask is not None:
            mask_plan = inspect(call.attn_mask, call.key.shape[2], grid is not None)
        key = (*key, mask_plan.facts)
        slot = self.by_mask.get(key)
        if slot is None:
            if len(self.by_mask) >= KEPT:
                self.by_mask.clear()
            slot = self.by_mask[key] = self._planned(mask_plan, call, role, grid)
        return slot, mask_plan

    def _planned(self, mask_plan: MaskPlan, call: AttentionCall, role: str, grid: TokenGrid | None) -> Slot:
        category = category_of(role)
        calls = calls_of(self, mask_plan, call, resolve(self.layers, role, category).asked, grid)
        if not calls:
            return self.plan(CallKind(call.request(grid=grid), role, category))

        def planned(part: AttentionCall, mask_text: str, of_part: TokenGrid | None) -> Slot:
            return self.plan(CallKind(part.request(grid=of_part), role, category, mask=mask_text))

        return plan_sub_calls(self, mask_plan, call, calls, planned, grid)
