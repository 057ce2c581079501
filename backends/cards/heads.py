"""Divides calls of a session over other local cards where that pays; the session's `Divider`.

Everything that keeps a call on the home card is a reason: of the whole run (`off`), of a card (`leave_out`), or of a
kind of call. The first time it is noted in the run report.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..config import frozen
from ..config.layers import Choice
from ..engine.observer import Divider
from ..engine.plan import CallKind
from ..kernels.backend import Backend, Kernel
from ..measure.device_clock import DeviceClock
from ..values.reasons import Reason
from .card import Card, unrepeated
from .cost import volume_of
from .divided import DividedKernel
from .estimate import Estimate
from .parts import groups_of

if TYPE_CHECKING:
    import torch

    from ..engine.router import Decision
    from ..engine.session import Session
    from ..values.request import AttentionCall

log = logging.getLogger("attention_backends")

MakeRoom = Callable[[int, "torch.device"], None]
"""Asks the host for so many free bytes on a device."""
MOST_KINDS = 1024
"""Kinds of call whose times are kept, which are dropped then."""


class HeadsOverCards(Divider):
    """Heads over the home card and others. Used by one thread, as its session is."""

    def __init__(
        self,
        session: Session,
        cards: Callable[[torch.Tensor], Sequence[Card]],
        *,
        clock: DeviceClock | None = None,
        make_room: MakeRoom | None = None,
    ) -> None:
        """
        Args:
            cards: the other cards, made with the first call that may be divided, from a tensor of the home device.
            clock: times work on the home card; default: of its kind.
            make_room: called before a part needs more memory on a card than any before.
        """
        self.session = session
        self.router = session.router
        self.run_report = session.run_report
        self.clock = clock if clock is not None else DeviceClock(session.router.platform.kind)
        self.make_room = make_room
        self.off: Reason | None = None
        """Why no call is divided any more."""
        self.cards: Sequence[Card] = ()
        self._make: Callable[[torch.Tensor], Sequence[Card]] | None = cards
        self._estimates: dict[tuple[object, ...], Estimate] = {}
        self._noted: set[str] = set()

    def divided(self, kind: CallKind, decision: Decision, backend: Backend, kernel: Kernel) -> Kernel:
        if self.off is not None:
            return kernel
        reason = self._undivided(kind, backend)
        if reason is not None:
            self.keep_home(kind, decision.backend, reason)
            return kernel
        if decision.backend == decision.asked:
            choice = Choice(decision.asked, decision.source, decision.options, decision.accuracy)
        else:  # the other cards may be no less exact than what runs here
            choice = Choice(None, decision.source, accuracy=backend.accuracy)
        return DividedKernel(self, kernel, kind, decision, choice)

    def _undivided(self, kind: CallKind, backend: Backend) -> Reason | None:
        """Why calls of this kind are never divided."""
        if backend.hosted:
            return Reason("cards.hosted")
        if backend.sparse:
            return Reason("cards.sparse")
        if kind.request.lse:
            return Reason("cards.lse")
        if groups_of(kind.request) < 2:
            return Reason("cards.one_head")
        return None

    def estimate(self, call: AttentionCall, kind: CallKind, decision: Decision) -> Estimate:
        """The times of calls like this one, in any block; makes the cards with the first call."""
        if self._make is not None:
            make, self._make = self._make, None
            self._take(make, call.query)
        mask = call.attn_mask
        by_head = mask is not None and mask.shape[1] > 1 and mask.stride(1) != 0
        size = 0 if mask is None else unrepeated(mask).nbytes
        key = (kind.request, decision.backend, frozen(decision.options), size, by_head)
        found = self._estimates.get(key)
        if found is None:
            if len(self._estimates) >= MOST_KINDS:
                self._estimates.clear()
            volume = volume_of(kind.request, size, by_head)
            found = Estimate(groups_of(kind.request), volume, [card.speed for card in self.cards])
            self._estimates[key] = found
        return found

    def _take(self, make: Callable[[torch.Tensor], Sequence[Card]], like: torch.Tensor) -> None:
        try:
            self.cards = make(like)
        except Exception as error:  # out of memory while a link is measured, a card that cannot be used
            self.turn_off(Reason("cards.failed", error=f"{type(error).__name__}: {error}"))
            return
        self.run_report.cards |= {card.name: card.run_report for card in self.cards}
        if not self.cards:
            self.turn_off(Reason("cards.alone"))

    def ask_for_room(self, card: Card, size: int) -> None:
        """Ask the host for memory on a card, where more is needed than before."""
        if size > card.room:
            card.room = size
            if self.make_room is not None:
                self.make_room(size, card.transport.device)

    def turn_off(self, reason: Reason) -> None:
        """Divide no call any more."""
        if self.off is None:
            self.off = reason
            self._note(Reason("cards.off", reason=reason))

    def leave_out(self, card: Card, error: BaseException) -> None:
        """Use a card no more in this run, after it failed."""
        if card.speed.out is None:
            card.speed.out = Reason("unavailable", why=f"{type(error).__name__}: {error}")
            self._note(Reason("cards.left_out", card=card.name, reason=card.speed.out))
            for estimate in self._estimates.values():
                estimate.forget(self.cards.index(card))
        if all(one.speed.out is not None for one in self.cards):
            self.turn_off(Reason("cards.none_left"))

    def keep_home(self, kind: CallKind, backend: str, reason: Reason) -> None:
        """Note why calls of a kind are not divided; what is off for all calls has its note."""
        if self.off is not None:
            return
        request = kind.request
        self._note(
            Reason(
                "cards.home", backend=backend, heads=request.num_heads, q_len=request.q_len, kv_len=request.kv_len,
                reason=reason,
            )
        )  # fmt: skip

    def _note(self, reason: Reason) -> None:
        if reason not in self._noted:
            self._noted.add(reason)
            if self.run_report.note(reason):
                log.info("%s", reason)

    def close(self) -> None:
        """End the run: free the cards' buffers."""
        for card in self.cards:
            card.transport.release()
