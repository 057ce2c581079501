"""Another card: its transport, and a session that chooses and runs backends there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..config import frozen
from ..config.layers import Choice
from ..engine.plan import CallKind, Slot
from ..engine.session import Session
from ..report import RunReport
from ..values.request import AttentionCall
from .estimate import Speed, Times
from .transport import Transport

if TYPE_CHECKING:
    import torch

    from ..config import AttentionConfig
    from ..engine.router import Router

MOST_PLANS = 1024
"""Kinds of call whose plans are kept, which are dropped then."""


class Asked(NamedTuple):
    """A part of a call for another card, beside its tensors."""

    kind: CallKind
    choice: Choice


class Card:
    """One of the other cards of a run. `compute` is called by its worker only."""

    def __init__(
        self,
        transport: Transport,
        router_for: Callable[[torch.device], Router],
        layers: tuple[AttentionConfig, ...],
        like: torch.Tensor,
    ) -> None:
        """
        Args:
            router_for: gives the router of a device.
            layers: the configurations of the run.
            like: a tensor of the home device; the link is measured now.
        """
        self.transport = transport
        self.name = transport.name
        self.run_report = RunReport(mode="off", layers=layers)
        """What ran on this card, with calls and no times."""
        self.session = Session(
            router_for(transport.device), layers, self.run_report, checks=False, device=transport.device
        )
        self.speed = Speed(transport.link(like))
        self.room = 0
        """Bytes that were asked for on this card so far."""
        self._slots: dict[tuple[object, ...], Slot] = {}

    def compute(self, asked: Asked, call: AttentionCall, target: torch.Tensor) -> Times:
        """Compute a part of a call on this card.

        Args:
            call: the part, as views of the home device's tensors.
            target: of the output on the home device, (batch, heads of the part, q_len, v_head_dim).

        Raises:
            NoBackendError: no backend of this card may run it.
            Exception: the device is out of memory, or faulty.
        """
        transport = self.transport
        start = transport.now()
        there = self._sent(call)
        arrived = transport.now()
        choice = asked.choice  # its options may change with the step
        key = (asked.kind, choice.asked, choice.accuracy, frozen(choice.extra))
        slot = self._slots.get(key)
        cold = slot is None
        if slot is None:
            if len(self._slots) >= MOST_PLANS:
                self._slots.clear()
            slot = self._slots[key] = self.session.plan(asked.kind, choice=choice)
        plan = slot.plan
        output = self.session.attention(slot, there)
        transport.settle()
        computed = transport.now()
        transport.bring(output, target)
        return Times(arrived - start, computed - arrived, transport.now() - computed, cold or slot.plan is not plan)

    def _sent(self, call: AttentionCall) -> AttentionCall:
        """The call with its tensors on this card. What a mask only repeats is not sent."""
        mask, tensors = call.attn_mask, [call.query, call.key, call.value]
        if mask is not None:
            tensors.append(unrepeated(mask))
        query, key, value, *masks = self.transport.send(tensors)
        if mask is not None:
            mask = masks[0].expand(mask.shape)
        return call.changed(query=query, key=key, value=value, attn_mask=mask)


def unrepeated(mask: torch.Tensor) -> torch.Tensor:
    """The mask with dimensions of stride 0 cut to 1."""
    for dim, stride in enumerate(mask.stride()):
        if stride == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask
