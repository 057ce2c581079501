"""Draws a block map: which key blocks each query block of a head sees, and what that is on the frames of the grid.

Boundary: it draws what `blocks_command.py` found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..backends.sparse.block_map import Map, block_of_token
from .canvas import DARK, GREY, INNER, LARGE, MARGIN, NORMAL, SMALL, Sheet, bare

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .blocks_command import Asked

SEEN, LEFT_OUT, OWN = "#1f6fb2", "#eef1f5", "#d55e00"
MOST_FRAMES = 8
SIDE = 5.6
"""Inches of the map."""


def draw_blocks(answer: Mapping[str, Any], found: Map, asked: Asked, *, by_scores: bool) -> Figure:
    """The figure: the map of one head, and below it the frames with what a block in the middle sees."""
    from matplotlib.colors import ListedColormap

    head, grid = found.of_head(asked.head), asked.grid
    colours = ListedColormap([LEFT_OUT, SEEN, OWN])
    sheet = Sheet()
    sheet.write(f"Blocks of {answer['method']}", size=LARGE, bold=True)
    sheet.y += 0.05
    kept = f"{100 * answer['kept_of_head']:.1f} % of the query-key pairs of head {answer['head']} are computed"
    sheet.write(kept, size=NORMAL)
    options = ", ".join(f"{name}={value}" for name, value in answer["options"].items()) or "default options"
    at = "" if answer["step"] is None else f", step {answer['step']} of {answer['steps']}"
    sheet.write(f"grid {answer['grid']}, {answer['layer']}{at}; {options}", colour=GREY, most=3)
    sheet.y += 0.45
    left = MARGIN + 0.75
    axes = sheet.axes(left, sheet.y, SIDE, SIDE)
    axes.imshow(
        head.seen[0, 0].int().cpu().numpy(), cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest"
    )
    axes.tick_params(labelsize=SMALL, colors=DARK)
    axes.xaxis.tick_top()
    axes.set_ylabel(f"{head.queries.count} query blocks", fontsize=SMALL, color=DARK)
    axes.set_title(f"{head.keys.count} key blocks", fontsize=SMALL, color=DARK)
    sheet.y += SIDE + 0.12
    sheet.write("blue: computed; grey: left out", colour=GREY)
    sheet.y += 0.2

    middle = grid.frames // 2
    token = grid.before + (middle * grid.height + grid.height // 2) * grid.width + grid.width // 2
    row = int(block_of_token(head.queries)[token])
    on_grid = slice(grid.before, grid.before + grid.cells)
    seen = head.seen[0, 0, row].cpu()[block_of_token(head.keys)][on_grid].int()
    seen[block_of_token(head.queries)[on_grid] == row] = 2
    frames = seen.view(grid.shape)
    evenly = torch.linspace(0, grid.frames - 1, min(MOST_FRAMES, grid.frames)).round().int().tolist()
    nearest = min(evenly, key=lambda frame: abs(frame - middle))
    shown = [middle if frame == nearest else frame for frame in evenly]
    sheet.write(f"What query block {row} sees on the grid (orange: itself)", size=NORMAL)
    sheet.y += 0.1
    per_row = 4
    gap = 0.12
    width = (INNER - gap * (per_row - 1)) / per_row
    height = min(width * grid.height / grid.width, 2.0)
    for number, frame in enumerate(shown):
        x, y = MARGIN + number % per_row * (width + gap), sheet.y + number // per_row * (height + 0.35)
        sheet.write(f"frame {frame}", x, y, width, align="center")
        small = sheet.axes(x, y + 0.2, width, height)
        small.imshow(frames[frame].numpy(), cmap=colours, vmin=0, vmax=2, aspect="equal", interpolation="nearest")
        bare(small)
    sheet.y += -(-len(shown) // per_row) * (height + 0.35)
    if by_scores:
        sheet.write("Chosen by the scores of random query and key: a model has other blocks.", colour=GREY)
    return sheet.finish()
