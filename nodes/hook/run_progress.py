"""Where in a run a model call is, for sparse methods: the step of the whole schedule, sigma, each sample's identity."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ...backends.config.schedule import step_of
from ...backends.values.grid import Progress

if TYPE_CHECKING:
    import torch

    from .run import Run


class WholeSchedule(NamedTuple):
    """Where the steps of one sampler lie in the whole schedule."""

    sigmas: tuple[float, ...]
    """Of this sampler, one more than its steps."""
    before: int = 0
    """Steps of the schedule before this sampler's first."""
    steps: int = 0
    """Steps of the whole schedule."""
    blocks: tuple[str, ...] = ()
    """The blocks of the model, in its order."""


NO_SAMPLER = WholeSchedule(())


def whole_schedule(sigmas: Sequence[float], percent_to_sigma: Callable[[float], float] | None) -> WholeSchedule:
    """The whole schedule of which a sampler runs a part: the second of two samplers, or a partial denoise.

    Where it begins and ends is the model's own percent of its sigmas; the steps outside are taken to be as long in
    percent as the steps inside.
    """
    count = len(sigmas) - 1
    if count < 1:
        return NO_SAMPLER
    begin, end = 0.0, 1.0
    if percent_to_sigma is not None:
        begin, end = (_percent(sigma, percent_to_sigma) for sigma in (sigmas[0], sigmas[-1]))
    if end <= begin:  # sigmas that rise, or that the model does not know
        begin, end = 0.0, 1.0
    steps = max(round(count / (end - begin)), count)
    return WholeSchedule(tuple(sigmas), min(round(steps * begin), steps - count), steps)


def _percent(sigma: float, percent_to_sigma: Callable[[float], float], halvings: int = 20) -> float:
    """The percent of a sigma, from 0 to 1, by halving: sigmas fall with the percent."""
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        if float(percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return high if high == 1 else low


def begin(progress: Progress, run: Run, schedule: WholeSchedule, options: dict[str, Any], x: torch.Tensor) -> Progress:
    """Set `progress` for the model call that begins; returns what it was. Reads sigma from the device."""
    before = replace(progress)
    sigma = options.get("sigmas")
    progress.sigma = None if sigma is None else float(sigma.max())
    progress.step, progress.steps = None, schedule.steps or None
    if schedule.steps and progress.sigma is not None:
        step = step_of(progress.sigma, schedule.sigmas) if run.step is None else run.step
        progress.step = schedule.before + min(step, len(schedule.sigmas) - 2)
    progress.blocks = schedule.blocks
    progress.samples = () if run.around_model_calls else samples_of(options, int(x.shape[0]))
    progress.calls += 1
    return before


def restore(progress: Progress, before: Progress) -> None:
    """After a nested model call: the outer one continues."""
    for name in ("step", "steps", "sigma", "blocks", "samples"):
        setattr(progress, name, getattr(before, name))


def clear(progress: Progress) -> None:
    """At the end of a run: nothing is kept."""
    progress.kept.clear()
    restore(progress, Progress())
    progress.calls = 0


def samples_of(options: dict[str, Any], batch: int) -> tuple[Hashable, ...]:
    """The identity of each sample of a model call: its conditioning, its context window, its number in the latent.

    Empty where ComfyUI does not say which conditionings are in the batch.
    """
    chunks = options.get("uuids")
    if not isinstance(chunks, list | tuple) or not chunks or batch % len(chunks):
        return ()
    window = options.get("context_window")
    frames = tuple(getattr(window, "index_list", ()) or ())
    each = batch // len(chunks)
    return tuple((chunk, frames, number) for chunk in chunks for number in range(each))
