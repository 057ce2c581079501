"""Sampling of the embedded model: flow matching, Euler steps, shift 8, guidance, noise from a seed.

It does what ComfyUI does for Wan with sampler "euler" and scheduler "simple", so the same seed and caption
give the same picture there; a test compares them.

Boundary: torch only; the model, its attention and the conditioning are passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .model import Attention, TinyWan, sdpa

SHIFT = 8.0
TIMESTEPS = 1000


def shifted(t: Tensor, shift: float = SHIFT) -> Tensor:
    """Move times (0 picture, 1 noise) towards the noise: the larger the shift, the more."""
    return shift * t / (1 + (shift - 1) * t)


def simple_sigmas(steps: int, shift: float = SHIFT) -> Tensor:
    """The (steps + 1,) noise levels of the "simple" schedule, 1 to 0. ValueError for steps not in 1..1000."""
    if not 1 <= steps <= TIMESTEPS:
        raise ValueError(f"steps {steps} not in 1..{TIMESTEPS}")
    table = shifted(torch.arange(1, TIMESTEPS + 1) / TIMESTEPS, shift)
    picks = [table[-1 - int(index * TIMESTEPS / steps)] for index in range(steps)]
    return torch.stack([*picks, torch.tensor(0.0)])


def seed_noise(seed: int, batch: int, frames: int, height: int, width: int) -> Tensor:
    """Noise (batch, 16, frames, height, width), made on the CPU so that every device starts from the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 16, frames, height, width, generator=generator)


def predict(
    model: TinyWan,
    x: Tensor,
    sigma: Tensor,
    positive: Tensor,
    negative: Tensor,
    guidance: float,
    attention: Attention = sdpa,
) -> Tensor:
    """The noise-free latent that the model sees in x at noise level sigma (on x's device), with guidance.

    positive and negative: conditioning (batch, tokens, 4096). At guidance 1 the negative one is not computed.
    """
    dtype = next(model.parameters()).dtype

    def flow(latent: Tensor, context: Tensor) -> Tensor:
        timestep = (sigma * TIMESTEPS).expand(latent.shape[0])
        predicted: Tensor = model(latent.to(dtype), timestep, context.to(x.device, dtype), attention).float()
        return predicted

    if guidance == 1:
        return x - sigma * flow(x, positive)
    both = x.repeat(2, 1, 1, 1, 1)  # one call for both, as ComfyUI does when they fit
    wanted, unwanted = (both - sigma * flow(both, torch.cat([positive, negative]))).chunk(2)
    return unwanted + guidance * (wanted - unwanted)


def euler(x: Tensor, clean: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
    """One step from noise level sigma to the following one, towards the noise-free latent `clean`."""
    return x + (x - clean) / sigma * (following - sigma)


@torch.inference_mode()
def sample(
    model: TinyWan,
    noise: Tensor,
    positive: Tensor,
    negative: Tensor,
    steps: int = 20,
    guidance: float = 4.0,
    attention: Attention = sdpa,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Turn noise (batch, 16, frames, height, width) into normalised latents of the same shape.

    on_step(index, latent) is called after each step, for progress and timing; what it raises stops the run.
    """
    x = noise.float()
    for index, (sigma, following) in enumerate(pairwise(simple_sigmas(steps).to(x.device))):
        clean = predict(model, x, sigma, positive, negative, guidance, attention)
        x = euler(x, clean, sigma, following)
        if on_step is not None:
            on_step(index, x)
    return x
