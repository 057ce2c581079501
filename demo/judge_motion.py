"""Does a clip show what its caption says? Judged by the path of its shapes and by comparing frames with drawings.

    python -m attention_backends.demo.judge_motion --captions 64

The background is the median of the border of all frames. Each pixel is taken for the background or for the nearest
of the known colours; of the pixels of one colour, the middle in each frame makes the path. A straight line through
the path tells direction and speed, its first point the start. The shape is the one whose drawings are nearest, summed
over the frames. Of two shapes that cross, shape and direction of each are judged; start and speed are not said.

Boundary: torch; it reads the weights and samples them.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .captions import BACKGROUNDS, COLOURS, DEFAULT_BACKGROUND, MARGIN, POSITIONS, SIZES, cover, encode
from .evaluate import WINDOW, nearest
from .latents import latent_to_rgb
from .model import VIDEO_WEIGHTS, Attention, TinyWan, load, sdpa
from .motion import CLIP_SHAPES, CLIP_SIZES, DIRECTIONS, FRAMES, SPEEDS, Clip, random_clip, starts
from .sampling import sample, seed_noise

LEAST_PIXELS = 5  # of one colour in one frame; fewer are taken for stray ones
LEAST_MOVE = 0.35  # of the way of a slow shape; less is no motion
BATCH = 2


class Seen(NamedTuple):
    """What one colour of a clip does. direction, speed and start are None where it does not move along an axis."""

    shape: str
    size: str
    direction: str | None
    speed: str | None
    start: str | None


@cache
def drawings(side: int) -> tuple[list[tuple[str, str]], Tensor]:
    """(shape, size) of each drawing and the drawings (count, 1, 31, 31), their middles at the corner of a cell."""
    labels = [(shape, size) for shape in CLIP_SHAPES for size in CLIP_SIZES]
    middle = (WINDOW + 1) / 2 / WINDOW
    drawn = [cover(shape, middle, middle, SIZES[size] * side / WINDOW, WINDOW, WINDOW) for shape, size in labels]
    return labels, torch.stack(drawn)[:, None]


def paint(rgb: Tensor) -> tuple[str, Tensor]:
    """The background's name, and for each pixel of a clip (frames, height, width, 3) the index of its colour or -1."""
    border = torch.cat([rgb[:, 0], rgb[:, -1], rgb[:, :, 0], rgb[:, :, -1]], dim=1)
    ground = border.flatten(0, 1).median(0).values
    background = nearest(ground, BACKGROUNDS)
    palette = torch.cat([ground[None], torch.tensor(list(COLOURS.values()))])
    distance = (rgb[..., None, :] - palette).square().sum(-1)
    return background, distance.argmin(-1) - 1


def follow(rgb: Tensor, painted: Tensor, colour: str) -> Seen | None:
    """What the shape of a colour does in a clip; None where fewer than half of the frames show it."""
    frames, height, width = painted.shape
    short = min(height, width)
    mask = painted == list(COLOURS).index(colour)
    shown = [frame for frame in range(frames) if int(mask[frame].sum()) >= LEAST_PIXELS]
    if len(shown) < max(2, frames / 2):
        return None
    shape, size = _shape(rgb, mask[shown], shown, colour)
    places = torch.stack([mask[frame].nonzero().float().mean(0).flip(0) + 0.5 for frame in shown]) / short
    middle = torch.tensor([width, height]) / short / 2
    units = (places - middle) / (middle - SIZES[size] - MARGIN)  # those of `captions.POSITIONS`
    at = torch.tensor(shown, dtype=torch.float32)
    slope = ((at - at.mean())[:, None] * (units - units.mean(0))).sum(0) / (at - at.mean()).square().sum()
    moved = slope * (FRAMES - 1)
    first = units.mean(0) - slope * at.mean()
    direction = max(DIRECTIONS, key=lambda name: float(moved @ torch.tensor(DIRECTIONS[name]).float()))
    along = float(moved @ torch.tensor(DIRECTIONS[direction]).float())
    across = float(moved.abs().sum()) - along
    if along < LEAST_MOVE * SPEEDS["slowly"] or across > along / 2:
        return Seen(shape, size, None, None, None)
    speed = min(SPEEDS, key=lambda name: abs(SPEEDS[name] - along))
    start = min(
        starts(direction, speed), key=lambda name: float((torch.tensor(POSITIONS[name]) - first).square().sum())
    )
    far = max(abs(float(a) - b) for a, b in zip(first, POSITIONS[start], strict=True))
    return Seen(shape, size, direction, speed, start if far < 0.6 else None)


def _shape(rgb: Tensor, mask: Tensor, shown: list[int], colour: str) -> tuple[str, str]:
    """Shape and size of the drawings that are nearest to the frames, each where its pixels are."""
    labels, drawn = drawings(min(mask.shape[1:]))
    ground = torch.cat([rgb[:, 0], rgb[:, -1]]).flatten(0, -2).median(0).values
    axis = torch.tensor(COLOURS[colour]) - ground
    covered = ((rgb[shown] - ground) @ axis / axis.square().sum().clamp(min=1e-6)).clamp(0, 1)
    near = F.max_pool2d(mask.float()[:, None], 3, stride=1, padding=1)  # what another shape covers counts for neither
    match = F.conv2d(covered[:, None] * near, drawn, padding=WINDOW // 2)
    distance = drawn.square().sum((1, 2, 3)) - 2 * match.flatten(2).max(-1).values
    return labels[int(distance.sum(0).argmin())]


def score(clip: Clip, rgb: Tensor) -> dict[str, bool]:
    """What of a caption a clip (frames, height, width, 3) in 0..1 shows.

    Keys: "shape", "colour", "direction", "background", and for one shape also "size", "speed" and "start". Of two
    shapes each must be right. "colour": each is there, and no other colour has more pixels.
    """
    background, painted = paint(rgb)
    seen = [follow(rgb, painted, mover.colour) for mover in clip.movers]
    pairs = list(zip(seen, clip.movers, strict=True))
    pixels = {name: int((painted == index).sum()) for index, name in enumerate(COLOURS)}
    most = set(sorted(COLOURS, key=lambda name: -pixels[name])[: len(clip.movers)])
    right = {
        "background": background == (clip.background or DEFAULT_BACKGROUND),
        "colour": all(seen) and most == {mover.colour for mover in clip.movers},
        "shape": all(found is not None and found.shape == mover.shape for found, mover in pairs),
        "direction": all(found is not None and found.direction == mover.direction for found, mover in pairs),
    }
    if len(clip.movers) == 1:
        mover, found = clip.movers[0], seen[0]
        for name in ("size", "speed", "start"):
            right[name] = found is not None and getattr(found, name) == getattr(mover, name)
    return right


def both(right: dict[str, bool]) -> bool:
    """Shape and direction: what the model card counts."""
    return right["shape"] and right["direction"]


def clips(
    model: TinyWan,
    wanted: list[Clip],
    side: int = 32,
    guidance: float = 4.0,
    seed: int = 0,
    steps: int = 20,
    attention: Attention = sdpa,
) -> Tensor:
    """Samples (count, 8, side, side, 3) of clips, each from its own noise."""
    noise = seed_noise(seed, len(wanted), FRAMES, side, side).split(BATCH)
    context = torch.stack([encode(clip.caption()) for clip in wanted]).split(BATCH)
    made = [
        latent_to_rgb(sample(model, n, c, torch.zeros_like(c), steps, guidance, attention))
        for n, c in zip(noise, context, strict=True)
    ]
    return torch.cat(made)


def table(wanted: list[Clip], rgb: Tensor) -> dict[str, tuple[int, int]]:
    """How many are right, of how many, by what is judged; two shapes apart."""
    counts: dict[str, list[bool]] = defaultdict(list)
    for clip, film in zip(wanted, rgb, strict=True):
        kind = "one shape" if len(clip.movers) == 1 else "two shapes"
        right = score(clip, film)
        counts["shape and direction"].append(both(right))
        counts[f"{kind}: shape and direction"].append(both(right))
        for name, value in right.items():
            counts[f"{kind}: {name}"].append(value)
    return {name: (sum(values), len(values)) for name, values in sorted(counts.items(), key=_order)}


def _order(item: tuple[str, object]) -> tuple[bool, bool, str]:
    name = item[0]
    return ":" in name, name.startswith("two"), name


def spoiled(count: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Films that a judge must fail: of another caption, played backwards, stopped at the first frame."""
    order = [*range(1, count), 0]
    return {
        "of another caption": lambda rgb: rgb[order],
        "played backwards": lambda rgb: rgb.flip(1),
        "stopped": lambda rgb: rgb[:, :1].expand_as(rgb),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge clips of the embedded video model by their captions.")
    parser.add_argument("--weights", type=Path, default=VIDEO_WEIGHTS)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)  # noqa: S311
    wanted = [random_clip(rng) for _ in range(options.captions)]
    rgb = clips(load(options.weights), wanted, options.size, options.guidance, options.seed, options.steps)
    print("| judged | right | of |\n|---|---|---|")
    for name, (right, count) in table(wanted, rgb).items():
        print(f"| {name} | {100 * right / count:.0f} % | {count} |")
    for name, spoil in spoiled(len(wanted)).items():
        right, count = table(wanted, spoil(rgb))["shape and direction"]
        print(f"| {name}: shape and direction | {100 * right / count:.0f} % | {count} |")


if __name__ == "__main__":
    main()
