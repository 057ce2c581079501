"""Latents to pictures for reports: by a VAE, or by the linear preview factors of ComfyUI's latent format."""

from __future__ import annotations

from typing import Any

import torch

from ...comparison.report import ComparisonError


def decode(samples: torch.Tensor, model: Any, vae: Any = None) -> torch.Tensor:
    """Pictures (frames, height, width, 3) in 0..1 of the first latent of a batch; NaN stays NaN.

    Raises:
        ComparisonError: there is no VAE, and this model's latent format has no preview factors.
    """
    if samples.is_nested:
        samples = samples.unbind()[0]  # video with audio: the video
    if vae is not None:
        decoded: torch.Tensor = vae.decode(samples[:1]).float().cpu()
        return decoded.flatten(0, -4) if decoded.ndim > 4 else decoded
    latent_format = model.model.latent_format
    factors = latent_format.latent_rgb_factors
    if factors is None:
        raise ComparisonError("this model's latents have no linear preview: connect a VAE")
    latent = latent_format.process_in(samples[:1].float().cpu())
    reshape = getattr(latent_format, "latent_rgb_factors_reshape", None)
    if reshape is not None:
        latent = reshape(latent)
    rgb: torch.Tensor = latent.movedim(1, -1) @ torch.tensor(factors)
    bias = getattr(latent_format, "latent_rgb_factors_bias", None)
    if bias is not None:
        rgb = rgb + torch.tensor(bias)
    return ((rgb + 1) / 2).clamp(0, 1).flatten(0, -4)
