"""When the guard checks a call: roles and blocks take turns over the steps of a run, so that each step has checks.

Every role and block has a number, in the order in which a model calls them. In each step those are checked whose turn
it is, and after `period` steps it is their turn again. Where nobody says which step it is (the Python API), the checks
of a kind of call become rare by its own count of calls, up to a limit.

Boundary: numbers; no torch, and nothing of a session.
"""

from __future__ import annotations

from typing import NamedTuple

FEW_STEPS = 8
"""A run of so many steps, or fewer, checks each role and block once."""
LONGEST_PERIOD = 17
"""Steps from one check of a role and block to the next, at most."""
FIRST_GAP, LONGEST_GAP = 8, 128
"""Without steps: calls from the first check of a kind of call to its second, to which its number adds up to 7; the gap
then doubles, up to the second number."""
NEVER = 1 << 62


class Step(NamedTuple):
    """Where in a run a model call is."""

    step: int | None
    """The sampler's step, from 0; None where the host does not know it: then changes of the step are counted."""
    steps: int | None = None
    """How many steps the run has; None where nobody knows."""
    unchanged: int | None = None
    """For how many steps, from this one on, the same windows of a schedule hold; None is to the end."""


def period(steps: int | None) -> int:
    """Steps from one check of a role and block to the next, in a run of so many steps.

    All steps of a run of up to 8; 8 up to 16 steps; half the run up to 34 steps; 17 in longer ones. So a run of up to
    50 steps has no more checks than one whose blocks are checked at their first call and then ever more rarely.
    """
    if steps is None:
        return FEW_STEPS
    if steps <= FEW_STEPS:
        return max(steps, 1)
    return min(max(FEW_STEPS, -(-steps // 2)), LONGEST_PERIOD)


class Turns:
    """Whose turn it is, for the watched kernels of one session."""

    def __init__(self) -> None:
        self.step = -1
        """The present step, counted on where another sampler of the run begins anew; -1 where nobody has said one."""
        self.is_last = False
        self._index = -1
        self._count: int | None = None
        self._since = self._until = 0
        self._numbers: dict[tuple[str, str], int] = {}

    def begin(self, at: Step, *, is_new: bool) -> None:
        """A model call begins; `is_new`: its step is another one than that of the model call before."""
        if at.step is None:
            self.step += is_new or self.step < 0
            index = self.step
        else:
            index = at.step
            self.step += 1 if index < self._index else index - self._index
            self._index = index
        self._count = at.steps
        self.is_last = at.steps is not None and index >= at.steps - 1
        if self.step >= self._until or index == 0:
            self._since = self.step
            rest = NEVER if at.steps is None else max(at.steps - index, 1)
            self._until = self.step + min(rest, rest if at.unchanged is None else at.unchanged)

    def number(self, role: str, block: str) -> int:
        """The number of a role and block."""
        return self._numbers.setdefault((role, block), len(self._numbers))

    @property
    def period(self) -> int:
        """Steps from one check of a role and block to the next: fewer where there are few, as each step has a check."""
        return max(min(period(self._count), len(self._numbers)), 1)

    def first(self, number: int) -> int:
        """The step in which a kind of call that is new now is checked for the first time."""
        now = max(self.step, 0)
        if self.step < 0 or self._count is None or now != self._since:
            return now  # who comes in the middle of a window may be gone before its turn
        due = following(number, now, period(self._count))
        return due if due < self._until else now + slot(number, self._until - now)


def slot(number: int, length: int) -> int:
    """The step, of `length` ones, that is a number's turn.

    Rows of `length` numbers are moved against each other, so that two or three roles in turn each come in every step.
    """
    return (number + number // length * ((length - 1) % 6)) % length


def following(number: int, step: int, length: int) -> int:
    """The first step from `step` on that is a number's turn."""
    return step + (slot(number, length) - step) % length
