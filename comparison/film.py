"""Clips as pictures: frames side by side, and an animated WebP that any browser shows.

Boundary: torch tensors and Pillow, which matplotlib brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .report import ComparisonError

MS = 120
"""Milliseconds that a frame is shown."""
SEAM = 2
"""Pixels of a model between frames or clips, before they are enlarged."""
SEAM_COLOUR = 0.55
"""A grey that no background of the embedded model has."""
NAN_COLOUR = (1.0, 0.0, 1.0)


def side_by_side(clip: Tensor) -> Tensor:
    """The frames of a clip (frames, height, width, 3) in one row, with grey seams: (height, wide, 3) on the CPU."""
    return _joined([_shown(frame) for frame in clip])


def save_film(clips: Sequence[Tensor], path: Path, *, times: int = 6, ms: int = MS) -> None:
    """Write clips beside each other as an animated WebP, without loss, that runs for ever.

    Args:
        clips: each (frames, height, width, 3) in 0..1, of one shape. NaN is magenta.
        times: pixels on the screen for each of the model's.
        ms: how long a frame is shown.

    Raises:
        ComparisonError: no clip is given, or their shapes differ.
    """
    from PIL import Image

    shapes = {tuple(clip.shape) for clip in clips}
    if len(shapes) != 1:
        raise ComparisonError(f"clips of {len(shapes)} shapes {sorted(shapes)}: a film needs clips of one shape")
    frames = []
    for together in zip(*clips, strict=True):
        picture = _joined([_shown(frame) for frame in together])
        large = F.interpolate(picture.movedim(-1, 0)[None], scale_factor=times, mode="nearest")[0].movedim(0, -1)
        frames.append(Image.fromarray((255 * large).round().to(torch.uint8).numpy()))
    frames[0].save(path, "WEBP", save_all=True, append_images=frames[1:], duration=ms, loop=0, lossless=True)


def _shown(frame: Tensor) -> Tensor:
    picture = frame.detach().float().cpu()
    return torch.where(picture.isfinite().all(-1, keepdim=True), picture, torch.tensor(NAN_COLOUR)).clamp(0, 1)


def _joined(pictures: Sequence[Tensor]) -> Tensor:
    seam = torch.full((pictures[0].shape[0], SEAM, 3), SEAM_COLOUR)
    parts = [part for picture in pictures for part in (seam, picture)][1:]
    return torch.cat(parts, dim=1)
