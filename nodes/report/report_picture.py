"""Draws an Attention Report: one table of what ran, and below it what else a person should know.

Boundary: it draws what a report says; `report.py` makes the report and its remarks.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ...comparison.canvas import ALARM, DARK, GREY, MARGIN, box, new_figure
from ...comparison.picture import to_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS = 30
MOST_REMARKS = 24
"""Lines below the table, after wrapping."""
LINE = 0.235
"""Inches from one line to the next."""
WIDTH = 12.0
CHARACTERS = 155
"""Of a remark that fit into the width; of the font's widths the usual one."""
BANDS = {"fell back": "#fdf0d5", "every other": "#f4f6f9"}


class Column(NamedTuple):
    """Where a column begins, in inches; with `right`, where it ends."""

    title: str
    at: float
    characters: int
    right: bool = False


COLUMNS = (
    Column("role", MARGIN, 24),
    Column("blocks", 2.45, 16),
    Column("backend", 3.75, 25),
    Column("mask", 5.75, 20),
    Column("calls", 7.85, 9, right=True),
    Column("ms", 8.75, 10, right=True),
    Column("why another one", 9.0, 37),
)


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of a run report with blocks of one role and path added up: the cells of `COLUMNS`, most calls first."""
    sums: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        path = tuple(row[name] for name in ("role", "backend", "member", "mask", "reason"))
        sums.setdefault(path, []).append(row)
    cells = []
    for (role, backend, member, mask, reason), same in sums.items():
        blocks = list(dict.fromkeys(row["block"] for row in same))
        calls = sum(row["calls"] for row in same)
        times = [row["ms"] for row in same]
        cells.append(
            [
                role,
                blocks[0] if len(blocks) == 1 else f"{len(blocks)} blocks",
                f"{backend}: {member}" if member and member != backend else backend,
                mask,
                str(calls),
                "-" if None in times else f"{sum(times):.1f}",
                reason or "",
            ]
        )
    return sorted(cells, key=lambda row: -int(row[4]))


def draw(report: Mapping[str, Any], remarks: Sequence[str]) -> Tensor:
    """The picture (1, height, width, 3) in 0..1; what does not fit is counted in its last line.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    run = report["run"]
    rows = table(run["rows"]) if run else []
    left_out = len(rows) - MOST_ROWS
    rows = rows[:MOST_ROWS]
    lines = [part for remark in remarks for part in textwrap.wrap(remark, CHARACTERS, subsequent_indent="    ")]
    if len(lines) > MOST_REMARKS:
        lines[MOST_REMARKS:] = [f"... {len(lines) - MOST_REMARKS} more lines in the report's text"]
    height = 1.05 + LINE * ((2 + len(rows) + (left_out > 0) if rows else 0) + len(lines))
    figure = new_figure(WIDTH, height)
    y = height - 0.2
    _write(figure, MARGIN, y, "Attention Report", height, fontsize=14, weight="bold")
    y -= 0.32
    _write(figure, MARGIN, y, subject(report), height, colour=GREY)
    y -= 0.32
    if rows:
        for column in COLUMNS:
            _write(figure, column.at, y, column.title, height, right=column.right, weight="bold")
        for number, row in enumerate(rows):
            y -= LINE
            band = "fell back" if row[-1] else "every other" if number % 2 else None
            if band:
                _band(figure, y, height, BANDS[band])
            for column, text in zip(COLUMNS, row, strict=True):
                _write(figure, column.at, y, _cut(text, column.characters), height, right=column.right)
        if left_out > 0:
            y -= LINE
            _write(figure, MARGIN, y, f"... {left_out} more rows in the report's JSON", height, colour=GREY)
        y -= 2 * LINE
    for line in lines:
        _write(figure, MARGIN, y, line, height, colour=ALARM if "; BAD " in line else DARK)
        y -= LINE
    return to_tensor(figure)


def subject(report: Mapping[str, Any]) -> str:
    """One line: which model, how long, and on what."""
    run, machine = report["run"], report["versions"]
    parts = [machine.get("device", ""), f"torch {machine['torch']}" if "torch" in machine else ""]
    if run:
        seconds = "" if run["seconds"] is None else f"{run['seconds']:.1f} s"
        parts = [run["model"], f"{run['steps']} steps", seconds, *parts]
    return _cut(", ".join(part for part in parts if part), CHARACTERS)


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 3] + "..."


def _band(figure: Figure, y: float, height: float, colour: str) -> None:
    """A line's ground; `y` is the top of its text."""
    axes = figure.add_axes(box(MARGIN / 2, y - 0.19, WIDTH - MARGIN, LINE, WIDTH, height))
    axes.set_facecolor(colour)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write(
    figure: Figure,
    x: float,
    y: float,
    text: str,
    height: float,
    *,
    colour: str = DARK,
    fontsize: float = 9.5,
    weight: str = "normal",
    right: bool = False,
) -> None:
    """Text with its upper corner at inches from the lower left; a dollar sign is one, not the start of a formula."""
    figure.text(
        x / WIDTH, y / height, text, fontsize=fontsize, weight=weight, color=colour, va="top",
        ha="right" if right else "left", parse_math=False,
    )  # fmt: skip
