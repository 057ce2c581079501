"""A whole model in ComfyUI: the embedded model as stock ComfyUI runs it, against the same with our node before it.

Run: python benchmarks/sampling.py [--flag FLAG]   (needs a ComfyUI; about a minute)

FLAG is one of ComfyUI's, such as --use-pytorch-cross-attention; without it stock is what ComfyUI chooses on a CPU.
Model calls alternate in one process, with the marks on the model taken off for stock.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import comfy_location  # noqa: E402
import conftest  # noqa: E402, F401  # loads this folder as the package attention_backends
import tiny_sampling  # noqa: E402
import torch  # noqa: E402
from paired import machine, ratios, training_paused  # noqa: E402

LATENTS = {2048: (64, 128), 4096: (128, 128)}
"""Tokens, and the height and width of a latent that has them: a patch is 2 x 2."""


def measure(rounds: int = 15, sizes: tuple[int, ...] = tuple(LATENTS)) -> dict[str, Any]:
    """Model calls of the embedded model at each size; `prepare` of tiny_sampling came before."""
    import comfy.ldm.modules.attention as comfy_attention
    import comfy.sd
    from attention_backends.demo.model import WEIGHTS
    from attention_backends.nodes.hook import patch
    from attention_backends.nodes.hook import run as sampling

    patcher = comfy.sd.load_diffusion_model(str(WEIGHTS))
    model = patcher.model
    patched = patch.set_default(patcher, "auto", accuracy="exact", strict=False, guard="off")
    options = patched.model_options["transformer_options"]
    run = sampling.Run(options[sampling.KEY])
    text, sigma = torch.randn(2, 16, 4096), torch.tensor([0.7, 0.7])
    base = {"cond_or_uncond": [0, 1], "sigmas": sigma, "sample_sigmas": torch.tensor([1.0, 0.7, 0.3, 0.0])}
    found: dict[str, Any] = {"stock": comfy_attention.optimized_attention.__name__}
    with torch.inference_mode():
        for tokens in sizes:
            latent = torch.randn(2, 16, 1, *LATENTS[tokens])

            def call(extra: dict[str, Any], latent: torch.Tensor = latent) -> None:
                model.apply_model(latent, sigma, c_crossattn=text, transformer_options={**base, **extra})

            def stock(call: Any = call) -> None:
                run.close()
                call({})

            def ours(call: Any = call) -> None:
                call({**options, sampling.RUN_KEY: run})

            found[f"{tokens} tokens"] = ratios(stock, ours, rounds)
    run.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flag", action="append", default=[], help="a flag of ComfyUI")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    comfyui = comfy_location.find_comfyui()
    if comfyui is None:
        raise SystemExit(comfy_location.why_no_comfyui())
    tiny_sampling.prepare(comfyui, *arguments.flag)
    logging.disable(logging.WARNING)
    torch.set_num_threads(2)
    print(json.dumps({"machine": machine(), "torch": torch.__version__, **measure(arguments.rounds)}, indent=2))


if __name__ == "__main__":
    with training_paused():
        main()
