"""Does a sample show what its caption says? Judged by comparing it with drawings of every shape.

    python -m attention_backends.demo.evaluate --captions 64

The background is the median of the border. The colour is that of the pixels furthest from it. How far each pixel
is from background to colour says how much of it the shape covers, and of all shapes, sizes and places the drawing
nearest to this decides the rest. What a caption leaves open is not judged.

Boundary: torch; it reads the weights and samples them.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .captions import (
    BACKGROUNDS,
    COLOURS,
    DEFAULT_BACKGROUND,
    MARGIN,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    cover,
    encode,
    random_scene,
)
from .latents import latent_to_rgb
from .model import WEIGHTS, TinyWan, load
from .sampling import sample, seed_noise

BATCH = 16
WINDOW = 31  # pixels: the side of a template, odd, larger than a large shape at 32 x 32


def nearest(rgb: Tensor, named: dict[str, tuple[float, float, float]]) -> str:
    """The name of the colour that is nearest to rgb (3,)."""
    return min(named, key=lambda name: float((torch.tensor(named[name]) - rgb).square().sum()))


@cache
def templates(side: int) -> tuple[list[tuple[str, str]], Tensor]:
    """(shape, size) of each template and the templates (count, 1, 31, 31), moved by parts of a pixel."""
    labels, drawn = [], []
    for shape in SHAPES:
        for size, radius in SIZES.items():
            for x in (-0.25, 0.25):
                for y in (-0.25, 0.25):
                    middle = WINDOW / 2
                    place = (middle + x) / WINDOW, (middle + y) / WINDOW
                    labels.append((shape, size))
                    drawn.append(cover(shape, *place, radius * side / WINDOW, WINDOW, WINDOW))
    return labels, torch.stack(drawn)[:, None]


def judge(picture: Tensor) -> Scene:
    """What a square picture (side, side, 3) in 0..1 shows."""
    side = picture.shape[0]
    border = torch.cat([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    ground = border.median(0).values
    far = (picture - ground).square().sum(-1)
    colour = picture[far > 0.6 * far.max()].median(0).values
    axis = colour - ground
    covered = ((picture - ground) @ axis / axis.square().sum().clamp(min=1e-6)).clamp(0, 1)
    labels, drawn = templates(side)
    match = F.conv2d(covered[None, None], drawn, padding=WINDOW // 2)[0]
    distance = drawn.square().sum((1, 2, 3))[:, None, None] - 2 * match
    index, y, x = torch.unravel_index(distance.argmin(), distance.shape)
    shape, size = labels[int(index)]
    reach = 1 - 2 * (SIZES[size] + MARGIN)
    where = ((x + 0.5) / side * 2 - 1) / reach, ((y + 0.5) / side * 2 - 1) / reach
    position = min(
        POSITIONS, key=lambda name: sum(float(a - b) ** 2 for a, b in zip(where, POSITIONS[name], strict=True))
    )
    return Scene(nearest(colour, COLOURS), shape, size, position, nearest(ground, BACKGROUNDS))


def samples(model: TinyWan, scenes: list[Scene], side: int, guidance: float, seed: int, steps: int = 20) -> Tensor:
    """Pictures (count, side, side, 3) of scenes, each from its own noise."""
    noise = seed_noise(seed, len(scenes), 1, side, side).split(BATCH)
    context = torch.stack([encode(scene.caption()) for scene in scenes]).split(BATCH)
    pairs = zip(noise, context, strict=True)
    return torch.cat([latent_to_rgb(sample(model, n, c, torch.zeros_like(c), steps, guidance))[:, 0] for n, c in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge samples of the embedded model by their captions.")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)  # noqa: S311
    scenes = [random_scene(rng) for _ in range(options.captions)]
    pictures = samples(load(options.weights), scenes, options.size, options.guidance, options.seed)
    right: dict[str, list[bool]] = defaultdict(list)
    mistakes: Counter[str] = Counter()
    for scene, found in zip(scenes, map(judge, pictures), strict=True):
        wanted = {**vars(scene), "background": scene.background or DEFAULT_BACKGROUND}
        for name, value in wanted.items():
            if value is not None:
                right[name].append(value == getattr(found, name))
        right[f"shape: {scene.shape}"].append(scene.shape == found.shape)
        if scene.size:
            right[f"shape: {scene.size}"].append(scene.shape == found.shape)
        if scene.shape != found.shape:
            mistakes[f"{scene.shape} as {found.shape}"] += 1
    print("| judged | right | of |\n|---|---|---|")
    for name, hits in sorted(right.items(), key=lambda item: item[0].split(": ")):
        print(f"| {name} | {100 * sum(hits) / len(hits):.0f} % | {len(hits)} |")
    print("Mistaken shapes:", ", ".join(f"{name} ({count})" for name, count in mistakes.most_common()) or "none")


if __name__ == "__main__":
    main()
