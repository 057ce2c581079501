"""Where the tokens of attention calls stand, from the arguments of a Diffusers model's forward.

The grid is frames x height x width of the tokens inside the model. Latents (batch, channels, [frames,] height, width)
are divided by the patch size; packed latents come with their positions or sizes. Sparse methods compare the sum with
the length of each call, so a grid that does not fit is refused there and never used.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import torch

from ...backends.values.grid import OFF_GRID, TokenGrid
from ...backends.values.roles import Family

GridOf = Callable[[str, str, int], TokenGrid | None]
Sizes = tuple[int, int, int]

WITHOUT_GRID = ("text_self", "ltx2.audio_self", "unet.time_self")


def sizes_of(model: Any, family: Family | None, given: dict[str, Any]) -> Sizes | None:
    """Frames, height and width in tokens of a forward's picture or video; None where its arguments do not tell."""
    name = family.name if family is not None else ""
    config = getattr(model, "config", {})
    if name == "flux" and isinstance(given.get("img_ids"), torch.Tensor):
        return _from_positions(given["img_ids"], int(given["hidden_states"].shape[1]))
    if name == "qwen_image" and given.get("img_shapes"):
        first = given["img_shapes"][0]
        first = first[0] if isinstance(first, list) else first
        return int(first[0]), int(first[1]), int(first[2])
    if name in ("ltx2", "ltxv") and given.get("num_frames") and given.get("height"):
        patch, patch_t = config.get("patch_size", 1), config.get("patch_size_t", 1)
        return ceil(given["num_frames"] / patch_t), ceil(given["height"] / patch), ceil(given["width"] / patch)
    if name == "lumina2":
        latents = given.get("x", given.get("hidden_states"))
        latent = latents[0] if isinstance(latents, list) else latents
        if isinstance(latent, list) or latent is None:
            return None
        patch = given.get("patch_size") or config.get("patch_size") or 2
        frames = latent.shape[1] if latent.ndim == 4 and isinstance(latents, list) else 1
        return int(frames), ceil(latent.shape[-2] / patch), ceil(latent.shape[-1] / patch)
    latent = given.get("hidden_states")
    if not isinstance(latent, torch.Tensor) or latent.ndim not in (4, 5):
        return None
    patch = config.get("patch_size", 1)
    steps = tuple(patch) if isinstance(patch, list | tuple) else (config.get("patch_size_t") or 1, patch, patch)
    frames, height, width = (1, *latent.shape[2:])[-3:]
    return ceil(frames / steps[0]), ceil(height / steps[1]), ceil(width / steps[2])


def _from_positions(ids: torch.Tensor, count: int) -> Sizes | None:
    """The grid of FLUX's packed latent from the positions of its tokens; read from the device, once per shape."""
    rows = ids[0] if ids.ndim == 3 else ids
    last = rows[:, 1:3].amax(0) - rows[:, 1:3].amin(0) + 1
    height, width = (int(size) for size in last.tolist())
    return (1, height, width) if height * width == count else None


def grid_finder(family: Family | None, sizes: Sizes) -> GridOf:
    """The grid of a call by its role, category and q_len; other tokens are the rest of its length.

    They stand before the grid in FLUX, Qwen-Image and CogVideoX, after it in SD3, HunyuanVideo and Z-Image.
    """
    grid = TokenGrid(*sizes)
    before = family is not None and family.name in ("flux", "qwen_image", "cogvideo")

    def grid_of(role: str, category: str, q_len: int) -> TokenGrid | None:
        if role in WITHOUT_GRID:
            return OFF_GRID
        if category == "cross":
            return grid._replace(queries_only=True) if q_len == grid.cells else OFF_GRID
        others = q_len - grid.cells
        if others < 0 or family is None:
            return None if family is None else OFF_GRID
        if category == "self":
            return grid if not others else grid._replace(after=others) if family.name == "lumina2" else None
        return grid._replace(before=others) if before else grid._replace(after=others)

    return grid_of
