"""When the guard checks a call: roles and blocks take turns over the steps of a run, so that each step has checks.

Each role and block has a number, in the order of the model's calls. A step checks those whose turn it is; the turn
repeats after `period` steps. Without a known step (the Python API), the gap between checks of a kind of call grows with
its number of calls, up to a limit.

Boundary: numbers; no torch, and nothing of a session.
"""

from __future__ import annotations

from typing import NamedTuple

FEW_STEPS = 8
"""A run of so many steps, or fewer, checks each role and block once."""
LONGEST_PERIOD = 17
"""Steps from one check of a role and block to the next, at most."""
FIRST_GAP, LONGEST_GAP = 8, 128
"""Without steps: second check after `FIRST_GAP` + (number % 8) calls; the gap then doubles, up to `LONGEST_GAP`."""
NEVER = 1 << 62


class Step(NamedTuple):
    """Where in a run a model call is."""

    step: int | None
    """The sampler's step, from 0; None where the host does not know it: then changes of the step are counted."""
    steps: int | None = None
    """Number of steps of the run; None if unknown."""
    unchanged: int | None = None
    """Steps from this one on with the same active schedule windows; None: to the end."""


def period(steps: int | None) -> int:
    """Steps between checks of a role and block, in a run of `steps` steps.

    All steps of a run of up to 8; 8 up to 16 steps; half the run up to 34 steps; 17 in longer ones. So a run of up to
    50 steps has no more checks than one whose blocks are checked at their first call and then ever more rarely.
    """
    if steps is None:
        return FEW_STEPS
    if steps <= FEW_STEPS:
        return max(steps, 1)
    return min(max(FEW_STEPS, -(-steps // 2)), LONGEST_PERIOD)


class Turns:
    """The order of checks over the steps of a run, for the guarded kernels of one session."""

    def __init__(self) -> None:
        self.step = -1
        """The current step, counted on over several samplers of the run; -1 if unknown."""
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
        """The index of a role and block, in order of appearance."""
        return self._numbers.setdefault((role, block), len(self._numbers))

    @property
    def period(self) -> int:
        """Steps between checks of a role and block; at most the number of them, so that each step has a check."""
        return max(min(period(self._count), len(self._numbers)), 1)

    def first(self, number: int) -> int:
        """The step of the first check of a kind of call that is new now."""
        now = max(self.step, 0)
        if self.step < 0 or self._count is None or now != self._since:
            return now  # calls that begin within a window may end before their turn
        due = following(number, now, period(self._count))
        return due if due < self._until else now + slot(number, self._until - now)


def slot(number: int, length: int) -> int:
    """The step, modulo `length`, in which index `number` is checked.

    Each further group of `length` indices is shifted, so that with two or three roles each step checks every role.
    """
    return (number + number // length * ((length - 1) % 6)) % length


def following(number: int, step: int, length: int) -> int:
    """The first step from `step` on in which index `number` is checked."""
    return step + (slot(number, length) - step) % length
