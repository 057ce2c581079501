"""What registers with a session: choosers decide before a plan is made, observers see plans and wrap their kernels.

The session knows these two types alone; the guard, autotune, replay and the recorder derive from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..kernels.backend import Backend, Kernel

if TYPE_CHECKING:
    from ..config.layers import Choice
    from ..report import Row
    from ..values.platform import Platform
    from .plan import CallKind, Plan, Slot
    from .router import Decision, Router


class Veto(NamedTuple):
    """Only exact kernels may run somewhere, since a backend was caught there."""

    reason: str
    backend: str | None = None
    """The one that was caught; None where all are meant."""


class KernelVetoed(Exception):  # the session answers it, it is not an error of the program
    """An observer's wrapper refuses a kernel's result: an exact backend runs instead. The inputs are as they were."""


class Chooser:
    """Asked before a plan is made; the first one registered is asked first."""

    def choice(self, kind: CallKind, choice: Choice, *, planned: bool) -> Choice:
        """What is asked for, before a backend is selected; the given choice where there is nothing to change.

        `planned`: a plan follows; else a host asks what would be.
        """
        return choice

    def plan(self, slot: Slot, kind: CallKind, decision: Decision) -> Plan | None:
        """The plan of `kind`, of which `decision` is the router's answer; None to leave it at that."""
        return None


class Observer:
    """Told of plans, and may wrap their kernels."""

    def wrapper(
        self, kind: CallKind, backend: Backend, row: Row, platform: Platform
    ) -> Callable[[Kernel], Kernel] | None:
        """What wraps the kernel of a new plan; None for nothing. Its time is not counted as the kernel's."""
        return None

    def veto(self, kind: CallKind, accuracy: str) -> Veto | None:
        """Why a backend of this accuracy may not run there; None where it may."""
        return None

    def planned(self, slot: Slot, router: Router) -> None:
        """A slot has its first plan."""

    def changed(self, slot: Slot, router: Router) -> None:
        """A slot has another plan from this call on."""

    def failed(self, plan: Plan, error: Exception) -> None:
        """A kernel raised an error."""
