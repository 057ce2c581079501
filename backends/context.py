"""What is in force where a call is made: the `with` blocks of `api.py` around it, in a ContextVar.

Each block is an `Entry`; a `Stack` is the entries around one place in the program. Leaving a block takes its own entry
away wherever it stands, so that blocks of generators and tasks may end in any order, and marks it closed, so that it
also ends in the tasks and threads that it was handed down to. Nothing of torch is touched, and a thread that was not
handed a context sees nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING

from .config import AttentionConfig
from .config.layers import resolve
from .config.text import from_environment
from .engine.call_checks import checks_from_environment
from .engine.mask_reader import inspect
from .engine.plan import Plan
from .engine.session import Session
from .engine.sub_calls import SplitPlan, calls_of, plan_sub_calls, run_sub_calls
from .report import Row, RunReport
from .values.mask_plan import MaskPlan, passed_on
from .values.request import AttentionCall, AttentionRequest

if TYPE_CHECKING:
    import torch

    from .engine.router import Router

KEPT = 4096
"""Kinds of call, and configurations, that a thread remembers before it starts again."""


class Asked:
    """One set of configurations, highest first. There is one object for each, so that it is a key by identity."""

    __slots__ = ("checks", "forced", "layers")

    def __init__(self, layers: tuple[AttentionConfig, ...], forced: bool, checks: bool) -> None:
        self.layers = layers
        self.forced = forced
        self.checks = checks


_asked = lru_cache(maxsize=KEPT)(Asked)


class Environment:
    """What environment variables ask for, at the time when this was made."""

    __slots__ = ("checks", "layers")

    def __init__(self) -> None:
        self.layers = from_environment()
        self.checks = checks_from_environment()


class CallSession(Session):
    """A session with the plans of its calls, keyed by everything that can change a decision."""

    def __init__(
        self, router: Router, asked: Asked, layers: tuple[AttentionConfig, ...], run_report: RunReport
    ) -> None:
        super().__init__(router, layers, run_report, checks=False)  # the caller checks before it plans
        self.check_calls = asked.checks
        self.plans: dict[tuple[object, ...], tuple[Plan | None, bool]] = {}
        """For each kind of call how it runs, None where that is for its mask's values to say, and whether it is
        grouped."""
        self.masked: dict[tuple[object, ...], Plan | SplitPlan] = {}

    def keep(
        self, key: tuple[object, ...], request: AttentionRequest, role: str, category: str, device: str
    ) -> tuple[Plan | None, bool]:
        """Plan a kind of call and remember it."""
        if len(self.plans) >= KEPT:
            self.plans.clear()
        plan = None if self.reads(request, role, category, device) else self.plan(request, role, category)
        found = self.plans[key] = plan, request.grouped
        return found

    def reads(self, request: AttentionRequest, role: str, category: str, device: str) -> bool:
        """Whether the values of a mask are read before the call runs.

        On the CPU always: it costs little, and fewer keys are less work. On an accelerator reading waits for all work
        that was queued, so only where a backend was named that refuses the mask and would take the call without it.
        """
        if request.lse:  # a part's log-sum-exp is that of its own keys
            return False
        if request.mask == "none" or device == "cpu":
            return request.mask != "none"
        asked = resolve(self.layers, role, category).asked
        if asked is None or not self.router.refuse(asked, request):
            return False
        return not self.router.refuse(asked, request._replace(mask="none"))

    def run_read(self, key: tuple[object, ...], call: AttentionCall, role: str, category: str) -> torch.Tensor:
        """Read the mask of a call, once, and run what it says: fewer keys, or the call as it is."""
        mask_plan = inspect(call.attn_mask, call.key.shape[2]) if call.attn_mask is not None else passed_on(None)
        key = (*key, mask_plan.facts)
        how = self.masked.get(key)
        if how is None:
            if len(self.masked) >= KEPT:
                self.masked.clear()
            how = self.masked[key] = self._as_read(mask_plan, call, role, category)
        return run_sub_calls(self, how, mask_plan, call) if isinstance(how, SplitPlan) else self.run(how, call)

    def _as_read(self, mask_plan: MaskPlan, call: AttentionCall, role: str, category: str) -> Plan | SplitPlan:
        calls = calls_of(self, mask_plan, call, resolve(self.layers, role, category).asked)
        if not calls:
            return self.plan(call.request(), role, category)
        return plan_sub_calls(
            self, mask_plan, call, calls, lambda part, words: self.plan(part.request(), role, category, mask=words)
        )


class Book:
    """The sessions of one thread, and the account of their calls."""

    __slots__ = ("run_report", "sessions")

    def __init__(self, run_report: RunReport) -> None:
        self.run_report = run_report
        self.sessions: dict[tuple[Asked, torch.device, object], CallSession] = {}


class Account:
    """An account that is being kept: a book for each thread that calls inside the block."""

    def __init__(self) -> None:
        self.books = {threading.get_ident(): Book(RunReport())}
        self.run_report = next(iter(self.books.values())).run_report

    def book(self) -> Book:
        """This thread's book."""
        thread = threading.get_ident()
        found = self.books.get(thread)
        if found is None:
            found = self.books[thread] = Book(RunReport())
        return found

    def close(self) -> None:
        """Put what other threads did into the trace, with the times that are there by now."""
        for book in list(self.books.values()):
            book.run_report.collect()
            if book.run_report is not self.run_report:
                add_up(self.run_report, book.run_report)


def add_up(total: RunReport, more: RunReport) -> None:
    """Add the calls of one trace to another."""
    for key, row in more.rows.items():
        mine = total.rows.get(key)
        if mine is None:
            mine = total.rows[key] = Row(row.role, row.block, row.backend, row.source, row.mask, row.reason, row.asked)
            mine.member = row.member
        mine.calls += row.calls
        mine.launches += row.launches
        mine.timed += row.timed
        mine.nanoseconds += row.nanoseconds
    if more.rows:
        total.device = more.device


class Entry:
    """One `with` block: what it sets (the rest stays None), and what the environment said when it was entered."""

    __slots__ = ("account", "checks", "config", "environment", "forced", "open")

    def __init__(
        self,
        config: AttentionConfig | None = None,
        *,
        forced: bool = False,
        checks: bool | None = None,
        account: Account | None = None,
    ) -> None:
        self.config = config
        self.forced = forced
        self.checks = checks
        self.account = account
        self.environment = Environment()
        self.open = True


class Stack:
    """The open blocks around a place, outermost first, and what they come to."""

    __slots__ = ("account", "asked", "entries")

    def __init__(self, entries: tuple[Entry, ...], environment: Environment) -> None:
        self.entries = entries
        self.account = next((entry.account for entry in reversed(entries) if entry.account is not None), None)
        inner = list(reversed(entries))
        checks = next((entry.checks for entry in inner if entry.checks is not None), environment.checks)
        force = next((entry.config for entry in inner if entry.forced), None)
        if force is not None:
            layers: tuple[AttentionConfig, ...] = (force,)
        else:
            configs = (entry.config for entry in inner if entry.config is not None)
            layers = (*configs, *environment.layers)
        self.asked = _asked(layers, force is not None, checks)


_stack: ContextVar[Stack | None] = ContextVar("attention_backends", default=None)
_outside: list[Stack] = []
"""What holds outside every block: the environment as it was at the first call, as in Diffusers."""


def current() -> Stack:
    """The blocks that are open here. This is on the path of every call."""
    stack = _stack.get()
    if stack is None:
        return _outside[0] if _outside else read_environment()
    for entry in stack.entries:
        if not entry.open:
            return _prune(stack)
    return stack


def _prune(stack: Stack) -> Stack:
    entries = tuple(entry for entry in stack.entries if entry.open)
    _stack.set(Stack(entries, entries[-1].environment) if entries else None)
    return current()


def read_environment() -> Stack:
    """Read the environment variables again for calls outside every block; a block reads them when it is entered."""
    _outside[:] = [Stack((), Environment())]
    return _outside[0]


@contextmanager
def entered(entry: Entry) -> Iterator[None]:
    """Have `entry` in force inside the `with`."""
    before = current()
    _stack.set(Stack((*before.entries, entry), entry.environment))
    try:
        yield
    finally:
        entry.open = False
        # Only this entry is taken away: blocks that were opened since, and are still open, stay.
        if current().entries == before.entries and before.entries:
            _stack.set(before)
