"""What a comparison found: a row for each backend, what all rows share, and the files and tables made of it.

Boundary: numbers and text; no torch, no model. `run`, `calls` and, in ComfyUI, the
nodes supply the numbers.
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..backends.values.bounded import shortened

LEVEL = 1 / 255
"""One step of an 8-bit colour, where pictures go from 0 to 1: what differs by less looks the same."""


class ComparisonError(ValueError):
    """A comparison that makes no sense as asked; the message says what to change.

    A message that quotes a long text is shortened in its middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None for no value at all."""
        return cls(statistics.median(values), min(values), max(values), len(values)) if values else None


@dataclass
class FrameScore:
    """One frame against the same frame of the reference."""

    psnr: float
    ssim: float


@dataclass
class CallScore:
    """One attention call of the model against the float64 reference."""

    role: str
    block: str
    request: str
    """The call's facts in words: shapes, dtype, mask."""
    ms: Spread | None = None
    relative_l2: float = math.nan
    cosine: float = math.nan
    broken: str | None = None


@dataclass
class Row:
    """One backend. What was not measured is None; `failed` and `broken` are sentences without a full stop."""

    asked: str
    """The backend that was asked for, by its id, with its options where some were given."""
    ran: str | None = None
    """What really ran: the same id, or a member of the backend group that was asked for; None if nothing did."""
    label: str | None = None
    """A name that a person gave; None for the backend's own."""
    failed: str | None = None
    """Why it did not run, or not to the end. Numbers of runs that were finished before are kept."""
    broken: str | None = None
    """What is wrong with its result: NaN or infinite values."""
    fell_back: int = 0
    """Calls that ran something else than was asked for; with any of them its times are not those of the backend."""
    runs: int = 0
    repeatable: bool | None = None
    """All runs gave the same result to the bit; None with fewer than two runs."""
    total_ms: Spread | None = None
    """Sampling alone: no loading, no decoding."""
    step_ms: Spread | None = None
    speedup: float | None = None
    """The reference's median time per step, divided by this row's."""
    attention_share: float | None = None
    """Part of the total time that is spent in attention, 0..1."""
    peak_memory: int | None = None
    """Bytes, model included."""
    memory_reduction: float | None = None
    """1 - peak / the reference's peak."""
    identical: bool | None = None
    """The picture equals the reference's to the bit."""
    psnr: float | None = None
    ssim: float | None = None
    max_difference: float | None = None
    """Largest difference of one colour value, 0..1."""
    relative_l2: float | None = None
    """Of latents against the reference row's; in the mode `attention` the worst call against float64."""
    cosine: float | None = None
    clip_similarity: float | None = None
    """Cosine of the picture's CLIP embedding to the reference's; only where a CLIP vision model was given."""
    frame_scores: list[FrameScore] = field(default_factory=list)
    calls: list[CallScore] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What stands over its picture: the name, and what really ran if that is something else."""
        name = self.label or self.asked
        backend = self.asked if " + " in self.asked else self.asked.partition(" ")[0]  # of several roles; with options
        return name if self.ran in (None, name, backend) else f"{name} -> {self.ran}"

    @property
    def verdict(self) -> str:
        """The row in a few words. The bounds are conventions: one 8-bit level, and 30 dB."""
        if self.broken:
            return f"broken: {self.broken}"
        if self.failed:
            return self.failed
        if self.max_difference is None or self.psnr is None:
            return ""
        if self.identical:
            return "bit-identical"
        if self.max_difference < LEVEL:
            return "same to the eye"
        return "slightly different" if self.psnr >= 30 else "a different picture"


@dataclass
class Report:
    """One comparison. The first row is the reference."""

    mode: str
    model: str
    prompt: str
    seed: int
    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    sampling: str
    """Sampler, schedule and shift."""
    dtype: str
    machine: str
    versions: dict[str, str]
    command: str = ""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a reader must know: what was not measured and why, that the run was interrupted."""

    def relate(self) -> None:
        """Fill in speed-up and memory reduction of each row against the first, where both ran what was asked for."""
        first = self.rows[0]
        for row in self.rows:
            if first.fell_back or row.fell_back:
                continue  # what it took is not what the backend takes
            if first.step_ms and row.step_ms:
                row.speedup = first.step_ms.median / row.step_ms.median
            if first.peak_memory and row.peak_memory and row is not first:
                row.memory_reduction = 1 - row.peak_memory / first.peak_memory

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data that JSON can hold: NaN and infinity become null."""
        data: dict[str, Any] = plain(asdict(self))
        for found, row in zip(data["rows"], self.rows, strict=True):
            found["verdict"] = row.verdict
        return data

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"

    def subject(self, room: int = 1000) -> str:
        """What was sampled, in one line; the prompt is shortened to what fits in so many characters."""
        size = f"{self.width}x{self.height}" + (f", {self.frames} frames" if self.frames > 1 else "")
        facts = f"seed {self.seed}, {size}, {self.steps} steps, guidance {self.guidance:g}"
        facts += f", {self.dtype}" if self.dtype else ""
        prompt = textwrap.shorten(self.prompt, max(10, room - len(facts)), placeholder="...")
        return f'"{prompt}", {facts}' if prompt else facts


def plain(value: Any) -> Any:
    """Data that JSON can hold: NaN and infinity become None."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
