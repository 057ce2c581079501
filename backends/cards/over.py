"""Gives a session its divider, where its configuration names several devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..config.card_names import ALL
from ..config.layers import cards_of
from ..values.reasons import Reason
from .heads import HeadsOverCards, MakeRoom

if TYPE_CHECKING:
    import torch

    from ..engine.router import Router
    from ..engine.session import Session
    from .card import Card


KINDS = ("cuda",)
"""Types of torch devices that are divided over; AMD's cards are `cuda` too."""


def divide(
    session: Session,
    device: torch.device,
    router_for: Callable[[torch.device], Router],
    make_room: MakeRoom | None = None,
) -> HeadsOverCards | None:
    """Set `session.divider`; None where the configuration names no devices, or, with a note, where they cannot be used.

    Args:
        device: of the session's calls; it takes part whether it is named or not.
        router_for: gives the router of a device.
        make_room: asks the host for free memory on a device.
    """
    names = cards_of(session.layers)
    if not names:
        return None

    def cards(like: torch.Tensor) -> list[Card]:
        return _cards(session, names, router_for, like)

    over = HeadsOverCards(session, cards, make_room=make_room)
    if device.type not in KINDS:
        over.turn_off(Reason("cards.device", device=device.type))
        return None
    if _is_in_a_group():
        over.turn_off(Reason("cards.group"))
        return None
    session.divider = over
    return over


def _cards(
    session: Session, names: tuple[str, ...], router_for: Callable[[torch.device], Router], like: torch.Tensor
) -> list[Card]:
    """The other devices by their names; those that are not there are noted."""
    import torch

    from .card import Card
    from .cuda_transport import transports

    there = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    for name in names if names != (ALL,) else ():
        if name not in there:
            session.run_report.note(Reason("cards.unknown", card=name))
    devices = [torch.device(name) for name in there if names == (ALL,) or name in names]
    return [Card(transport, router_for, session.layers, like) for transport in transports(like.device, devices)]


def _is_in_a_group() -> bool:
    """Whether this process shares its cards with others, one of which may run on each."""
    import torch

    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1
