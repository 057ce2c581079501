"""Train the embedded model: flow matching on pictures that are drawn as they are needed.

    python -m attention_backends.demo.train --work DIR
    python -m attention_backends.demo.train --work DIR --from-weights FILE
    python -m attention_backends.demo.train --work DIR --video
    python -m attention_backends.demo.train --work DIR --video --from-weights FILE

The second form runs only the last stage, from the weights in FILE: with a fresh optimiser, warmed up, because a
released file holds no other state. The third trains the video model, from the released image model's weights through
all its stages; the fourth only its last stage. Training waits while a benchmark of this project runs. Nothing is
downloaded.
Everything is written to the work directory: the checkpoint, from which training resumes, sheets of samples, and at
the end the averaged weights as float16 and the loss curve. Compare them with `demo.evaluate` (of clips, with
`demo.judge_motion`) before they replace the files in demo/. Each step has its own random generator, seeded by the
seed and the number of the step, so a resumed run sees the same data as one that was not stopped.

Boundary: a program for a person. Nothing imports it.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, autocast, nn

from .captions import SHAPES, draw, encode, random_scene
from .latents import latent_to_rgb, rgb_to_latent
from .model import VIDEO_WEIGHTS, WEIGHTS, TinyWan, WanBlock, load
from .motion import draw_clip, random_clip
from .pause import wait
from .sampling import TIMESTEPS, sample, seed_noise, shifted

TOKENS = 2048  # patches of latent in one step
WARM_UP, WARM_UP_AGAIN = 300, 50  # steps, at the start and when continuing from a released file
CAPTION_DROPOUT = 0.1
# In pure noise, what a caption leaves open is an error that no model can avoid: after 5,000 steps the loss was 0.02 for
# full captions, 0.09 with size or place open, 0.37 when dropped. Such pictures weigh less: their noise would drown
# what the others teach about shapes.
# The weight depends only on the caption, so the best prediction for each caption stays the same.
DROPPED_WEIGHT, OPEN_WEIGHT = 0.05, 0.25
# The shapes of the last stage: more often those that looked alike after the others.
OFTEN = (*SHAPES, "diamond", "heart", *("square", "star", "cross") * 2)
NEAR_WEIGHT = 6.0  # of cells in and around a moving shape, see `near_shapes`
AVERAGE = 0.999  # decay of the moving average of the weights


class Stage(NamedTuple):
    """Some steps at latent sizes (frames, height, width) drawn by chance; `rate`: first and last learning rate."""

    steps: int
    sizes: tuple[tuple[int, int, int], ...]
    rate: tuple[float, float]


MIXED = ((1, 32, 32), (1, 32, 32), (1, 32, 32), (1, 24, 24), (1, 16, 16))
STAGES = (
    Stage(2000, ((1, 16, 16),), (1e-3, 1e-3)),
    Stage(1500, MIXED, (1e-3, 1e-3)),
    Stage(1500, MIXED, (6e-4, 0)),
    Stage(5500, ((1, 32, 32),) * 14 + ((1, 24, 24), (1, 16, 16)), (6e-4, 0)),
)
VIDEO_STAGES = (
    Stage(1000, ((4, 16, 16),), (1e-3, 1e-3)),
    Stage(1000, ((8, 16, 16),), (1e-3, 9e-4)),
    Stage(1500, ((8, 32, 32),) * 3 + ((8, 16, 16),), (9e-4, 1e-4)),
    # A step has one clip of 8 frames, or four of 2: those show more outlines in the same time.
    Stage(4500, ((8, 32, 32),) * 2 + ((4, 32, 32),) + ((2, 32, 32),) * 3, (8e-4, 0)),
)


def stage_at(step: int, stages: Sequence[Stage] = STAGES) -> tuple[Stage, float]:
    """The stage that a step belongs to, and how much of that stage is done (0..1)."""
    for stage in stages:
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
    nn.init.normal_(cast(nn.Linear, model.text_embedding[0]).weight, std=0.1)
    for layer in (cast(nn.Linear, model.time_projection[1]), model.head.head):
        nn.init.zeros_(layer.weight)
    for block in cast("Iterable[WanBlock]", model.blocks):
        block.modulation.data[:, [2, 5]] = 1.0


def make_batch(seed: int, step: int, stages: Sequence[Stage] = STAGES) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a step learns from, of pictures or, at more than one frame, of clips.

    Returns latents and noise (batch, 16, frames, height, width), times (batch,), captions (batch, 16, 4096) and
    weights (batch,).
    """
    rng = random.Random(f"{seed} {step}")  # noqa: S311
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    stage, _ = stage_at(step, stages)
    frames, height, width = rng.choice(stage.sizes)
    batch = max(1, TOKENS // (frames * height * width // 4))
    if frames == 1:
        examples = [_picture(rng, OFTEN if stage is STAGES[-1] else SHAPES, height, width) for _ in range(batch)]
    else:
        examples = [_clip(rng, frames, height, width) for _ in range(batch)]
    pictures, captions, weights = zip(*examples, strict=True)
    # One time in each equal part of 0..1: less noise in the loss than independent times.
    times = shifted((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch)
    latents = rgb_to_latent(torch.stack(pictures))
    noise = torch.randn(latents.shape, generator=generator)
    return latents, noise, times, torch.stack([encode(caption) for caption in captions]), torch.tensor(weights)


def near_shapes(latents: Tensor) -> Tensor:
    """How much each cell of clips counts (batch, 1, frames, height, width): more where a shape is, or was drawn near.

    A shape takes a tenth of the cells, and its outline fewer. Where it is depends on the caption alone, so the best
    prediction for each caption stays the same. Pictures are not weighted: chance moves their shapes a little.
    """
    if latents.shape[2] == 1:
        return torch.ones(())
    rgb = latent_to_rgb(latents).movedim(-1, 1)
    shape = (rgb - rgb.flatten(3).median(-1).values[..., None, None]).abs().amax(1, keepdim=True) > 0.05
    near = F.max_pool3d(shape.float(), (1, 5, 5), stride=1, padding=(0, 2, 2))
    return 1 + (NEAR_WEIGHT - 1) * near


def _picture(rng: random.Random, shapes: Sequence[str], height: int, width: int) -> tuple[Tensor, str, float]:
    scene = random_scene(rng, shapes)
    picture = draw(scene, height, width, rng)[:, None]
    if rng.random() < CAPTION_DROPOUT:
        return picture, "", DROPPED_WEIGHT
    return picture, scene.caption(), 1.0 if scene.size and scene.position else OPEN_WEIGHT


def _clip(rng: random.Random, frames: int, height: int, width: int) -> tuple[Tensor, str, float]:
    clip = random_clip(rng)
    drawn = draw_clip(clip, frames, height, width)
    if rng.random() < CAPTION_DROPOUT:
        return drawn, "", DROPPED_WEIGHT
    return drawn, clip.caption(), 1.0


def learning_rate(step: int, begin: int, spent: float = 0.0, stages: Sequence[Stage] = STAGES) -> float:
    """Warm-up after the step that training begins at, then what the stage says; `spent`: share of the time (0..1)."""
    stage, done = stage_at(step, stages)
    first, last = stage.rate
    warm_up = WARM_UP_AGAIN if begin else WARM_UP
    return min(1.0, (step - begin + 1) / warm_up) * (first + (last - first) * max(done, spent))


def attend(query: Tensor, key: Tensor, value: Tensor, *, role: str, block: int) -> Tensor:
    """Attention with gradients on a CPU: plain products are a seventh faster in bfloat16, SDPA a third in float32."""
    if not fast_bfloat16():
        return F.scaled_dot_product_attention(query, key, value)
    weights: Tensor = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    return weights.to(value.dtype) @ value


SHEET = (
    "a large red circle on the left",
    "a small blue square at the top right",
    "a medium green triangle in the centre on black",
    "a large yellow star at the bottom on grey",
    "a large purple heart on the right on beige",
    "a medium orange ring at the top left",
    "a small pink diamond at the bottom left on black",
    "a large cyan cross in the centre",
)
VIDEO_SHEET = (
    "a medium red circle moving right fast from the left",
    "a small blue square moving down slowly from the top right on black",
    "a medium green triangle moving left slowly from the centre on grey",
    "a red cross moving right and a blue ring moving left",
)


def save_sheet(model: TinyWan, path: Path, frames: int, height: int, width: int) -> None:
    """Samples to be looked at: a row of pictures, or at more than one frame a row of frames for each clip."""
    from PIL import Image

    captions = SHEET if frames == 1 else VIDEO_SHEET
    context = torch.stack([encode(caption) for caption in captions])
    noise = seed_noise(0, len(captions), frames, height, width)
    with products():
        pictures = latent_to_rgb(sample(model, noise, context, torch.zeros_like(context), attention=attend))
    rows = pictures.movedim(1, 0) if frames == 1 else pictures
    padded = F.pad(rows, (0, 0, 1, 1, 1, 1), value=0.5)
    row = torch.cat([torch.cat(list(pictures), dim=1) for pictures in padded])
    sheet = Image.fromarray((row * 255).round().byte().numpy())
    scale = max(1, 160 // height)
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)


def products() -> autocast:
    """Products in bfloat16 where the CPU has units for it: half the time there, ten times as long elsewhere."""
    return autocast("cpu", torch.bfloat16, enabled=fast_bfloat16())


@cache
def fast_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


def save_curve(losses: list[float], begin: int, path: Path, stages: Sequence[Stage] = STAGES) -> None:
    """The loss of every step from `begin` on, and its running mean, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), dpi=90)
    axes.plot(range(begin, begin + len(losses)), losses, color="0.8", linewidth=0.5, label="each step")
    window = max(1, len(losses) // 100)
    smooth = torch.tensor(losses).unfold(0, window, 1).mean(1)
    axes.plot(range(begin + window - 1, begin + len(losses)), smooth, color="C0", label=f"mean of {window}")
    start = 0
    for stage in stages:
        label = ", ".join(" x ".join(map(str, size[size[0] == 1 :])) for size in sorted(set(stage.sizes)))
        if start >= begin:
            axes.axvline(start, color="C1", linewidth=0.8)
            axes.text(start, 0.98, " " + label, transform=axes.get_xaxis_transform(), fontsize=6, va="top")
        start += stage.steps
    axes.set(yscale="log", xlabel="step", ylabel="flow matching loss (MSE)")
    axes.legend(loc="lower left", fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def train(
    work: Path,
    seed: int,
    every: int,
    weights: Path | None = None,
    minutes: float | None = None,
    stages: Sequence[Stage] | None = None,
    name: str = WEIGHTS.name,
) -> None:
    """Train from the checkpoint in `work`, from `weights` at the last stage, or from the start, to the end.

    `stages`: those of the video model; without `weights` from the released image model's. `name`: of the file written.
    With `minutes`, training also ends after so many (over all resumed runs), and the rate falls in that time.
    """
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / "checkpoint.pt"
    video = stages is not None
    stages = STAGES if stages is None else stages
    total = sum(stage.steps for stage in stages)
    torch.manual_seed(seed)
    model = TinyWan()
    initialise(model)
    begin = 0
    if weights is not None or video:
        model = load(weights or WEIGHTS).requires_grad_(True).train()
    if weights is not None:
        begin = total - stages[-1].steps
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    losses: list[float] = []
    before = 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        losses, begin, before = state["losses"], state["begin"], state["seconds"]
        print(f"resumed at step {begin + len(losses)}")
    began = time.perf_counter() - before
    for step in range(begin + len(losses), total):
        began += wait()
        seconds = time.perf_counter() - began
        spent = seconds / (60 * minutes) if minutes else 0.0
        latents, noise, times, context, weight = make_batch(seed, step, stages)
        level = times.view(-1, 1, 1, 1, 1)
        with products():
            flow = model((1 - level) * latents + level * noise, times * TIMESTEPS, context, attend)
        error = ((flow.float() - (noise - latents)).square() * near_shapes(latents)).mean((1, 2, 3, 4))
        loss = (weight * error).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, begin, min(1.0, spent), stages)
        optimizer.step()
        keep = min(AVERAGE, (len(losses) + 1) / (len(losses) + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        losses.append(loss.item())
        done = step + 1
        if done % 50 == 0:
            recent = sum(losses[-50:]) / 50
            print(f"{done}/{total} loss {recent:.4f} {seconds:.0f} s", flush=True)
        last = done == total or spent >= 1
        if done % every == 0 or last:
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "losses": losses,
                "begin": begin,
                "seconds": seconds,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
            save_sheet(average, work / f"samples-{done:06}.png", *stage_at(step, stages)[0].sizes[0])
        if last:
            break
    save_curve(losses, begin, work / "loss.png", stages)
    save_weights(average, work / name, seed, begin + len(losses))


def save_weights(model: TinyWan, path: Path, seed: int, steps: int) -> None:
    """Write the weights as float16, the form that the repository holds."""
    from safetensors.torch import save_file

    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    notes = {"format": "pt", "license": "Apache-2.0", "seed": str(seed), "steps": str(steps)}
    save_file(weights, path, metadata=notes)
    print(f"wrote {path}: {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints and samples")
    parser.add_argument("--from-weights", type=Path, help="released file to run the last stage from")
    parser.add_argument("--video", action="store_true", help="train the video model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--minutes", type=float, help="end after so long, with the learning rate falling in time")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kind = (VIDEO_STAGES, VIDEO_WEIGHTS.name) if options.video else ()
    train(options.work, options.seed, options.every, options.from_weights, options.minutes, *kind)


if __name__ == "__main__":
    main()
