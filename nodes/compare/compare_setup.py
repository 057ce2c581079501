"""What all rows of a comparison share: guider, noise, sigmas and latent, and what the report says of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import comfyui_version
import torch

from ...backends.measure import environment
from ...comparison.report import ComparisonError, Report, Row
from ..hook.run import router_for

NOT_MEASURED = "VBench: not measured; it scores many prompts and seeds, a comparison has one"


def make_guider(model: Any, positive: Any, negative: Any, cfg: float) -> Any:
    """A CFG guider. Raises ComparisonError when something is not connected."""
    missing = [name for name, given in (("model", model), ("positive", positive)) if given is None]
    if missing:
        raise ComparisonError(f"connect a guider, or model, positive and negative; missing: {', '.join(missing)}")
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative if negative is not None else positive)
    guider.set_cfg(cfg if negative is not None else 1.0)
    return guider


class SetUp:
    """One sampling run with everything but the model's attention fixed."""

    def __init__(
        self, guider: Any, noise: Any, sampler: Any, sigmas: torch.Tensor, latent: dict[str, Any], mode: str
    ) -> None:
        self.guider = guider
        self.sampler = sampler
        self.mode = mode
        self.seed = noise.seed
        self.noise_mask = latent.get("noise_mask")
        image = comfy.sample.fix_empty_latent_channels(guider.model_patcher, latent["samples"])
        check_latent(image, guider.model_patcher)
        self.latent = image
        self.noise = noise.generate_noise({**latent, "samples": image})
        self.sigmas = sigmas
        middle = (len(sigmas) - 1) // 2
        if mode != "end_to_end" and middle:  # of a single step nothing can be sampled before
            self.latent = self.sample(guider.model_patcher, sigmas[: middle + 1])
            self.noise = torch.zeros_like(self.noise)
            self.sigmas = sigmas[middle : middle + 2]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def sample(
        self, model: Any, sigmas: torch.Tensor | None = None, on_step: Callable[..., None] | None = None
    ) -> torch.Tensor:
        """Sample with `model` instead of the guider's own; the result is on the CPU."""
        guider = copy.copy(self.guider)
        guider.model_patcher, guider.model_options = model, model.model_options
        result: torch.Tensor = guider.sample(
            self.noise, self.latent, self.sampler, self.sigmas if sigmas is None else sigmas,
            denoise_mask=self.noise_mask, callback=on_step, disable_pbar=True, seed=self.seed,
        )  # fmt: skip
        return result.cpu()


def check_latent(latent: torch.Tensor, model: Any) -> None:
    """Raises ComparisonError for a latent that is another model's: its error would otherwise stand in every row."""
    if latent.is_nested:
        return
    expected = model.get_model_object("latent_format")
    shape, dimensions = tuple(latent.shape), expected.latent_dimensions + 2
    if len(shape) != dimensions or shape[1] != expected.latent_channels:
        raise ComparisonError(
            f"latent_image of shape {shape} is not one of this model, which has {expected.latent_channels} channels in "
            f"{dimensions} dimensions, batch and channels first: make it with this model's empty latent node or VAE"
        )


def make_report(setup: SetUp, rows: list[Row]) -> Report:
    """What all rows share; the size is that of the pictures that a VAE makes of these latents."""
    platform = router_for(setup.guider.model_patcher.load_device).platform
    shape = list(setup.latent.shape) if not setup.latent.is_nested else list(setup.latent.unbind()[0].shape)
    sampler = getattr(getattr(setup.sampler, "sampler_function", None), "__name__", type(setup.sampler).__name__)
    model = setup.guider.model_patcher.model
    scale = getattr(setup.guider.model_patcher.get_model_object("latent_format"), "spacial_downscale_ratio", 8)
    return Report(
        mode=setup.mode,
        model=type(model).__name__,
        prompt="",
        seed=setup.seed,
        width=shape[-1] * scale,
        height=shape[-2] * scale,
        frames=shape[2] if len(shape) == 5 else 1,
        steps=setup.steps,
        guidance=float(getattr(setup.guider, "cfg", 1.0)),
        sampling=f"{sampler}, sigmas {float(setup.sigmas[0]):.4g} to {float(setup.sigmas[-1]):.4g}",
        dtype=str(model.get_dtype()).removeprefix("torch."),
        machine=environment.in_words(platform),
        versions={**environment.versions(platform), "comfyui": comfyui_version.__version__},
        rows=rows,
        notes=[NOT_MEASURED],
    )
