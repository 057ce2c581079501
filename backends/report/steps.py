"""The sampler's step of each model call: from the host, else from its sigma, without synchronisation.

A sigma is copied asynchronously and read once the copy has finished; where that cannot be queried, at the end of the
run. `schedule.step_of` maps a sigma to a step.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

from ..config.schedule import step_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger("attention_backends")

MOST_WAITING = 4096
"""Most pending sigmas on a device; steps of further model calls stay unknown."""


class _Schedule:
    """The sigmas of one sampler, and their steps."""

    __slots__ = ("given", "steps", "values")

    def __init__(self, given: torch.Tensor) -> None:
        self.given = given
        self.values = on_host(given)
        self.steps: dict[float, int] = {}

    def step(self, sigma: float) -> int | None:
        """The step at a sigma; None while the schedule is on the device."""
        if not isinstance(self.values, list):
            return None
        if sigma not in self.steps:
            self.steps[sigma] = max(min(step_of(sigma, self.values), len(self.values) - 2), 0)
        return self.steps[sigma]


def on_host(values: torch.Tensor) -> list[float] | torch.Tensor:
    """The numbers of a CPU tensor; else an asynchronous copy, or the tensor."""
    if values.device.type == "cpu":
        return [float(value) for value in values.tolist()]
    if not values.is_cuda:
        return values
    import torch

    # Pinned memory, or the copy would block.
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)


class Steps:
    """The steps of the model calls of one run: steps from 0, model calls from 1."""

    def __init__(self) -> None:
        self._sigmas: dict[int, tuple[float | torch.Tensor, _Schedule]] = {}
        """Model call -> its sigma and schedule; sigmas on the CPU are resolved on request."""
        self._known: dict[int, int] = {}
        self._waiting: deque[tuple[int, torch.Tensor, _Schedule]] = deque()
        self._schedule: _Schedule | None = None

    def add(
        self, model_call: int, sigma: torch.Tensor | None, schedule: torch.Tensor | None, step: int | None = None
    ) -> None:
        """Add a model call: sigma (batch,), the sampler's sigmas (steps + 1,), and the step if known."""
        if step is not None:
            self._known[model_call] = step
            return
        if sigma is None or schedule is None or len(self._waiting) >= MOST_WAITING:
            return
        try:
            if self._schedule is None or self._schedule.given is not schedule:
                self._schedule = _Schedule(schedule)
            if sigma.is_cpu:
                self._sigmas[model_call] = sigma, self._schedule
                return
            copied = on_host(sigma)
        except (AttributeError, RuntimeError) as error:  # no tensors, or no pinned memory: a step is not
            log.debug("the step of a model call is not known: %s", error)  # worth a run
            return
        if not isinstance(copied, list):
            self._waiting.append((model_call, copied, self._schedule))

    def settle(self, model_call: int, *, at_rest: bool = False) -> None:
        """Read the sigmas copied up to this model call, which the device has finished.

        Args:
            at_rest: the device is idle, so that uncopied sigmas can be read too.
        """
        waiting = self._waiting
        try:
            while waiting and waiting[0][0] <= model_call:
                number, sigma, schedule = waiting[0]
                if not (at_rest or sigma.device.type == "cpu"):
                    return
                waiting.popleft()
                if not isinstance(schedule.values, list):
                    schedule.values = schedule.values.tolist()
                self._sigmas[number] = float(sigma.max()), schedule
        except RuntimeError as error:  # a device fault that an earlier error reports
            log.debug("the sigmas of a run could not be read: %s", error)
            waiting.clear()

    def between(self, first: int, last: int) -> list[int] | None:
        """[first, last] known step of these model calls; None without any."""
        steps = []
        for model_call in range(first, last + 1):
            if model_call in self._known:
                steps.append(self._known[model_call])
                continue
            sigma, schedule = self._sigmas.get(model_call, (0.0, None))
            if not isinstance(sigma, float):
                sigma = max(map(float, sigma.flatten().tolist()))
            step = schedule.step(sigma) if schedule is not None else None
            if step is not None:
                steps.append(step)
        return [min(steps), max(steps)] if steps else None
