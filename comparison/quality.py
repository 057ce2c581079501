"""Samples the embedded video model on several backends and says how far each clip is from the reference's.

All backends go through the same prompts from the same noise. They take turns at each step, in an order that is drawn
anew: so a machine that is busy for a while slows all of them, and times can be compared step by step.

Boundary: the model, backends and numbers; it writes no file and prints nothing.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..backends.engine.router import Router
from ..backends.measure import environment
from ..demo import judge_motion, motion
from ..demo.model import TinyWan, load
from . import metrics
from .contenders import Routed, router_for
from .quality_backends import Contender, choose
from .quality_report import ClipScore, QualityReport, QualityRow
from .quality_runs import Runner, able, sample, settle, warm_up
from .report import ComparisonError, Row
from .rounds import Progress
from .run import quiet, sort_out
from .scene import Scene, Settings, name_of_weights, picture_of

MOST_PROMPTS = 1000
INTERRUPTED = "interrupted: {finished} of {prompts} prompts are shown, those that every backend had finished"


@dataclass(frozen=True)
class Asked:
    """What is to be measured. Sizes are latent cells, which are the embedded model's pixels."""

    weights: Path
    backends: str = ""
    """Names separated by commas, as `quality_backends.choose` takes them; empty for its default."""
    prompts: int = 16
    steps: int = 20
    size: int = 32
    frames: int = motion.FRAMES
    seed: int = 0
    guidance: float = 4.0
    dense_steps: int | None = None
    """None for a fifth of the steps."""
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ComparisonError(f"prompts {self.prompts} < 1")
        if self.prompts > MOST_PROMPTS:
            raise ComparisonError(f"prompts {self.prompts} > {MOST_PROMPTS}")
        if self.frames < 2:
            raise ComparisonError(f"frames {self.frames} < 2: a clip has motion to judge")
        self.settings("", 0)  # says what is wrong with the rest
        if not 0 <= self.first_steps < self.steps:
            raise ComparisonError(f"dense steps {self.dense_steps}: give 0 to {self.steps - 1}, less than the steps")

    @property
    def first_steps(self) -> int:
        """Steps at the beginning that methods named without options compute whole."""
        return self.steps // 5 if self.dense_steps is None else self.dense_steps

    def settings(self, caption: str, index: int) -> Settings:
        """What is sampled for one prompt."""
        return Settings(
            prompt=caption, seed=self.seed + index, width=self.size, height=self.size, frames=self.frames,
            steps=self.steps, guidance=self.guidance, dtype=self.dtype, device=self.device,
        )  # fmt: skip

    def clips(self) -> list[motion.Clip]:
        """What the captions ask for; the same for a seed."""
        rng = random.Random(self.seed)  # noqa: S311
        return [motion.random_clip(rng) for _ in range(self.prompts)]


@dataclass
class Quality:
    """A report, and of the first prompt a clip (frames, height, width, 3) in 0..1 for each row; None without one."""

    report: QualityReport
    clips: list[Tensor | None] = field(default_factory=list)


def measure(asked: Asked, *, router: Router | None = None, progress: Progress = quiet) -> Quality:
    """Sample every prompt on every backend; `torch_sdpa` always runs and is the reference.

    Raises:
        ComparisonError: what was asked for makes no sense, the weights are not there or are another model's, or the
            device cannot be used; the message says what to change.
    """
    router = router or router_for(asked.device)
    device = torch.device(asked.device or {"rocm": "cuda"}.get(router.platform.kind, router.platform.kind))
    wanted = asked.clips()
    model = _load(asked.weights)
    scenes = [Scene(asked.settings(clip.caption(), at), device, model) for at, clip in enumerate(wanted)]
    first = scenes[0]
    contenders = choose(asked.backends, router, first.grid, asked.first_steps)
    report = QualityReport(
        name_of_weights(asked.weights), asked.prompts, asked.steps, asked.size, asked.frames, asked.seed,
        asked.guidance, first.dtype, asked.first_steps, environment.in_words(router.platform),
        environment.versions(router.platform), _load_average(),
    )  # fmt: skip
    runners = _runners(contenders, router, first, report)
    found = Quality(report, [None] * len(report.rows))
    total = asked.steps * asked.prompts
    try:
        with torch.inference_mode():
            warm_up(runners, first, progress, total)
            _check_reference(report)
            for number, (scene, clip) in enumerate(zip(scenes, wanted, strict=True)):

                def tell(step: int, number: int = number) -> None:
                    progress(
                        f"prompt {number + 1} of {asked.prompts}, step {step + 1} of {asked.steps}, "
                        f"{len(able(runners))} backends",
                        number * asked.steps + step,
                        total,
                    )

                sample(runners, scene, number, tell)
                _check_reference(report)
                _score(runners, scene, clip, found if number == 0 else None)
    except KeyboardInterrupt:
        finished = min(len(runner.row.clips) for runner in able(runners))
        if not finished:
            raise
        for row in report.rows:
            del row.clips[finished:]
        report.ended = INTERRUPTED.format(finished=finished, prompts=asked.prompts)
    for runner in runners:
        settle(runner)
    report.load += _load_average()
    return found


def _load(path: Path) -> TinyWan:
    """The model in a file, or a sentence about the file."""
    if not path.is_file():
        raise ComparisonError(
            f"weights {path} are not there: name a file of the embedded video model with --weights, or train one in "
            "a checkout: python -m attention_backends.demo.train --work DIR --video"
        )
    try:
        return load(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ComparisonError(
            f"weights {path} cannot be loaded into the embedded video model ({type(error).__name__}: {reason}); name "
            "a file that demo.train wrote"
        ) from error


def _load_average() -> list[float]:
    return [round(os.getloadavg()[0], 2)] if hasattr(os, "getloadavg") else []


def _runners(contenders: Sequence[Contender], router: Router, scene: Scene, report: QualityReport) -> list[Runner]:
    """Fill in the report's rows, with the reasons of those that cannot run here; the others as runners."""
    _, found = sort_out([contender.asked for contender in contenders], router)
    report.rows = [
        QualityRow(contender.name, contender.asked, failed=row.failed)
        for contender, row in zip(contenders, found, strict=True)
    ]
    return [
        Runner(row, Routed(router, row.asked, scene.grid, guard="off")) for row in report.rows if row.failed is None
    ]


def _check_reference(report: QualityReport) -> None:
    """Without the reference there is nothing to compare with."""
    first = report.rows[0]
    if first.failed is not None:
        raise ComparisonError(f"the reference {first.name} did not run: {first.failed}")


def _score(runners: Sequence[Runner], scene: Scene, clip: motion.Clip, keep: Quality | None) -> None:
    """Compare the clips of one prompt with the reference's; `keep` gets the clips themselves."""
    reference: Tensor | None = None
    for runner in able(runners):
        assert runner.latent is not None  # noqa: S101
        rgb = picture_of(runner.latent).cpu()
        if reference is None:
            reference = rgb  # of the first runner, which `_check_reference` found able
        row = Row(runner.row.asked)
        metrics.score(row, rgb, reference)
        runner.row.clips.append(
            ClipScore(
                scene.settings.prompt,
                scene.settings.seed,
                runner.step_ms,
                sum(runner.attention_ms) if runner.attention_ms else None,
                float((rgb[1:] - rgb[:-1]).abs().mean()),
                [frame.psnr for frame in row.frame_scores],
                [frame.ssim for frame in row.frame_scores],
                {} if row.broken else judge_motion.score(clip, rgb),
                row.broken,
            )
        )
        if keep is not None:
            keep.clips[keep.report.rows.index(runner.row)] = rgb
