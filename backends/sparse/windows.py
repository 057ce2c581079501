"""Windows of tiles: which key tiles lie near a query tile. Static, made on the CPU once for each grid."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Window = tuple[int, int, int]
"""Tiles along frames, height and width."""


MOST = 999_999
"""Tiles along one axis of a window; more than a grid has is as good as all."""


def is_window(value: object) -> bool:
    """Whether it is a list of three whole numbers from 1 to `MOST`."""
    return isinstance(value, list) and len(value) == 3 and all(type(size) is int and 0 < size <= MOST for size in value)


def window_problem(name: str, value: object) -> list[str]:
    """What is wrong with an option that is a window; None is not given."""
    if value is None or is_window(value):
        return []
    return [f"{name} {str(value)[:40]} is not three whole numbers from 1 to {MOST}"]


def window_map(tiles: Window, windows: tuple[Window, ...], *, pushed_in: bool) -> tuple[torch.Tensor, int | None]:
    """The key tiles in the window of each query tile, for each of `windows`.

    Along each axis a window w holds the tiles at most w // 2 from its centre, so an even one holds w + 1.

    Args:
        tiles: of the grid.
        pushed_in: a window that reaches over a border is moved in, so that it keeps its size; else it is cut there.

    Returns:
        bool, (1, windows, tiles, tiles), on the CPU, and how many tiles every query tile sees, if all see equally many.
    """
    import torch

    found = [_of_window(tiles, window, pushed_in) for window in windows]
    if len(found) == 1:
        return found[0]
    counts = {count for _, count in found}
    return torch.cat([seen for seen, _ in found], 1), counts.pop() if len(counts) == 1 else None


@lru_cache(maxsize=64)
def _of_window(tiles: Window, window: Window, pushed_in: bool) -> tuple[torch.Tensor, int | None]:
    """`window_map` of one window; kept alone, as the heads of many layers and steps share a few."""
    import torch

    by_axis = []
    for count, width in zip(tiles, window, strict=True):
        place = torch.arange(count, device="cpu")
        half = width // 2
        centre = place.clamp(min=half).clamp(max=count - 1 - half) if pushed_in else place
        by_axis.append((centre[:, None] - place).abs() <= half)
    frames, height, width_ = by_axis
    near = frames[:, None, None, :, None, None] & height[None, :, None, None, :, None] & width_[:, None, None, :]
    total = tiles[0] * tiles[1] * tiles[2]
    counts = near.sum((3, 4, 5))
    same = int(counts[0, 0, 0]) if bool((counts == counts[0, 0, 0]).all()) else None
    return near.reshape(1, 1, total, total), same
