"""What the embedded video model can be asked for: captions of moving shapes, and the clips that they mean.

A caption is a phrase such as "a small red circle moving right slowly from the left on black", or two shapes that
cross: "a red circle moving right and a blue square moving left". Words, colours, shapes and backgrounds are those of
`captions`. A clip is a row of latent frames; speeds are per frame, so a shorter clip is the start of a longer one.

Boundary: torch and the standard library; no files, no model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from .captions import BACKGROUNDS, COLOURS, DEFAULT_BACKGROUND, MARGIN, POSITIONS, SIZES, cover
from .model import PATCH

FRAMES = 8  # of a whole clip
CLIP_SHAPES = ("circle", "square", "triangle", "ring", "cross")  # those that few cells can show
CLIP_SIZES = ("small", "medium")  # a large shape has no room to move
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
# How far a shape moves in a clip of 8 frames, in units of `captions.POSITIONS`: from one edge to the other is 2.
SPEEDS = {"slowly": 0.8, "fast": 1.8}


@dataclass(frozen=True)
class Mover:
    """One moving shape. start: a key of `captions.POSITIONS`."""

    colour: str
    shape: str
    size: str
    direction: str
    speed: str
    start: str

    def place(self, frame: int) -> tuple[float, float]:
        """Where it is in a frame (from 0 on), in units of `captions.POSITIONS`."""
        moved = SPEEDS[self.speed] * frame / (FRAMES - 1)
        (x, y), (along_x, along_y) = POSITIONS[self.start], DIRECTIONS[self.direction]
        return x + along_x * moved, y + along_y * moved


@dataclass(frozen=True)
class Clip:
    """One mover, or two that cross, of which the first passes in front."""

    movers: tuple[Mover, ...]
    background: str | None = None

    def caption(self) -> str:
        """The phrase that `captions.encode` takes. Of two movers it does not say size, speed and start."""
        background = f" on {self.background}" if self.background else ""
        if len(self.movers) == 2:
            phrases = (f"a {mover.colour} {mover.shape} moving {mover.direction}" for mover in self.movers)
            return " and ".join(phrases) + background
        mover = self.movers[0]
        start = mover.start.replace("in ", "").replace("on ", "").replace("at ", "")
        return (
            f"a {mover.size} {mover.colour} {mover.shape} moving {mover.direction} {mover.speed} "
            f"from {start}{background}"
        )


def starts(direction: str, speed: str) -> list[str]:
    """The positions that a mover can start from and stay in the picture; a slow one also from the middle."""
    along_x, along_y = DIRECTIONS[direction]
    at = {name: x * along_x + y * along_y for name, (x, y) in POSITIONS.items()}
    return [name for name, along in at.items() if along == -1 or (along == 0 and speed == "slowly")]


def random_clip(rng: random.Random, crossing: float = 0.15) -> Clip:
    """Any clip; `crossing`: the share of clips with two shapes. One background in three is left out."""
    background = rng.choice(list(BACKGROUNDS)) if rng.random() < 0.67 else None
    if rng.random() < crossing:
        colours, shapes = rng.sample(list(COLOURS), 2), rng.sample(CLIP_SHAPES, 2)
        directions = rng.sample(list(DIRECTIONS), 2)
        pairs = zip(colours, shapes, directions, strict=True)
        return Clip(tuple(crossing_mover(*pair) for pair in pairs), background)
    direction, speed = rng.choice(list(DIRECTIONS)), rng.choice(list(SPEEDS))
    mover = Mover(
        rng.choice(list(COLOURS)),
        rng.choice(CLIP_SHAPES),
        rng.choice(CLIP_SIZES),
        direction,
        speed,
        rng.choice(starts(direction, speed)),
    )
    return Clip((mover,), background)


def crossing_mover(colour: str, shape: str, direction: str) -> Mover:
    """One of two movers that meet in the middle: small and fast, from the middle of its edge."""
    edge = {"right": "on the left", "left": "on the right", "up": "at the bottom", "down": "at the top"}[direction]
    return Mover(colour, shape, "small", direction, "fast", edge)


def draw_clip(clip: Clip, frames: int, height: int, width: int) -> Tensor:
    """The clip as RGB (3, frames, height, width) in 0..1, antialiased.

    A middle is at the corner of a patch, so a shape moves by whole patches and always has the same outline: the model
    learns each outline once, not for each part of a patch.
    """
    short = min(height, width)
    ground = torch.tensor(BACKGROUNDS[clip.background or DEFAULT_BACKGROUND])
    pictures = []
    for frame in range(frames):
        picture = ground[:, None, None].expand(3, height, width)
        for mover in reversed(clip.movers):
            radius = SIZES[mover.size]
            x, y = (
                side / short / 2 + (side / short / 2 - radius - MARGIN) * at
                for side, at in zip((width, height), mover.place(frame), strict=True)
            )
            step = PATCH[-1] / short
            x, y = round(x / step) * step, round(y / step) * step
            covered = cover(mover.shape, x, y, radius, height, width)
            picture = picture + (torch.tensor(COLOURS[mover.colour])[:, None, None] - picture) * covered
        pictures.append(picture)
    return torch.stack(pictures, dim=1)
