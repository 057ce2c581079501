"""`sliding_tile_attn`: Sliding Tile Attention (STA).

Zhang et al., "Fast Video Generation with Sliding Tile Attention", arXiv:2502.04507; FastVideo and SGLang. The grid is
divided into tiles of 6 x 8 x 8 tokens. A query tile sees the key tiles in a window of tiles around it, which is pushed
in at borders so that it keeps its size. Each head has its own window, read from a mask strategy file; the first 15 of
50 steps are computed whole. Their kernels take three grids only; here any grid, with smaller tiles at its borders.

Without a file each head has the window of `window_size`, by default 3 x 3 x 3 tiles, one of the paper's candidates.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ...values.aliases import SGLANG, Alias
from ...values.bounded import read_file
from ...values.grid import TokenGrid
from ...values.options import Option
from ...values.platform import Platform
from ...values.reasons import Reason, template
from ..block_map import BlockMap, Dense
from ..blocks import Blocks, tile_counts, tiles
from ..by_step import DENSE_LAYERS, DENSE_STEPS
from ..executor import EXECUTOR
from ..method import SparseMethod, Where
from ..windows import Window, is_window, window_map, window_problem

if TYPE_CHECKING:
    from ...values.request import AttentionCall

TILE = (6, 8, 8)
WINDOW = (3, 3, 3)
MODES = ("STA_inference", "STA_searching", "STA_tuning", "STA_tuning_cfg")
NO_SEARCH = template(
    "sliding_tile.mode", "{name} {mode} looks for windows, which is not built here; STA_inference runs them"
)
NO_STRATEGY = template("sliding_tile.strategy", "{error}")
MOST_BYTES = 2**26
"""Of a mask strategy file; one of 50 steps, 60 layers and 40 heads has about 3 MB."""


class Strategy(NamedTuple):
    """A mask strategy file: the windows of the heads of each step and layer."""

    steps: int
    layers: int
    windows: Mapping[tuple[int, int], tuple[Window, ...]]

    def at(self, step: int | None, steps: int | None, layer: int) -> tuple[Window, ...] | None:
        """The windows of a layer's heads; a schedule of another length is mapped onto the file's steps."""
        at = self.steps - 1 if step is None else step
        if step is not None and steps and steps != self.steps:
            at = step * self.steps // steps
        return self.windows.get((min(at, self.steps - 1), layer))


def parse_strategy(text: str) -> Strategy:
    """Parse `{"step_layer_head": [frames, height, width]}`, windows in tiles.

    Raises:
        ValueError: it is something else, or a head of a step and layer is missing.
    """
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError('not a mapping such as {"0_0_0": [3, 3, 3]}')
    found: dict[tuple[int, int], dict[int, Window]] = {}
    for key, window in entries.items():
        place = re.fullmatch(r"(\d{1,6})_(\d{1,6})_(\d{1,6})", key)
        if place is None:
            raise ValueError(f"key {key[:40]!r} is not step_layer_head, such as 12_0_3")
        if not is_window(window):
            raise ValueError(window_problem(f"{key}:", window)[0])
        step, layer, head = map(int, place.groups())
        found.setdefault((step, layer), {})[head] = (window[0], window[1], window[2])
    steps, layers = (1 + max(place[axis] for place in found) for axis in (0, 1))
    heads = 1 + max(max(row) for row in found.values())
    if (len(found), sum(map(len, found.values()))) != (steps * layers, steps * layers * heads):
        raise ValueError(
            f"{len(entries)} entries are not those of {steps} steps x {layers} layers x {heads} heads, counted from 0"
        )
    return Strategy(steps, layers, {place: tuple(row[head] for head in range(heads)) for place, row in found.items()})


def read_strategy(path: str) -> Strategy:
    """Read a mask strategy file; again only when it was changed.

    Raises:
        ValueError: it cannot be read, or is none.
    """
    try:
        about = os.stat(path)
        return _read(path, about.st_mtime_ns, about.st_size)
    except (OSError, ValueError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise ValueError(f"mask strategy file {path}: {reason}") from error


@lru_cache(maxsize=8)
def _read(path: str, changed: int, size: int) -> Strategy:
    return parse_strategy(read_file(path, MOST_BYTES).decode())


class SlidingTile(SparseMethod):
    """STA with the windows of a mask strategy file, or one window for all heads."""

    id = "sliding_tile_attn"
    once_planned = True
    summary = "Sliding Tile Attention: each tile of tokens sees the tiles in a window around it."
    aliases = (Alias(SGLANG, "sliding_tile_attn", "there three grids only, and a mask strategy file is required"),)
    options = (
        Option("mask_strategy_file_path", str, None, "JSON file with the window of each step, layer and head."),
        Option("sta_mode", str, "STA_inference", "Mode, as SGLang's documents spell it.", choices=MODES),
        Option("STA_mode", str, "STA_inference", "Mode, as SGLang's code spells it.", choices=MODES),
        Option("skip_time_steps", int, 15, "Dense steps at the beginning; by default 15 of 50, scaled.", minimum=0),
        Option("window_size", list, None, "Window of all heads without a file, in tiles; default 3, 3, 3."),
        DENSE_STEPS,
        DENSE_LAYERS,
        EXECUTOR,
    )
    steps_option = "skip_time_steps"
    published_steps = (15, 50)
    pair_bytes = 0
    same_thing = ("mask_strategy_file_path", "window_size")

    def option_conflicts(self, options: Mapping[str, object]) -> list[str]:
        return window_problem("window_size", options.get("window_size")) + super().option_conflicts(options)

    def option_reasons(self, platform: Platform, options: Mapping[str, object]) -> list[Reason]:
        for name in ("sta_mode", "STA_mode"):
            if (mode := options.get(name, MODES[0])) != MODES[0]:
                return [Reason(NO_SEARCH, name=name, mode=str(mode))]
        path = options.get("mask_strategy_file_path")
        try:
            if path is not None:
                read_strategy(str(path))
        except ValueError as error:
            return [Reason(NO_STRATEGY, error=str(error))]
        return super().option_reasons(platform, options)

    def keeping(self, share: float, grid: TokenGrid) -> dict[str, object]:
        """The window whose share of the tiles is nearest; of several the one that holds more frames."""
        counts = tile_counts(grid, TILE)
        windows = product(*(range(1, count + 2, 2) for count in counts))
        found = [
            (abs(prod(min(size, count) / count for size, count in zip(window, counts, strict=True)) - share), window)
            for window in windows
        ]
        _, best = min(found, key=lambda entry: (entry[0], -entry[1][0]))
        return {"window_size": list(best)}

    def blocks(self, grid: TokenGrid, options: Mapping[str, object]) -> Blocks:
        return tiles(grid, TILE)

    def select_blocks(
        self, call: AttentionCall, grid: TokenGrid, where: Where, options: Mapping[str, object]
    ) -> BlockMap | Dense:
        windows = self._windows(call.query.shape[1], where, options)
        if isinstance(windows, Dense):
            return windows
        blocks = self.blocks(grid, options)
        seen, count = window_map(tile_counts(grid, TILE), windows, pushed_in=True)
        if count == blocks.count:
            return Dense(f"the windows hold all {count} tiles")
        return BlockMap(blocks, blocks, seen, None if count is None else (count,) * blocks.count)

    def _windows(self, heads: int, where: Where, options: Mapping[str, object]) -> tuple[Window, ...] | Dense:
        path = options["mask_strategy_file_path"]
        if path is None:
            window = options["window_size"]
            return (WINDOW,) if not isinstance(window, list) else ((window[0], window[1], window[2]),)
        if where.layer is None:
            return Dense("the layer's number, which a mask strategy file needs, is unknown")
        try:
            strategy = read_strategy(str(path))  # it may have changed since the kernel was loaded
        except ValueError as error:
            return Dense(str(error))
        found = strategy.at(where.step, where.steps, where.layer)
        if found is None:
            return Dense(f"layer {where.layer} is not among the {strategy.layers} of the mask strategy file")
        if len(found) != heads:
            return Dense(f"{heads} heads, and the mask strategy file has {len(found)}")
        return (found[0],) if len(set(found)) == 1 else found


BACKENDS = (SlidingTile(),)
