"""What is sampled: the settings, and the embedded model with its caption and noise on a device.

Boundary: `demo/` and torch. It does not know which attention runs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..backends.values.grid import TokenGrid
from ..demo import captions, latents, sampling
from ..demo.model import PATCH, WEIGHTS, Attention, TinyWan, load
from .metrics import WINDOW
from .report import ComparisonError

MODES = ("end_to_end", "one_step", "attention")
DTYPES = ("float32", "float16", "bfloat16")
MOST_TOKENS = 2**17
"""Of self-attention: in a step of so many, the embedded model takes some gigabytes."""


BY_SAMPLE = ("with the caption", "without")
"""The samples of a batch, for methods that keep something for each between steps; with guidance 1 the first alone."""


@dataclass(frozen=True)
class Settings:
    """What is sampled, and how often. Sizes are latent cells, which are the embedded model's pixels."""

    mode: str = "end_to_end"
    prompt: str = "a large red circle on the left on white"
    seed: int = 1
    width: int = 32
    height: int = 32
    frames: int = 1
    steps: int = 20
    guidance: float = 4.0
    repeat: int = 3
    dtype: str | None = None
    """None for float32 on the CPU and on MPS, float16 elsewhere."""
    device: str | None = None
    """None for the first accelerator, else the CPU."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ComparisonError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")
        for name, side in (("width", self.width), ("height", self.height)):
            if side % 2 or side < WINDOW:
                raise ComparisonError(f"{name} {side}: give an even number of at least {WINDOW + 1}")
        for name in ("frames", "steps", "repeat"):
            if getattr(self, name) < 1:
                raise ComparisonError(f"{name} {getattr(self, name)} < 1")
        tokens = (self.frames // PATCH[0]) * (self.height // PATCH[1]) * (self.width // PATCH[2])
        if tokens > MOST_TOKENS:
            size = f"{self.frames} frames of {self.width}x{self.height}"
            raise ComparisonError(f"{size} are {tokens} tokens > {MOST_TOKENS}: give fewer frames, or smaller ones")
        if self.steps > sampling.TIMESTEPS:
            raise ComparisonError(f"steps {self.steps} > {sampling.TIMESTEPS}")
        if not math.isfinite(self.guidance):
            raise ComparisonError(f"guidance {self.guidance} is not a finite number")
        if self.dtype not in (None, *DTYPES):
            raise ComparisonError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        captions.encode(self.prompt)


class Scene:
    """One thing to sample, with everything but the attention fixed."""

    def __init__(
        self, settings: Settings, device: torch.device, model: TinyWan | None = None, noise: Tensor | None = None
    ) -> None:
        """`model`: None for the shipped one. `noise`: the latent to start from, None for that of the seed.

        Raises:
            ComparisonError: the latent has another shape than the settings say.
        """
        self.settings = settings
        self.device = device
        self.dtype = settings.dtype or ("float32" if device.type in ("cpu", "mps") else "float16")
        self.name = name_of_weights() if model is None else "another model"
        shape = (1, latents.CHANNELS, settings.frames, settings.height, settings.width)
        if noise is None:
            noise = sampling.seed_noise(settings.seed, 1, *shape[2:])
        if noise.shape != shape:
            raise ComparisonError(
                f"latent of shape {tuple(noise.shape)}: expected {shape}, as batch, channels, frames, height, width"
            )
        self.noise = noise.to(device)
        self.grid = TokenGrid(settings.frames // PATCH[0], settings.height // PATCH[1], settings.width // PATCH[2])
        self.positive = captions.encode(settings.prompt)[None].to(device)
        self.negative = captions.encode("")[None].to(device)
        self.samples = BY_SAMPLE[: 1 if settings.guidance == 1 else 2]
        self.model = (model or load()).to(device=device, dtype=getattr(torch, self.dtype))

    def sample(
        self, attention: Attention, on_step: Callable[[int, Tensor], None] | None = None, steps: int | None = None
    ) -> Tensor:
        """From the noise to a latent of the same shape; in `steps` steps where that is given."""
        settings = self.settings
        return sampling.sample(
            self.model, self.noise, self.positive, self.negative, steps or settings.steps, settings.guidance,
            attention, on_step,
        )  # fmt: skip

    def halfway(self, attention: Attention) -> tuple[Tensor, Tensor]:
        """The latent in the middle of sampling, and its noise level: where a single step is compared."""
        reached = [self.noise]
        self.sample(attention, lambda index, latent: reached.append(latent))
        middle = self.settings.steps // 2
        return reached[middle], sampling.simple_sigmas(self.settings.steps)[middle].to(self.device)

    @torch.inference_mode()
    def predict(self, latent: Tensor, sigma: Tensor, attention: Attention) -> Tensor:
        """What the model takes for the finished latent, seen from one step."""
        return sampling.predict(
            self.model, latent, sigma, self.positive, self.negative, self.settings.guidance, attention
        )


def picture_of(latent: Tensor) -> Tensor:
    """Decode a latent (1, 16, frames, height, width) to (frames, height, width, 3) in 0..1; NaN stays NaN."""
    return latents.latent_to_rgb(latent)[0]


def name_of_weights(path: Path = WEIGHTS) -> str:
    """The file and its digest: pictures of different weights are not to be compared."""
    return f"{path.name} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]})"
