"""What is chosen for one model: a configuration that is applied, or that of a `with` block, with its runs.

`with` blocks belong to the context of a thread (`contextvars`), so other threads do not see them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ...backends.api.context import add_up
from ...backends.config import AttentionConfig
from ...backends.report import RunReport
from .runs import Run

if TYPE_CHECKING:
    from .routing import Routing

_blocks: ContextVar[tuple[weakref.ref[Chosen], ...]] = ContextVar("attention_backends_diffusers", default=())
"""Weak: contexts are copied and kept (asyncio tasks, suspended generators), and a block, once left, keeps no model."""


class Chosen:
    """One configuration for one model: applied, or of a `with` block."""

    def __init__(self, routing: Routing, layers: tuple[AttentionConfig, ...], scheduler_of: Callable[[], Any]) -> None:
        """`scheduler_of` returns the scheduler whose steps count now: a pipeline's can be replaced."""
        self.routing = routing
        self.layers = tuple(dict.fromkeys(layers))
        self.scheduler_of = scheduler_of
        self.is_open = True
        self._runs: dict[int, Run] = {}
        self._lock = threading.Lock()

    def run(self, layers: tuple[AttentionConfig, ...], scheduler: Any) -> Run:
        """This thread's run; a new one after the scheduler's `set_timesteps`."""
        thread = threading.get_ident()
        run = self._runs.get(thread)
        if run is None or run.layers != layers or not run.is_of(scheduler):
            if run is not None:
                run.close()
            with self._lock:
                run = self._runs[thread] = Run(self.routing, layers, scheduler)
                run.run_report.bypass = self.routing.not_reached()
        return run

    def report(self) -> RunReport:
        """The run report of the latest run; of several threads, their calls added up."""
        with self._lock:
            runs = list(self._runs.values())
        for run in runs:
            run.settle()
        if not runs:
            empty = RunReport(layers=self.layers)
            empty.bypass = "; ".join(filter(None, (self.routing.lost_entry(), self.routing.not_reached())))
            return empty
        reports = [run.run_report for run in runs]
        reports[0].bypass = self.routing.not_reached()
        if len(reports) == 1:
            return reports[0]
        total = RunReport(layers=self.layers)
        total.model, total.bypass, total.steps = reports[0].model, reports[0].bypass, reports[0].steps
        for report in reports:
            add_up(total, report)
            total.categories.update(report.categories)
            total.notes.update(report.notes)
            total.timeline.model_calls += report.timeline.model_calls
        return total

    def unmatched(self) -> list[str]:
        """What of the configuration had no effect in the latest run, as far as that is known yet."""
        return [text for run in list(self._runs.values()) if not run.is_over for text in run.unmatched()]

    def close(self) -> None:
        """End the runs."""
        self.is_open = False
        for run in list(self._runs.values()):
            run.close()


def open_blocks(routing: Routing) -> tuple[Chosen, ...]:
    """The open `with` blocks of this thread's context for one model, innermost first."""
    return tuple(block for block in reversed(_open()) if block.routing is routing) if _blocks.get() else ()


def _open() -> list[Chosen]:
    """The open blocks of this thread's context, outermost first."""
    blocks = [reference() for reference in _blocks.get()]
    return [block for block in blocks if block is not None and block.is_open]


def open_block(chosen: Chosen) -> None:
    """Begin a `with` block of this thread's context."""
    _blocks.set(tuple(weakref.ref(block) for block in (*_open(), chosen)))


def close_block(chosen: Chosen) -> None:
    """End it, wherever it is in the stack; a thread that copied the context sees it closed."""
    chosen.close()
    _blocks.set(tuple(weakref.ref(block) for block in _open()))
