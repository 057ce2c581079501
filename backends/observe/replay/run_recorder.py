"""Records the decisions of a run for each kind of call and block, when plans are made, not at attention calls.

The kernel of a kind of call can change during a run: a schedule window begins, the guard vetoes a kernel, a kernel
fails. So each decision has its first model call; model calls are numbered from 1, as in `report/timeline.py`.
`record.py` makes plain data of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from ...engine.observer import Observer
from ...values.request import AttentionRequest

if TYPE_CHECKING:
    from ...engine.plan import Slot
    from ...engine.router import Router
    from ...values.platform import Platform


class KernelUsed(NamedTuple):
    """The kernel that ran calls of one kind, with its options."""

    backend: str
    member: str | None
    options: tuple[tuple[str, object], ...]
    accuracy: str
    source: str
    asked: str | None
    reason: str | None

    def same_kernel(self, other: KernelUsed) -> bool:
        """Whether both compute the same numbers."""
        return self[:3] == other[:3]


class RecordedKind(NamedTuple):
    """Key of calls that share decisions: role, block, facts."""

    role: str
    block: str
    request: AttentionRequest


class _Location(NamedTuple):
    kind: RecordedKind
    window: Hashable
    """The active schedule entries and the record's segment when the call was planned."""


class RunRecorder(Observer):
    """The decisions of one sampling run, each with its first model call."""

    def __init__(self) -> None:
        self.categories: dict[str, str] = {}
        self.platforms: dict[Platform, None] = {}
        self.changes: dict[str, None] = {}
        """Changes of kernel that the schedule did not cause; a replay repeats them."""
        self.not_repeated: dict[str, None] = {}
        """Events that a replay cannot reproduce."""
        self._model_call = 1
        self._router: Router | None = None
        self._windows: list[tuple[int, Hashable]] = []
        self._events: dict[_Location, list[tuple[int, KernelUsed]]] = {}
        self._slots: dict[int, tuple[Slot, _Location]] = {}
        self._now: dict[_Location, dict[int, KernelUsed]] = {}
        """Kernel of each slot by role and block: several where a block has several modules of one role."""

    def begin_model_call(self, number: int, window: Hashable) -> None:
        """A model call begins; `window`: the active schedule entries and the record's segment."""
        self._model_call = number
        if not self._windows or self._windows[-1][1] != window:
            self._windows.append((number, window))

    def planned(self, slot: Slot, router: Router) -> None:
        """Record the first plan of a slot."""
        window = self._windows[-1][1] if self._windows else None
        kind = slot.plan.kind
        location = _Location(RecordedKind(kind.role, kind.block, kind.request), window)
        self._slots[id(slot)] = slot, location
        self.categories[kind.role] = kind.category
        if router is not self._router:
            self._router = router
            self.platforms[router.platform] = None
        self._note(slot, location, router)

    def changed(self, slot: Slot, router: Router) -> None:
        """Record that a slot has another plan from this model call on."""
        _, location = self._slots.get(id(slot), (slot, None))
        if location is None:
            return  # planned before this recorder existed
        before = self._now[location][id(slot)]
        self._note(slot, location, router)
        after = self._now[location][id(slot)]
        if after.same_kernel(before):  # the same kernel again
            return
        where = " ".join(filter(None, ("role", location.kind.role, location.kind.block)))
        why = f" ({after.reason})" if after.reason else ""
        self.changes[f"{where}: {before.backend} -> {after.backend} from model call {self._model_call} on{why}"] = None

    def _note(self, slot: Slot, location: _Location, router: Router) -> None:
        plan, decision = slot.plan, slot.plan.decision
        backend = router.backends[decision.backend]
        host = plan.function if backend.hosted else None
        ran = KernelUsed(
            decision.backend,
            plan.row.member if host is None else host.kernel_name(plan.request, router.platform),
            tuple(sorted(decision.options.items())),
            (host or backend).accuracy,
            decision.source,
            decision.asked,
            plan.row.reason,
        )
        now = self._now.setdefault(location, {})
        if now.get(id(slot)) == ran:
            return
        now[id(slot)] = ran
        events = self._events.setdefault(location, [])
        if not events or events[-1][1] != ran:
            events.append((self._model_call, ran))
        # A copy: threads of other devices add to it.
        if len(now) > 1 and any(not ran.same_kernel(other) for other in tuple(now.values())):
            where = " ".join(filter(None, ("role", location.kind.role, location.kind.block)))
            self.not_repeated[f"{where}: from model call {self._model_call} on, equal calls ran different kernels"] = (
                None
            )

    def decisions(self) -> Iterator[tuple[RecordedKind, tuple[tuple[int, KernelUsed], ...]]]:
        """Each kind of call with its (first model call, kernel) pairs; the first is model call 1."""
        kinds = dict.fromkeys(location.kind for location in self._events)
        starts = self._windows or [(1, None)]
        for kind in kinds:
            used: list[tuple[int, KernelUsed]] = []
            for (first, window), (end, _) in zip(starts, [*starts[1:], (1 << 62, None)], strict=True):
                events = self._events.get(_Location(kind, window), [])
                before = [ran for number, ran in events if number <= first]
                in_window = [(first, before[-1])] if before else []
                in_window += [(number, ran) for number, ran in events if first < number < end]
                for number, ran in in_window:
                    if used and used[-1][0] == number:  # changed in the model call in which it was planned
                        used.pop()
                    if not used or used[-1][1] != ran:
                        used.append((number, ran))
            yield kind, tuple((1 if index == 0 else number, ran) for index, (number, ran) in enumerate(used))
