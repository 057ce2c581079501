"""What the embedded model can be asked for: captions, their conditioning, and the pictures that they mean.

A caption is a short English phrase made of known words, such as "a large red circle on the left on black".
Its conditioning is a table look-up, one fixed vector for each word, instead of a text encoder. The renderer
draws the picture that a caption means; training pictures come from it.

Boundary: torch and the standard library; no files, no model.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..backends.values.bounded import shortened

TEXT_DIM = 4096
TOKENS = 16  # every caption is padded to this length with zeros, so that captions batch

SIZES = {"small": 0.15, "medium": 0.22, "large": 0.30}  # half the height, of the picture's shorter side
COLOURS = {
    "red": (0.90, 0.15, 0.17),
    "orange": (0.98, 0.55, 0.10),
    "yellow": (0.99, 0.85, 0.16),
    "green": (0.15, 0.66, 0.30),
    "cyan": (0.13, 0.78, 0.84),
    "blue": (0.13, 0.33, 0.90),
    "purple": (0.50, 0.20, 0.74),
    "pink": (0.99, 0.50, 0.73),
}
BACKGROUNDS = {
    "white": (0.97, 0.97, 0.97),
    "grey": (0.60, 0.62, 0.65),
    "black": (0.06, 0.06, 0.08),
    "beige": (0.95, 0.88, 0.74),
}
DEFAULT_BACKGROUND = "white"  # what a caption means that names none
# Where the shape is: -1 is left or top, 1 is right or bottom.
POSITIONS = {
    "in the centre": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "at the top left": (-1, -1),
    "at the top right": (1, -1),
    "at the bottom left": (-1, 1),
    "at the bottom right": (1, 1),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "ring", "cross")
MOTION_WORDS = ("moving", "up", "down", "slowly", "fast", "from", "and")  # of the video model, in `motion`
ALIASES = {"center": "centre", "gray": "grey"}
MARGIN = 0.05  # between a shape and the border of the picture
# How much size and place vary by chance. More than this blurs what a small model draws: see the model card.
SIZE_JITTER, PLACE_JITTER = 0.02, 0.005


def vocabulary() -> tuple[str, ...]:
    """All known words, sorted."""
    phrases = ["a", "on", *MOTION_WORDS, *SIZES, *COLOURS, *BACKGROUNDS, *POSITIONS, *SHAPES]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


@cache
def word_vector(word: str) -> Tensor:
    """The (4096,) vector of a word: +-1/16 by the bits of its SHAKE-256 digest, the same on any machine."""
    digest = bytearray(hashlib.shake_256(word.encode()).digest(TEXT_DIM // 8))
    bits = torch.frombuffer(digest, dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return (bits.flatten().float() * 2 - 1) / 16


def encode(caption: str) -> Tensor:
    """Conditioning (16, 4096) of a caption; the empty caption (all zeros) is the unconditional one.

    The models see words without their order. So a word has another vector right after "moving" (a direction, not a
    place) and another after "and" (of the second shape). Raises ValueError for a word that neither embedded model has
    learned, and for a caption over 16 words.
    """
    words = [ALIASES.get(word, word) for word in caption.lower().replace(",", " ").replace(".", " ").split()]
    if len(words) > TOKENS:
        raise ValueError(f"caption of {len(words)} words > {TOKENS}: shorten it")
    unknown = [word for word in words if word not in vocabulary()]
    if unknown:
        raise ValueError(
            f"caption {shortened(caption, 200)!r} has words that the embedded model does not know: "
            f"{shortened(', '.join(unknown), 200)}; use these: {', '.join(vocabulary())}"
        )
    table = torch.zeros(TOKENS, TEXT_DIM)
    second = ""
    for row, word in enumerate(words):
        moving = "moving " if row and words[row - 1] == "moving" else ""
        table[row] = word_vector(second + moving + word)
        if word == "and":
            second = "and "
    return table


@dataclass(frozen=True)
class Scene:
    """One shape. What the caption does not say is None: a size or position by chance, a white background."""

    colour: str
    shape: str
    size: str | None = None
    position: str | None = None
    background: str | None = None

    def caption(self) -> str:
        """The phrase that `encode` takes."""
        background = self.background and f"on {self.background}"
        words = ["a", self.size, self.colour, self.shape, self.position, background]
        return " ".join(word for word in words if word)


def random_scene(rng: random.Random, shapes: Sequence[str] = SHAPES) -> Scene:
    """Any scene; a size or position is left out one time in twenty, the background one time in three."""
    return Scene(
        colour=rng.choice(list(COLOURS)),
        shape=rng.choice(shapes),
        size=rng.choice(list(SIZES)) if rng.random() < 0.95 else None,
        position=rng.choice(list(POSITIONS)) if rng.random() < 0.95 else None,
        background=rng.choice(list(BACKGROUNDS)) if rng.random() < 0.67 else None,
    )


def inside(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Where the points (x to the right, y downwards) are in a shape about 2 high, centred on zero: bool."""
    radius = torch.hypot(x, y)
    if shape == "circle":
        return radius < 0.97
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) < 0.85
    if shape == "triangle":
        return (y < 0.8) & (x.abs() < (y + 1.0) * 0.6)
    if shape == "diamond":
        return x.abs() / 0.75 + y.abs() / 1.08 < 1
    if shape == "ring":
        return (radius < 1.0) & (radius > 0.55)
    if shape == "cross":
        near, far = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
        return (near < 0.32) & (far < 0.97)
    if shape == "heart":
        u, v = x * 1.2, 0.1 - y * 1.15
        return (u * u + v * v - 1) ** 3 < u * u * v**3
    if shape == "star":
        # Fold the plane into one of ten wedges, where the outline is a straight line from notch to tip.
        fifth = 2 * math.pi / 5
        angle = torch.remainder(torch.atan2(x, -y) + fifth / 2, fifth) - fifth / 2
        u, v = radius * angle.cos(), radius * angle.sin().abs()
        notch_u, notch_v = 0.48 * math.cos(fifth / 2), 0.48 * math.sin(fifth / 2)
        return (1.08 - u) * notch_v > v * (1.08 - notch_u)
    raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")


def cover(shape: str, x: float, y: float, radius: float, height: int, width: int) -> Tensor:
    """How much of each pixel (height, width) a shape covers, 0..1, by 4 x 4 samples for each pixel.

    x, y (its centre) and radius are in units of the picture's shorter side.
    """
    samples = 4
    short = min(height, width)
    rows = (torch.arange(height * samples) + 0.5) / (samples * short)
    columns = (torch.arange(width * samples) + 0.5) / (samples * short)
    hit = inside(shape, (columns[None] - x) / radius, (rows[:, None] - y) / radius)
    covered: Tensor = hit.float().unflatten(0, (-1, samples)).unflatten(2, (-1, samples)).mean((1, 3))
    return covered


def draw(scene: Scene, height: int, width: int, rng: random.Random) -> Tensor:
    """The scene as RGB (3, height, width) in 0..1, antialiased.

    Size and place vary a little by chance, as do a size and a position that the scene leaves open.
    """
    short = min(height, width)
    radius = SIZES[scene.size or rng.choice(list(SIZES))] * rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER)
    where = POSITIONS[scene.position] if scene.position else (rng.uniform(-1, 1), rng.uniform(-1, 1))
    x, y = (
        side / short / 2 + (side / short / 2 - radius - MARGIN) * at + rng.uniform(-PLACE_JITTER, PLACE_JITTER)
        for side, at in zip((width, height), where, strict=True)
    )
    covered = cover(scene.shape, x, y, radius, height, width)
    colour = torch.tensor(COLOURS[scene.colour])[:, None, None]
    background = torch.tensor(BACKGROUNDS[scene.background or DEFAULT_BACKGROUND])[:, None, None]
    return background + (colour - background) * covered
