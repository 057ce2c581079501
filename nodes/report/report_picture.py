"""Draws an Attention Report: one table of what ran, and below it what else a person should know.

Boundary: it draws what a report says; `report.py` makes the report and its remarks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ...comparison.canvas import ALARM, DARK, GREY, INNER, LARGE, MARGIN, NORMAL, SMALL, WIDTH, Sheet, line_height, wrap
from ...comparison.picture import to_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS = 30
MOST_REMARKS = 24
"""Lines below the table, after wrapping."""
PAD = 0.07
"""Inches between two rows."""
BANDS = {"fell back": "#fdf0d5", "every other": "#f4f6f9"}


class Column(NamedTuple):
    """Where a column begins and how wide it is, in inches from the margin."""

    title: str
    at: float
    width: float
    align: str = "left"


COLUMNS = (
    Column("role", 0.0, 1.75),
    Column("blocks", 1.85, 0.95),
    Column("backend", 2.9, 1.5),
    Column("mask", 4.5, 0.75),
    Column("calls", 5.2, 0.5, "right"),
    Column("ms", 5.75, 0.75, "right"),
)
"""The reason for another backend than the one asked for stands on a line below the row."""


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of a run report with blocks of one role and path added up, most calls first.

    A row is the cells of `COLUMNS`, then the reason; empty where the backend is not for this role, so nothing failed.
    """
    sums: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        role = ", ".join(filter(None, (row["role"], row.get("card"))))
        path = (role, *(row[name] for name in ("backend", "member", "mask", "reason")))
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
                "" if all(row.get("expected") for row in same) else reason or "",
            ]
        )
    return sorted(cells, key=lambda row: -int(row[4]))


def draw(report: Mapping[str, Any], remarks: Sequence[str]) -> Tensor:
    """The picture (1, height, width, 3) in 0..1; what does not fit is counted in its last line.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    return to_tensor(draw_figure(report, remarks))


def draw_figure(report: Mapping[str, Any], remarks: Sequence[str]) -> Figure:
    """The figure of `draw`."""
    run = report["run"]
    rows = table(run["rows"]) if run else []
    sheet = Sheet()
    sheet.write("Attention Report", size=LARGE, bold=True)
    sheet.y += 0.05
    if run:
        sheet.write(verdict(rows), size=NORMAL, colour=ALARM if any(row[-1] for row in rows) else DARK)
    sheet.write(subject(report), colour=GREY)
    sheet.y += 0.12
    if rows:
        for column in COLUMNS:
            sheet.write(column.title, MARGIN + column.at, sheet.y, column.width, bold=True, align=column.align)
        sheet.y += line_height(SMALL) + PAD
        for number, row in enumerate(rows[:MOST_ROWS]):
            _row(sheet, row, "fell back" if row[-1] else "every other" if number % 2 else None)
        if len(rows) > MOST_ROWS:
            sheet.write(f"... {len(rows) - MOST_ROWS} more rows in the report's JSON", colour=GREY)
        sheet.y += 0.15
    lines = [(line, "; BAD " in remark) for remark in remarks for line in wrap(remark, INNER, SMALL, most=MOST_REMARKS)]
    for line, bad in lines[:MOST_REMARKS]:
        sheet.write(line, colour=ALARM if bad else DARK)
    if len(lines) > MOST_REMARKS:
        sheet.write(f"... {len(lines) - MOST_REMARKS} more lines in the report's text")
    return sheet.finish()


def verdict(rows: Sequence[Sequence[str]]) -> str:
    """The table in one line: what computed the calls, most first, and how many ran something else than asked for."""
    if not rows:
        return "no attention call was seen"
    calls: dict[str, int] = {}
    for row in rows:
        kernel = row[2].rpartition(": ")[2]
        calls[kernel] = calls.get(kernel, 0) + int(row[4])
    total, fallen = sum(calls.values()), sum(int(row[4]) for row in rows if row[-1])
    most = sorted(calls, key=lambda name: -calls[name])
    ran = ", ".join(f"{name} {calls[name]} call{'' if calls[name] == 1 else 's'}" for name in most)
    said = f"{most[0]} computed every call" if len(most) == 1 else ran
    return f"{said}; {fallen} of {total} did not run as asked" if fallen else said


def subject(report: Mapping[str, Any]) -> str:
    """One line: which model, how long, and on what."""
    run, machine = report["run"], report["versions"]
    parts = [machine.get("device", ""), f"torch {machine['torch']}" if "torch" in machine else ""]
    if run:
        seconds = "" if run["seconds"] is None else f"{run['seconds']:.1f} s"
        steps = "1 step" if run["steps"] == 1 else f"{run['steps']} steps"
        parts = [run["model"], steps, seconds, *parts]
    return ", ".join(part for part in parts if part)


def _row(sheet: Sheet, row: Sequence[str], band: str | None) -> None:
    """A row of the table: each cell wraps in its column, and the reason stands below."""
    cells = [wrap(text, column.width, SMALL) for column, text in zip(COLUMNS, row, strict=False)]
    reason = wrap(row[-1], INNER - 0.2, SMALL) if row[-1] else []
    height = (max(map(len, cells)) + len(reason)) * line_height(SMALL) + PAD
    if band:
        ground = sheet.axes(MARGIN / 2, sheet.y - PAD / 2, WIDTH - MARGIN, height)
        ground.set_facecolor(BANDS[band])
        ground.set_xticks([])
        ground.set_yticks([])
        ground.spines[:].set_visible(False)
    for column, lines in zip(COLUMNS, cells, strict=True):
        sheet.write("\n".join(lines), MARGIN + column.at, sheet.y, column.width, align=column.align)
    if reason:
        below = sheet.y + max(map(len, cells)) * line_height(SMALL)
        sheet.write("\n".join(reason), MARGIN + 0.2, below, INNER - 0.2)
    sheet.y += height
