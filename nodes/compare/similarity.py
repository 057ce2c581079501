"""CLIP similarity of pictures to the reference's, with a CLIP vision model of ComfyUI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...comparison.report import Row


def score(rows: Sequence[Row], pictures: Sequence[torch.Tensor | None], clip_vision: Any) -> None:
    """Write into each row the cosine of its picture's CLIP embedding to the reference's, the mean over frames.

    Image to image, as CLIP-I of DreamBooth (arXiv:2208.12242): 1 for the same content. A picture is (frames,
    height, width, 3) in 0..1; one that is missing or not finite gets no score, and without the first none has.
    """
    if not pictures or pictures[0] is None:
        return
    with torch.inference_mode():
        _score(rows, pictures, embed(pictures[0], clip_vision), clip_vision)


def _score(
    rows: Sequence[Row], pictures: Sequence[torch.Tensor | None], reference: torch.Tensor, clip_vision: Any
) -> None:
    for row, picture in zip(rows, pictures, strict=True):
        if picture is not None and bool(picture.isfinite().all()):
            likeness = torch.nn.functional.cosine_similarity(embed(picture, clip_vision), reference, dim=-1)
            row.clip_similarity = float(likeness.mean())


def embed(picture: torch.Tensor, clip_vision: Any) -> torch.Tensor:
    """The projected CLIP embedding of each frame, (frames, size), in float32 on the CPU."""
    frames = [clip_vision.encode_image(frame[None], crop=False)["image_embeds"].float().cpu() for frame in picture]
    return torch.cat(frames)
