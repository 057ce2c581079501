"""What registers with a session: the guard, autotune, replay and the recorder; advisories for a model beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ..engine.session import Session

S = TypeVar("S", bound="Session")


def observe(session: S) -> S:
    """Register what every session has: the replay of its record, its guard, and the recorder of its run report."""
    from ..config.layers import record_of
    from ..engine.observer import Observer
    from .guard import Guard

    if record_of(session.layers) is not None:
        from .replay.replay import Replay

        session.register(Replay(session.run_report))
    if session.settings.guard != "off":
        session.register(Guard(session.settings.guard, session.run_report))
    if isinstance(session.run_report.recorder, Observer):
        session.register(session.run_report.recorder)
    return session
