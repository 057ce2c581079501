"""Train the embedded model: flow matching on pictures that are drawn as they are needed.

    python -m attention_backends.demo.train --work DIR

Nothing is downloaded. The work directory holds the checkpoint, from which training resumes, and sheets of
samples. Each step has its own random generator, seeded by the seed and the number of the step, so a resumed
run sees the same data as one that was not stopped. At the end the averaged weights are written as float16 to
demo/weights/ and the loss curve to demo/loss.png.

Boundary: a program for a person. Nothing imports it.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .captions import draw, encode, random_scene
from .latents import latent_to_rgb, rgb_to_latent
from .model import WEIGHTS, TinyWan
from .sampling import TIMESTEPS, sample, seed_noise, shifted

TOKENS = 2048  # patches of latent in one step
WARM_UP = 300  # steps
CAPTION_DROPOUT = 0.1
AVERAGE = 0.999  # decay of the moving average of the weights


class Stage(NamedTuple):
    """Some steps at latent sizes (height, width) drawn by chance; `rate`: first and last learning rate."""

    steps: int
    sizes: tuple[tuple[int, int], ...]
    rate: tuple[float, float]


MIXED = ((32, 32), (32, 32), (32, 32), (24, 24), (16, 16))
STAGES = (
    Stage(2000, ((16, 16),), (1e-3, 1e-3)),
    Stage(1500, MIXED, (1e-3, 1e-3)),
    Stage(1500, MIXED, (6e-4, 0)),
)


def stage_at(step: int) -> tuple[Stage, float]:
    """The stage that a step belongs to, and how much of that stage is done (0..1)."""
    for stage in STAGES:
        if step < stage.steps:
            return stage, step / stage.steps
        step -= stage.steps
    raise ValueError(f"step {step} is after the last stage")


def initialise(model: TinyWan) -> None:
    """Start with the gates of the blocks open and the output zero."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith((".o", "ffn.2")):
                module.weight.data /= (3 * len(model.blocks)) ** 0.5
    nn.init.normal_(model.text_embedding[0].weight, std=0.1)
    for layer in (model.time_projection[1], model.head.head):
        nn.init.zeros_(layer.weight)
    for block in model.blocks:
        block.modulation.data[:, [2, 5]] = 1.0


def make_batch(seed: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, noise (batch, 16, 1, height, width), times (batch,), captions (batch, 16, 4096)."""
    rng = random.Random(f"{seed} {step}")  # noqa: S311
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    stage, _ = stage_at(step)
    height, width = rng.choice(stage.sizes)
    batch = TOKENS // (height * width // 4)
    scenes = [random_scene(rng) for _ in range(batch)]
    pictures = torch.stack([draw(scene, height, width, rng) for scene in scenes])[:, :, None]
    captions = ["" if rng.random() < CAPTION_DROPOUT else scene.caption() for scene in scenes]
    # One time in each equal part of 0..1: less noise in the loss than independent times.
    times = shifted((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch)
    latents = rgb_to_latent(pictures)
    noise = torch.randn(latents.shape, generator=generator)
    return latents, noise, times, torch.stack([encode(caption) for caption in captions])


def learning_rate(step: int) -> float:
    """Warm-up at the start, then what the stage says."""
    stage, done = stage_at(step)
    first, last = stage.rate
    return min(1.0, (step + 1) / WARM_UP) * (first + (last - first) * done)


def save_sheet(model: TinyWan, path: Path, height: int, width: int) -> None:
    """A sheet of samples, to be looked at: eight captions, two seeds each."""
    from PIL import Image

    captions = (
        "a large red circle on the left",
        "a small blue square at the top right",
        "a medium green triangle in the centre on black",
        "a large yellow star at the bottom on grey",
        "a large purple heart on the right on beige",
        "a medium orange ring at the top left",
        "a small pink diamond at the bottom left on black",
        "a large cyan cross in the centre",
    )
    context = torch.stack([encode(caption) for caption in captions]).repeat(2, 1, 1)
    noise = seed_noise(0, 16, 1, height, width)
    pictures = latent_to_rgb(sample(model, noise, context, torch.zeros_like(context)))[:, 0]
    rows = [torch.cat(list(F.pad(row, (0, 0, 1, 1, 1, 1), value=0.5)), dim=1) for row in pictures.split(8)]
    sheet = Image.fromarray((torch.cat(rows) * 255).round().byte().numpy())
    scale = max(1, 160 // height)
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)


def save_curve(losses: list[float], path: Path) -> None:
    """The loss of every step, and its running mean, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), dpi=90)
    axes.plot(losses, color="0.8", linewidth=0.5, label="each step")
    window = max(1, len(losses) // 100)
    smooth = torch.tensor(losses).unfold(0, window, 1).mean(1)
    axes.plot(range(window - 1, len(losses)), smooth, color="C0", label=f"mean of {window}")
    start = 0
    for stage in STAGES:
        label = ", ".join(f"{height} x {width}" for height, width in sorted(set(stage.sizes)))
        axes.axvline(start, color="C1", linewidth=0.8)
        axes.text(start, 0.98, " " + label, transform=axes.get_xaxis_transform(), fontsize=6, va="top")
        start += stage.steps
    axes.set(yscale="log", xlabel="step", ylabel="flow matching loss (MSE)")
    axes.legend(loc="center right", fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def train(work: Path, seed: int, every: int) -> None:
    """Train from the checkpoint in `work`, or from the start, to the end of the last stage."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / "checkpoint.pt"
    total = sum(stage.steps for stage in STAGES)
    torch.manual_seed(seed)
    model = TinyWan()
    initialise(model)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    losses: list[float] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
        print(f"resumed at step {len(losses)}")
    began = time.perf_counter()
    for step in range(len(losses), total):
        latents, noise, times, context = make_batch(seed, step)
        level = times.view(-1, 1, 1, 1, 1)
        # The products in bfloat16: half the time on CPUs that have it, and the weights stay float32.
        with torch.autocast("cpu", torch.bfloat16):
            flow = model((1 - level) * latents + level * noise, times * TIMESTEPS, context)
        loss = F.mse_loss(flow.float(), noise - latents)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        keep = min(AVERAGE, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        losses.append(loss.item())
        done = step + 1
        if done % 50 == 0:
            recent = sum(losses[-50:]) / 50
            print(f"{done}/{total} loss {recent:.4f} {time.perf_counter() - began:.0f} s", flush=True)
        if done % every == 0 or done == total:
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "losses": losses,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
            save_sheet(average, work / f"samples-{done:06}.png", *stage_at(step)[0].sizes[0])
    save_curve(losses, Path(__file__).parent / "loss.png")
    save_weights(average, seed, total)


def save_weights(model: TinyWan, seed: int, steps: int) -> None:
    """Write the weights as float16, the form that the repository holds."""
    from safetensors.torch import save_file

    WEIGHTS.parent.mkdir(exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(
        weights, WEIGHTS, metadata={"format": "pt", "license": "Apache-2.0", "seed": str(seed), "steps": str(steps)}
    )
    print(f"wrote {WEIGHTS.name}: {WEIGHTS.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints and samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.work, options.seed, options.every)


if __name__ == "__main__":
    main()
