"""Backends that take turns at each step of the sampler: what each of them did, and how long it took.

Boundary: the model, its attention and clocks; clips are compared in `quality.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..backends.values.devices import release, synchronise
from ..backends.values.faults import is_cuda_fault
from ..demo import sampling
from .contenders import Routed
from .quality_report import QualityRow
from .report import ComparisonError
from .rounds import Progress, why
from .scene import Scene


@dataclass
class Runner:
    """One backend in turn with the others."""

    row: QualityRow
    attention: Routed
    latent: Tensor | None = None
    step_ms: list[float] = field(default_factory=list)
    attention_ms: list[float] = field(default_factory=list)
    before: dict[object, tuple[int, float, dict[str, int]]] = field(default_factory=dict)
    """What each row of its run report had counted when the measured runs began."""


def able(runners: Sequence[Runner]) -> list[Runner]:
    """Those that have not failed."""
    return [runner for runner in runners if runner.row.failed is None]


def warm_up(runners: Sequence[Runner], scene: Scene, progress: Progress, total: int) -> None:
    """One dense step and one later step of each, which is where kernels are compiled and calls planned."""
    steps = scene.settings.steps
    for runner in runners:
        progress(f"{runner.row.name}: the warm-up", 0, total)
        runner.attention.begin(scene.samples)
        for index in (0, steps - 1):
            runner.latent = scene.noise
            _guarded(runner, scene, index, "the warm-up")
        runner.before = {
            number: (row.kept.calls, float(row.kept.total), dict(row.kept.dense))
            for number, row in runner.attention.session.run_report.rows.items()
            if row.kept is not None
        }


def sample(runners: Sequence[Runner], scene: Scene, number: int, tell: Callable[[int], None]) -> None:
    """Sample one prompt on all backends, step by step in turn."""
    rng = random.Random(number)  # noqa: S311
    for runner in able(runners):
        runner.latent, runner.step_ms, runner.attention_ms = scene.noise.float(), [], []
        runner.attention.begin(scene.samples)
    for index in range(scene.settings.steps):
        tell(index)
        for runner in rng.sample(able(runners), len(able(runners))):
            _guarded(runner, scene, index, f"step {index + 1} of prompt {number + 1}")


def _step(runner: Runner, scene: Scene, index: int) -> None:
    """One step of the sampler, and what it took."""
    latent, device, steps = runner.latent, scene.device, scene.settings.steps
    assert latent is not None  # noqa: S101  # a runner gets its noise before its first step
    sigma, following = list(pairwise(sampling.simple_sigmas(steps).to(device)))[index]
    module: Any = getattr(torch, device.type, None)
    measurable = hasattr(module, "reset_peak_memory_stats") and hasattr(module, "max_memory_allocated")
    if measurable:
        module.reset_peak_memory_stats(device)
    runner.attention.at_step(index, steps)
    runner.attention.attention_ms(device)  # forget what was before
    synchronise(device)
    start = perf_counter()
    clean = scene.predict(latent, sigma, runner.attention)
    runner.latent = sampling.euler(latent, clean, sigma, following)
    synchronise(device)
    runner.step_ms.append(1e3 * (perf_counter() - start))
    spent = runner.attention.attention_ms(device)
    if spent is not None:
        runner.attention_ms.append(spent)
    if measurable:
        runner.row.peak_memory = max(runner.row.peak_memory or 0, module.max_memory_allocated(device))


def _guarded(runner: Runner, scene: Scene, index: int, where: str) -> None:
    """`_step`; a failure ends this backend's part and is its row's reason.

    Raises:
        ComparisonError: the device cannot be used any more.
    """
    if runner.row.failed is not None:
        return
    try:
        _step(runner, scene, index)
    except Exception as error:  # any failure of one backend is its row; the others go on
        runner.row.failed = f"{why(error)} (in {where})"
        if is_cuda_fault(error):
            raise ComparisonError(f"{runner.row.name} left the device unusable: {why(error)}") from error
        release(scene.device)


def settle(runner: Runner) -> None:
    """What ran, and how much of their work sparse calls computed since the warm-up."""
    row, rows = runner.row, runner.attention.session.run_report.rows
    row.ran = runner.attention.ran if row.clips else None
    calls, total = 0, 0.0
    for number, one in rows.items():
        if one.kept is None:
            continue
        calls_before, total_before, whole_before = runner.before.get(number, (0, 0.0, {}))
        calls += one.kept.calls - calls_before
        total += float(one.kept.total) - total_before
        for reason, count in one.kept.dense.items():
            if count > whole_before.get(reason, 0):
                row.whole[reason] = row.whole.get(reason, 0) + count - whole_before.get(reason, 0)
    whole = sum(row.whole.values())
    row.kept = total / calls if calls else None
    row.computed = (total + whole) / (calls + whole) if calls + whole else None
