"""`GroupSession`: a session whose plans all ranks of a group agree on.

It plans what `agreement.py` decided and has no fallback: a kernel that fails is an error, which `group_call.py` reports
to the other ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ..config.layers import Choice, resolve
from ..engine.mask_reader import inspect
from ..engine.plan import CPU, CallKind, Slot
from ..engine.session import Session
from ..engine.sub_calls import Calls, calls_of, grid_of_part, plan_sub_calls
from ..observe.guard import Guard
from ..values.grid import TokenGrid
from ..values.mask_plan import MaskPlan
from ..values.request import AttentionCall, AttentionRequest, Host, LseCall, SplitCall
from .agreement import Agreed, named

if TYPE_CHECKING:
    import torch

KEPT = 4096
"""Most plans in a session, and agreements of a group; all are dropped then."""


class LocalCall(NamedTuple):
    """A call that this rank computes, and how its mask is honoured."""

    call: AttentionCall
    mask_plan: MaskPlan | None
    """None: the mask was not read."""
    calls: Calls
    """Its sub-calls; empty: it runs whole."""
    grid: TokenGrid | None

    @property
    def requests(self) -> list[AttentionRequest]:
        if not self.calls or self.mask_plan is None:
            return [self.call.request(lse=isinstance(self.call, LseCall), grid=self.grid)]
        parts = zip(self.mask_plan.sub_calls, self.calls, strict=True)
        made = (sub.request(grid=grid_of_part(self.grid, part)) for part, sub in parts if sub is not None)
        return list(dict.fromkeys(made))


class GroupSession(Session):
    """Plans and runs this rank's part of the calls of a group."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """Arguments: of `Session`."""
        super().__init__(*arguments, **keywords)
        self.slots: dict[object, tuple[Agreed, Slot]] = {}
        """Key -> the agreement that a slot was planned for, and the slot."""
        self.digests: dict[object, int] = {}
        """Facts of a call on this rank -> their digest."""
        self.is_new = True
        """Whether it has made no call that all ranks take."""

    def choice(self, role: str, category: str) -> Choice:
        """What the configurations ask for."""
        return resolve(self.layers, role, category)

    def refused(self, kind: CallKind, accuracy: str) -> str | None:
        """Why an observer refuses a backend of this accuracy for calls of `kind`; None: it does not."""
        veto = self._veto(kind, accuracy)
        return None if veto is None else veto.reason

    def may_refuse(self, agreed: Agreed) -> bool:
        """Whether an observer may refuse an output of the agreed backend: a guard that enforces its budget."""
        guard = self.registered(Guard)
        return guard is not None and guard.enforces and guard.covers(self.router.backends[agreed.backend].accuracy)

    def local(self, call: AttentionCall, role: str, category: str, grid: TokenGrid | None, *, lse: bool) -> LocalCall:
        """Read the mask of a call where `attention` reads it without a group, except for the log-sum-exp."""
        if call.attn_mask is None or lse or not self._reads_mask(call, role, category, grid):
            return LocalCall(call, None, [], grid)
        mask_plan = inspect(call.attn_mask, call.key.shape[2], grid is not None)
        asked = named(self.choice(role, category))
        return LocalCall(call, mask_plan, calls_of(self, mask_plan, call, asked, grid), grid)

    def _reads_mask(self, call: AttentionCall, role: str, category: str, grid: TokenGrid | None) -> bool:
        if self.device_index == CPU:
            return True
        asked, request = named(self.choice(role, category)), call.request(grid=grid)
        if asked is None or not self.router.reasons_against(asked, request):
            return False
        return not self.router.reasons_against(asked, request._replace(mask="none"))

    def slot(self, key: object, agreed: Agreed, kind: CallKind) -> Slot:
        """The slot of one kind of kernel call under an agreement."""
        known = self.slots.get((key, kind))
        if known is not None and known[0] is agreed:
            return known[1]
        return self._keep((key, kind), agreed, self._planned(agreed, kind))

    def slot_of_local(self, key: object, agreed: Agreed, local: LocalCall, kind: CallKind) -> Slot:
        """The slot of a call whose mask may divide it."""
        if not local.calls or local.mask_plan is None:
            return self.slot(key, agreed, kind)
        known = self.slots.get(key)
        if known is not None and known[0] is agreed:
            return known[1]

        def planned(part: AttentionCall, mask_text: str, grid: TokenGrid | None) -> Slot:
            return self._planned(agreed, kind._replace(request=part.request(grid=grid), mask=mask_text))

        return self._keep(
            key, agreed, plan_sub_calls(self, local.mask_plan, local.call, local.calls, planned, local.grid)
        )

    def _keep(self, key: object, agreed: Agreed, slot: Slot) -> Slot:
        if len(self.slots) >= KEPT:
            self.slots.clear()
        self.slots[key] = agreed, slot
        return slot

    def _planned(self, agreed: Agreed, kind: CallKind) -> Slot:
        choice = self.choice(kind.role, kind.category)
        decision = agreed.decision(choice)
        self.run_report.categories[kind.role] = kind.category
        self._log_decision(decision, kind, None)
        slot = Slot()
        slot.plan = self.plan_of(kind, decision, reason=agreed.exact_because)
        for observer in self.observers:
            observer.planned(slot, self.router)
        return slot

    def recover(
        self, slot: Slot, call: AttentionCall, error: Exception, host: Host | None = None,
        arguments: tuple[Any, ...] = (),
    ) -> torch.Tensor:  # fmt: skip
        """Raises `error`: another kernel is a decision of the group."""
        raise error

    def attention_varlen(self, slot: Slot, call: AttentionCall, mask_plan: MaskPlan) -> torch.Tensor | None:
        """One varlen call for all sub-calls; raises what its kernel raises."""
        output = slot.plan.compute(SplitCall(call, mask_plan))
        slot.plan.row.calls += 1
        return output
