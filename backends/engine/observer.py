"""Base classes for extensions of a session: a `Chooser` decides before a plan is made, an `Observer` wraps its kernel,
a `Divider` computes parts of its calls elsewhere.

The session imports only these; the guard, autotune, replay and the recorder derive from them and register.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..kernels.backend import Backend, Kernel

if TYPE_CHECKING:
    from ..config.layers import Choice
    from ..report import Row
    from ..values.platform import Platform
    from ..values.reasons import Reason
    from .plan import CallKind, Plan, Slot
    from .router import Decision, Router


class Veto(NamedTuple):
    """Only exact kernels may run in a role and block."""

    reason: str
    backend: str | None = None
    """The backend that is refused; None: every inexact one."""


class KernelVetoed(Exception):  # no Error in the name: the session handles it
    """Raised by an observer's wrapper to reject a result; the inputs are unchanged, an exact backend runs instead."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Chooser:
    """Decides before a plan is made. Choosers are called in the order of registration."""

    def choice(self, kind: CallKind, choice: Choice, *, planned: bool) -> Choice:
        """The choice to select a backend for; returns `choice` to leave it unchanged.

        `planned`: False where no plan of `kind` follows: the plans may be those of its sub-calls.
        """
        return choice

    def plan(self, slot: Slot, kind: CallKind, decision: Decision) -> Plan | None:
        """The plan for `kind`; None: the session plans the router's `decision`."""
        return None


class Observer:
    """Notified of plans and of failures; may wrap kernels and veto backends."""

    def wrapper(
        self, kind: CallKind, backend: Backend, row: Row, platform: Platform
    ) -> Callable[[Kernel], Kernel] | None:
        """A decorator for the kernel of a new plan, or None. Its time is not counted as the kernel's."""
        return None

    def veto(self, kind: CallKind, accuracy: str) -> Veto | None:
        """Why a backend of this accuracy may not run calls of `kind`; None: it may."""
        return None

    def planned(self, slot: Slot, router: Router) -> None:
        """Called when a slot gets its first plan."""

    def changed(self, slot: Slot, router: Router) -> None:
        """Called when a slot gets another plan, which runs from the current call on."""

    def failed(self, plan: Plan, error: Exception) -> None:
        """Called when a kernel raised `error`, before the fallback."""


class Divider:
    """Computes parts of calls on other devices; a session has one at most."""

    def divided(self, kind: CallKind, decision: Decision, backend: Backend, kernel: Kernel) -> Kernel:
        """The kernel of a new plan, below the wrappers of observers; `kernel` where its calls are never divided."""
        raise NotImplementedError

    def keep_home(self, kind: CallKind, backend: str, reason: Reason) -> None:
        """Note why calls of a kind are not divided."""
        raise NotImplementedError

    def turn_off(self, reason: Reason) -> None:
        """Divide no call any more; the first reason is noted."""
        raise NotImplementedError
