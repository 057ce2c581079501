"""The sampler's step of each model call: as the host knows it, else by sigmas, read without waiting for the device.

A sigma is copied to the host asynchronously and read once the device has finished the copy. Where that
cannot be queried, it stays on the device until the end of the run. What makes a step of a sigma is `schedule.step_of`.
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
"""Most sigmas that wait on a device; the steps of later model calls stay unknown."""


class _Schedule:
    """The sigmas of one sampler, and the steps found from them."""

    __slots__ = ("given", "steps", "values")

    def __init__(self, given: torch.Tensor) -> None:
        self.given = given
        self.values = on_host(given)
        self.steps: dict[float, int] = {}

    def step(self, sigma: float) -> int | None:
        """The step at a sigma; None while these sigmas are on the device."""
        if not isinstance(self.values, list):
            return None
        if sigma not in self.steps:
            self.steps[sigma] = max(min(step_of(sigma, self.values), len(self.values) - 2), 0)
        return self.steps[sigma]


def on_host(values: torch.Tensor) -> list[float] | torch.Tensor:
    """The numbers of a tensor on the CPU; else a copy that is on its way there, or the tensor itself."""
    if values.device.type == "cpu":
        return [float(value) for value in values.tolist()]
    if not values.is_cuda:
        return values
    import torch

    # Into pinned memory, or the host would wait.
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)


class Steps:
    """The steps of the model calls of one run, counted from 0; model calls are numbered from 1."""

    def __init__(self) -> None:
        self._sigmas: dict[int, tuple[float | torch.Tensor, _Schedule]] = {}
        """Those on the CPU are read on request."""
        self._known: dict[int, int] = {}
        self._waiting: deque[tuple[int, torch.Tensor, _Schedule]] = deque()
        self._schedule: _Schedule | None = None

    def add(
        self, model_call: int, sigma: torch.Tensor | None, schedule: torch.Tensor | None, step: int | None = None
    ) -> None:
        """Note where a model call was: its sigma, one for each sample, all sigmas of its sampler, its step if known."""
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
        """The device has done everything up to this model call: read what was copied until then.

        Args:
            at_rest: nothing comes after it, so that what was not copied can be read too.
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
        except RuntimeError as error:  # a device fault: the first error says more
            log.debug("the sigmas of a run could not be read: %s", error)
            waiting.clear()

    def between(self, first: int, last: int) -> list[int] | None:
        """The first and the last step of these model calls, as far as they are known; None where none is."""
        found = []
        for model_call in range(first, last + 1):
            if model_call in self._known:
                found.append(self._known[model_call])
                continue
            sigma, schedule = self._sigmas.get(model_call, (0.0, None))
            if not isinstance(sigma, float):
                sigma = max(map(float, sigma.flatten().tolist()))
            step = schedule.step(sigma) if schedule is not None else None
            if step is not None:
                found.append(step)
        return [min(found), max(found)] if found else None
