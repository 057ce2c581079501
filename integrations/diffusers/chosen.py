"""What is chosen for one model: a configuration that is applied, or that of a `with` block, with its runs.

`with` blocks belong to the context of a thread (`contextvars`), so other threads do not see them.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ...backends.config import AttentionConfig
from ...backends.context import add_up
from ...backends.report import RunReport
from .runs import Run

if TYPE_CHECKING:
    from .routing import Routing

_blocks: ContextVar[tuple[Chosen, ...]] = ContextVar("attention_backends_diffusers", default=())


class Chosen:
    """One configuration for one model: applied, or of a `with` block."""

    def __init__(self, routing: Routing, layers: tuple[AttentionConfig, ...], scheduler: Any) -> None:
        self.routing = routing
        self.layers = tuple(dict.fromkeys(layers))
        self.scheduler = scheduler
        self.is_open = True
        self._runs: dict[int, Run] = {}
        self._lock = threading.Lock()

    def run(self, layers: tuple[AttentionConfig, ...]) -> Run:
        """This thread's run; a new one after the scheduler's `set_timesteps`."""
        thread = threading.get_ident()
        run = self._runs.get(thread)
        if run is None or run.layers != layers or not run.is_of(self.scheduler):
            if run is not None:
                run.close()
            with self._lock:
                run = self._runs[thread] = Run(self.routing, layers, self.scheduler)
                run.run_report.bypass = self.routing.not_reached()
        return run

    def report(self) -> RunReport:
        """The run report of the latest run; of several threads, their calls added up."""
        with self._lock:
            runs = list(self._runs.values())
        for run in runs:
            run.settle()
        if not runs:
            return RunReport(layers=self.layers)
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

    def close(self) -> None:
        """End the runs."""
        self.is_open = False
        for run in list(self._runs.values()):
            run.close()


def open_blocks(routing: Routing) -> tuple[Chosen, ...]:
    """The open `with` blocks of this thread's context for one model, innermost first."""
    blocks = _blocks.get()
    return tuple(block for block in reversed(blocks) if block.routing is routing and block.is_open) if blocks else ()


def open_block(chosen: Chosen) -> None:
    """Begin a `with` block of this thread's context."""
    _blocks.set((*_blocks.get(), chosen))


def close_block(chosen: Chosen) -> None:
    """End it, wherever it is in the stack; a thread that copied the context sees it closed."""
    chosen.close()
    _blocks.set(tuple(block for block in _blocks.get() if block is not chosen and block.is_open))
