"""What the command `quality` found: for each backend its clips, and what follows from them.

Boundary: numbers and text; no torch, no model. `quality.py` supplies the numbers, `quality_tables.py` formats them.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from .paired import interval
from .report import Spread, plain

EQUAL = 100.0
"""PSNR in dB of a frame that is equal to the reference's to the bit, so that a mean exists."""


@dataclass
class ClipScore:
    """One prompt on one backend. Frames are compared with those of the reference's clip of this prompt."""

    prompt: str
    seed: int
    step_ms: list[float]
    attention_ms: float | None
    """In all steps together; None where it cannot be measured."""
    temporal: float
    """Mean absolute difference of neighbouring frames, over all colour values, 0..1."""
    psnr: list[float]
    """Of each frame, in dB; NaN where the clip is broken."""
    ssim: list[float]
    right: dict[str, bool]
    """What of the caption it shows, by the keys of `demo.judge_motion.score`."""
    broken: str | None = None
    """What is wrong with it: NaN or infinite values."""

    @property
    def total_ms(self) -> float:
        return sum(self.step_ms)


@dataclass
class QualityRow:
    """One backend with its options. What was not measured is None; `failed` is a sentence without a full stop."""

    name: str
    """What tables call it."""
    asked: str
    """The backend's id and its options, as `--backends` takes them."""
    ran: str | None = None
    """What computed, for a backend group its member; of a sparse backend without what computes its other calls."""
    failed: str | None = None
    clips: list[ClipScore] = field(default_factory=list)
    kept: float | None = None
    """Mean share of query-key pairs that calls with a block map computed; None for a dense backend."""
    computed: float | None = None
    """The same over all self-attention calls, of which those that were computed whole count 1."""
    whole: dict[str, int] = field(default_factory=dict)
    """Reason -> self-attention calls that were computed whole."""
    peak_memory: int | None = None
    """Bytes, model included; None where the device does not count them."""


@dataclass(frozen=True)
class Summary:
    """A row in numbers. None: not measured, or nothing to compare with."""

    step_ms: Spread | None
    total_ms: Spread | None
    """Of a clip: median, least and most over the prompts."""
    speedup: dict[str, float] | None
    """The reference's time of a clip divided by this row's, prompt by prompt: median with its 95 % interval."""
    attention_ms: float | None
    """Median over the prompts, for one step."""
    attention_speedup: dict[str, float] | None
    psnr: float | None
    """Mean over all frames of all prompts, in dB; a frame that is equal to the bit counts as `EQUAL`."""
    psnr_worst: float | None
    """Of the worst frame."""
    ssim: float | None
    ssim_worst: float | None
    temporal: float | None
    """Mean absolute difference of neighbouring frames, mean over the prompts, 0..1."""
    temporal_ratio: float | None
    """The same divided by the reference's."""
    identical: bool
    """All its frames are equal to the reference's to the bit."""
    right: int
    """Clips whose shapes and directions are those of the caption."""
    count: int


@dataclass
class QualityReport:
    """One run of the command. The first row is the reference."""

    model: str
    prompts: int
    steps: int
    size: int
    frames: int
    seed: int
    guidance: float
    dtype: str
    dense_steps: int
    machine: str
    versions: dict[str, str]
    load: list[float] = field(default_factory=list)
    """Load average over a minute at the start and at the end; empty where the system has none."""
    rows: list[QualityRow] = field(default_factory=list)
    command: str | None = None
    ended: str | None = None
    """Why the run ended early."""

    @property
    def tokens(self) -> int:
        """Of self-attention, in one sample."""
        return self.frames * (self.size // 2) ** 2

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data that JSON can hold: NaN and infinity become null."""
        data = asdict(self)
        for found, row in zip(data["rows"], self.rows, strict=True):
            found["summary"] = asdict(summary(row, self))
        plain_data: dict[str, Any] = plain(data)
        return plain_data

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"


def summary(row: QualityRow, report: QualityReport) -> Summary:
    """What follows from the clips of a row, against those of the first."""
    first, clips = report.rows[0], row.clips
    pairs = list(zip(first.clips, clips, strict=False)) if row is not first else []
    attention = [clip.attention_ms for clip in clips if clip.attention_ms is not None]
    ratios = [
        dense.attention_ms / clip.attention_ms for dense, clip in pairs if dense.attention_ms and clip.attention_ms
    ]
    compared = [] if row is first else clips
    exact = [value for clip in compared for value in clip.psnr]
    psnr = [min(value, EQUAL) for value in exact]
    ssim = [value for clip in compared for value in clip.ssim]
    own = _mean([clip.temporal for clip in clips])
    reference = _mean([clip.temporal for clip in first.clips[: len(clips)]])
    return Summary(
        Spread.of([ms for clip in clips for ms in clip.step_ms]),
        Spread.of([clip.total_ms for clip in clips]),
        interval([dense.total_ms / clip.total_ms for dense, clip in pairs]) if pairs else None,
        statistics.median(attention) / report.steps if attention else None,
        interval(ratios) if ratios else None,
        _mean(psnr),
        _worst(psnr),
        _mean(ssim),
        _worst(ssim),
        own,
        own / reference if own is not None and reference else None,
        bool(exact) and min(exact) == math.inf,
        sum(clip.right.get("shape", False) and clip.right.get("direction", False) for clip in clips),
        len(clips),
    )


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _worst(values: list[float]) -> float | None:
    """The least; NaN where one is NaN."""
    return next((value for value in values if math.isnan(value)), min(values)) if values else None
