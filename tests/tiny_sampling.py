"""Builds and samples the tiny models of tiny_models.py in a real ComfyUI on the CPU.

`prepare` comes first, once per process. Weights, conditioning and noise are random and depend on the seed only.
Sampling is ComfyUI's own: comfy.sample.sample, under inference mode as its executor does.
"""

from __future__ import annotations

import json
import sys
import threading
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tiny_models import FAMILIES

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_prepared: tuple[Path, tuple[str, ...]] | None = None


def prepare(comfy_path: Path, *flags: str) -> None:
    """Make `import comfy` work: CPU only, with the given command line flags of ComfyUI.

    ComfyUI reads its flags while it is imported, so a second call with another folder or other flags is an error.
    Torch gets one thread: for models this small, threads mostly wait for each other.
    """
    global _prepared
    wanted = (Path(comfy_path).resolve(), flags)
    if _prepared is not None:
        if _prepared != wanted:
            raise RuntimeError(
                f"ComfyUI is already imported from {_prepared[0]} with {_prepared[1]}; "
                f"use a new process for {wanted[0]} with {flags}"
            )
        return
    sys.path.insert(0, str(wanted[0]))
    argv, sys.argv = sys.argv, ["main.py", "--cpu", *flags]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = argv
    torch.set_num_threads(1)
    _prepared = wanted


def unavailable(name: str) -> str | None:
    """Why this ComfyUI cannot build the family, or None."""
    import comfy.supported_models
    import comfyui_version

    config = FAMILIES[name].config
    if hasattr(comfy.supported_models, config):
        return None
    return f"ComfyUI {comfyui_version.__version__} has no comfy.supported_models.{config}"


def build(name: str, seed: int = 0) -> ModelPatcher:
    """The family's model with random fp32 weights on the CPU. Raises LookupError if this ComfyUI lacks it."""
    import comfy.model_patcher
    import comfy.supported_models

    reason = unavailable(name)
    if reason:
        raise LookupError(reason)
    family = FAMILIES[name]
    config = getattr(comfy.supported_models, family.config)(dict(family.unet))
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    model = config.get_model({}, "", device=cpu)
    with torch.no_grad():
        family.shrink(model.diffusion_model)
        _fill(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def save(patcher: ModelPatcher, name: str, path: Path) -> None:
    """Write a .safetensors file that UNETLoader loads. Raises LookupError for a family that it cannot recognise."""
    from safetensors.torch import save_file

    family = FAMILIES[name]
    if not family.from_file:
        raise LookupError(f"ComfyUI cannot tell the dimensions of a tiny {name} from a file; use build()")
    weights = {key: tensor.contiguous() for key, tensor in patcher.model.diffusion_model.state_dict().items()}
    save_file(weights, path, metadata={"config": json.dumps({"transformer": family.unet})})


def _fill(model: torch.nn.Module, seed: int) -> None:
    """Weights that keep activations near unit size, so attention scores spread and outputs stay finite.

    Each tensor has a generator of its own, so adding a layer does not change the other layers.
    """
    model.requires_grad_(False).eval()
    for key, tensor in model.named_parameters():
        generator = torch.Generator().manual_seed(seed * 7919 + zlib.crc32(key.encode()))
        if tensor.ndim > 1:
            fan_in = tensor.numel() // tensor.shape[0]
            tensor.normal_(0.0, fan_in**-0.5, generator=generator)
        elif key.endswith("bias"):
            tensor.normal_(0.0, 0.05, generator=generator)
        else:
            tensor.normal_(1.0, 0.1, generator=generator)


def conditioning(name: str, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Random (positive, negative) conditioning, in the form that ComfyUI's nodes pass on."""
    family = FAMILIES[name]
    prompts = []
    for which in (1, 2):
        generator = torch.Generator().manual_seed(seed * 7919 + which)

        def rand(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        prompts.append([[rand(1, *family.text), family.extras(rand)]])
    return prompts[0], prompts[1]


_global_generator = threading.Lock()
"""Held while noise is made: ComfyUI seeds torch's global generator, which two threads would share."""


def sample(
    patcher: ModelPatcher,
    name: str,
    steps: int = 2,
    seed: int = 0,
    cfg: float | None = None,
    sampler: str = "euler",
    scheduler: str = "simple",
) -> torch.Tensor:
    """Sample an empty latent; returns the latent, for video with audio both flattened into one row.

    cfg None means the family's usual value.
    """
    import comfy.nested_tensor
    import comfy.sample

    family = FAMILIES[name]
    with torch.inference_mode():
        positive, negative = conditioning(name, seed)
        latents = [torch.zeros(shape) for shape in family.latents]
        empty = latents[0] if len(latents) == 1 else comfy.nested_tensor.NestedTensor(latents)
        with _global_generator:
            noise = comfy.sample.prepare_noise(empty, seed)
        out = comfy.sample.sample(
            patcher, noise, steps, family.cfg if cfg is None else cfg, sampler, scheduler, positive, negative, empty,
            disable_pbar=True, seed=seed,
        )  # fmt: skip
    if out.is_nested:
        return torch.cat([part.flatten() for part in out.unbind()])
    return out.clone()
