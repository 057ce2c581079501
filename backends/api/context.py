"""The configuration at a call: the `with` blocks of `backends.api` around it, in a ContextVar.

Leaving a block removes it wherever it is in the stack, so that blocks of generators and tasks may end in any order, and
closes it in tasks and threads that copied the context. A thread without a copied context has no blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any

from ..config import AttentionConfig
from ..config.text import from_environment
from ..engine.call_checks import checks_from_environment
from ..report import Row, RunReport
from ..values.grid import Kept

if TYPE_CHECKING:
    from ..parallel.group_session import GroupSession
    from .session import CallSession

KEPT = 4096
"""Most kinds of call, and sets of configurations, in a thread's caches, which are cleared then."""

_numbers = count()


@lru_cache(maxsize=KEPT)
def _number(layers: tuple[AttentionConfig, ...], forced: bool, checks: bool) -> int:
    """A number for each set of configurations: a cheap key."""
    return next(_numbers)


class ThreadSessions:
    """The sessions of one thread, with their run report."""

    __slots__ = ("in_groups", "run_report", "sessions")

    def __init__(self, run_report: RunReport) -> None:
        self.run_report = run_report
        self.sessions: dict[tuple[Any, ...], CallSession] = {}
        self.in_groups: dict[tuple[Any, ...], GroupSession] = {}
        """Sessions of calls with `group`."""


thread_local = threading.local()
"""`own`: this thread's sessions outside of blocks with a run report; sessions are not shared between threads."""


def new_thread() -> ThreadSessions:
    """Sessions for a thread that has none."""
    own: ThreadSessions
    own = thread_local.own = ThreadSessions(RunReport(mode="off"))  # not read
    return own


class Block:
    """One `with` block: what it sets, else None; and the environment's configurations when it was entered."""

    __slots__ = ("checks", "config", "environment", "forced", "is_open", "threads")

    def __init__(
        self,
        config: AttentionConfig | None = None,
        *,
        forced: bool = False,
        checks: bool | None = None,
        reports: bool = False,
    ) -> None:
        """`reports`: the block has a run report, and separate sessions for each thread."""
        self.config = config
        self.forced = forced
        self.checks = checks
        self.threads = {threading.get_ident(): ThreadSessions(RunReport())} if reports else {}
        self.environment = from_environment(), checks_from_environment()
        self.is_open = True

    @property
    def run_report(self) -> RunReport:
        """Of the thread that entered the block; after `collect` of all threads."""
        return next(iter(self.threads.values())).run_report

    def of_thread(self) -> ThreadSessions:
        """This thread's sessions in a block with a run report."""
        thread = threading.get_ident()
        sessions = self.threads.get(thread)
        if sessions is None:
            sessions = self.threads[thread] = ThreadSessions(RunReport())
        return sessions

    def collect(self) -> None:
        """Add the reports of other threads, with the times that are ready."""
        total = self.run_report
        for sessions in list(self.threads.values()):
            sessions.run_report.collect()
            if sessions.run_report is not total:
                add_up(total, sessions.run_report)


def add_up(total: RunReport, more: RunReport) -> None:
    """Add the calls of one run report to another."""
    for key, row in more.rows.items():
        mine = total.rows.get(key)
        if mine is None:
            mine = total.rows[key] = Row(row.role, row.block, row.backend, row.source, row.mask, row.reason, row.asked)
            mine.member, mine.expected = row.member, row.expected
        mine.calls += row.calls
        mine.launches += row.launches
        mine.timed += row.timed
        mine.nanoseconds += row.nanoseconds
        if row.kept is not None:
            mine.kept = mine.kept or Kept()
            mine.kept.add_up(row.kept)
    for name, report in more.cards.items():
        add_up(total.cards.setdefault(name, RunReport(mode="off")), report)
    if more.rows:
        total.device = more.device


class Context:
    """The open blocks around a call, outermost first, resolved to layers."""

    __slots__ = ("blocks", "checks", "forced", "layers", "number", "reporting")

    def __init__(
        self, blocks: tuple[Block, ...], environment: tuple[tuple[AttentionConfig, ...], bool] | None = None
    ) -> None:
        """`environment`: default: of the innermost block."""
        inner = blocks[::-1]
        layers, checks = environment or inner[0].environment
        self.blocks = blocks
        self.reporting = next((block for block in inner if block.threads), None)
        """The innermost block with a run report."""
        force = next((block.config for block in inner if block.forced), None)
        self.forced = force is not None
        configs = (block.config for block in inner if block.config is not None)
        self.layers: tuple[AttentionConfig, ...] = (*configs, *layers) if force is None else (force,)
        self.checks = next((block.checks for block in inner if block.checks is not None), checks)
        self.number = _number(self.layers, self.forced, self.checks)


_context: ContextVar[Context | None] = ContextVar("attention_backends", default=None)
_outside: list[Context] = []
"""The context outside of blocks: the environment at the first call, as in Diffusers."""


def current() -> Context:
    """The context of the caller; evaluated at every call."""
    context = _context.get()
    if context is None:
        return _outside[0] if _outside else read_environment()
    for block in context.blocks:
        if not block.is_open:
            return _without_closed(context)
    return context


def sessions_of_thread(context: Context) -> ThreadSessions:
    """This thread's sessions in a context."""
    if context.reporting is not None:
        return context.reporting.of_thread()
    return getattr(thread_local, "own", None) or new_thread()


def _without_closed(context: Context) -> Context:
    blocks = tuple(block for block in context.blocks if block.is_open)
    _context.set(Context(blocks) if blocks else None)
    return current()


def read_environment() -> Context:
    """Read the environment variables again for calls outside of blocks; a block reads them when it is entered."""
    _outside[:] = [Context((), (from_environment(), checks_from_environment()))]
    return _outside[0]


@contextmanager
def entered(block: Block) -> Iterator[None]:
    """Apply `block` inside the `with`."""
    before = current()
    _context.set(Context((*before.blocks, block)))
    try:
        yield
    finally:
        block.is_open = False
        # Remove only this block: later blocks that are still open stay.
        if current().blocks == before.blocks and before.blocks:
            _context.set(before)
