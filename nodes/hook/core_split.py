"""The runs of the cards over which ComfyUI's MultiGPU CFG Split divides the prompts of a step.

That node gives each card a copy of the model and a thread. So each card but the first has a separate `Run`, with its
run report, sessions, guard, recorder and patched forwards: two threads share none. What the sampler's thread knows is
set in all of them before the threads begin. A card is known by ComfyUI's own entry in the options and not by the
tensors: in tests `cpu` and `cpu:0` are two devices for ComfyUI, and a tensor of either is on `cpu`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ...backends.observe.replay.run_recorder import RunRecorder

if TYPE_CHECKING:
    import torch

    from .run import Run

OF_CORE = "multigpu_thread_device"
"""The entry of the options of such a model call: its device."""
CLONES = "multigpu_clones"
"""The entry of a sampler's model options: device -> patcher of the copy there, the first card's first."""


class CardRuns:
    """The run of each card, of which the first is the sampler's own run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.others: dict[torch.device, Run] = {}
        """Runs of the cards but the first; what the sampler's thread sets in its own run, it sets in these too."""
        self._home: torch.device | None = None
        self._lock = threading.Lock()

    def all(self) -> list[Run]:
        """The sampler's own run, then those of the other cards."""
        return [self._run, *self.others.values()]

    def of(self, device: torch.device) -> Run:
        """The run of a card; the first one that is asked for is the first card."""
        if device == self._home:
            return self._run
        found = self.others.get(device)
        return found if found is not None else self._begin(device)

    def _begin(self, device: torch.device) -> Run:
        run, report = self._run, self._run.run_report
        with self._lock:
            if self._home is None:
                self._home = device
            if device == self._home:
                return run
            if device not in self.others:
                report.card = str(self._home)
                for row in list(report.rows.values()):
                    row.card = report.card
                other = type(run)(run.override)
                other.run_report.card, other.run_report.mode = str(device), report.mode
                other.run_report.node_id, other.run_report.size = report.node_id, report.size
                if report.recorder is not None:
                    other.run_report.recorder = RunRecorder()
                for name in SHARED:
                    setattr(other, name, getattr(run, name))
                other.others.at_start = run.others.at_start
                report.split[other.run_report.card] = other.run_report
                self.others[device] = other
            return self.others[device]

    def begin_evaluation(self, clones: dict[torch.device, Any], options: dict[str, Any], conds: Iterable[Any]) -> None:
        """Before the threads make the model calls of an evaluation: make the runs and patch the copies of the model."""
        for device, patcher in clones.items():
            run = self.of(device)
            if run is not self._run and hasattr(patcher.model, "diffusion_model"):
                run.patch_modules(patcher.model, options, conds)


SHARED = ("is_sampled", "is_evaluated", "around_model_calls", "function_wrapper", "step", "sigmas", "over")
"""Attributes of the sampler's own run that those of other cards begin with."""
