"""Draws a comparison of attention alone: the time of all calls, and the error of each.

Boundary: matplotlib; it draws what a report says and measures nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from .canvas import ALARM, DARK, GREY, INNER, MARGIN, NORMAL, SMALL, Sheet, footer, heading, line_height, wrap
from .metrics import need
from .report import Report
from .tables import milliseconds, speed_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES, TIMES = 2.0, 2.2
"""Inches for the names at the left, and for what stands behind the longest bar."""
ROW = 0.26
"""Inches of a bar, and of the calls of one role and block."""
MARKERS = "osD^vP*X"


def draw_calls(report: Report) -> Figure:
    """Draw a comparison of attention alone: the time of a pass, and the error of each call against float64.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    sheet = Sheet()
    heading(sheet, report)
    _times(sheet, report)
    _errors(sheet, report)
    footer(sheet, report)
    return sheet.finish()


def labelled_rows(
    sheet: Sheet, names: list[tuple[str, str]], left: float = NAMES, width: float = INNER, least: float = ROW
) -> tuple[Axes, list[float]]:
    """Axes with a line for each name and colour, as high as the name takes; the middle of each in data units."""
    written = ["\n".join(wrap(name, left - 0.25, SMALL)) for name, _ in names]
    heights = [max(least, len(text.split("\n")) * line_height(SMALL) + 0.06) for text in written]
    axes = sheet.axes(MARGIN + left, sheet.y, width - left, sum(heights) or ROW)
    middles, y = [], 0.0
    for (_, colour), text, height in zip(names, written, heights, strict=True):
        lines = len(text.split("\n")) * line_height(SMALL)
        sheet.write(text, MARGIN, sheet.y + y + (height - lines) / 2, left - 0.25, colour=colour, align="right")
        middles.append(y + height / 2)
        y += height
    axes.set_ylim(y or ROW, 0)
    axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)
    sheet.y += y or ROW
    return axes, middles


def _times(sheet: Sheet, report: Report) -> None:
    sheet.write("Time of all these calls, in ms (median; line: least to most)", size=NORMAL, bold=True)
    sheet.y += 0.08
    rows = report.rows
    axes, middles = labelled_rows(sheet, [(row.name, ALARM if row.failed or row.broken else DARK) for row in rows])
    longest = max((row.step_ms.high for row in rows if row.step_ms), default=1.0)
    room = INNER - NAMES
    axes.set_xlim(0, longest * room / (room - TIMES))
    for at, (row, y) in enumerate(zip(rows, middles, strict=True)):
        colour, marker = _look(at)
        axes.plot([-0.1 / room], [y], marker, color=colour, transform=axes.get_yaxis_transform(), clip_on=False)
        if row.step_ms is None:
            axes.text(0, y, "  did not run", va="center", fontsize=SMALL, color=ALARM)
            continue
        axes.barh(y, row.step_ms.median, color=colour, height=0.6 * ROW)
        axes.plot([row.step_ms.low, row.step_ms.high], [y, y], color=DARK, linewidth=1.2)
        words = ", ".join(filter(None, (milliseconds(row.step_ms), speed_in_words(row, report))))
        axes.text(row.step_ms.high, y, f"  {words}", va="center", fontsize=SMALL)
    sheet.y += 0.4


def _errors(sheet: Sheet, report: Report) -> None:
    rows = report.rows
    calls = max((row.calls for row in rows), key=len, default=[])
    if not calls:
        return
    sheet.write("Error of each attention call (relative L2 against float64; left is better)", size=NORMAL, bold=True)
    sheet.y += 0.08
    rounding = torch.finfo(getattr(torch, report.dtype)).eps / 2
    sheet.write(f"dashed: rounding of one {report.dtype} number, and an error as large as the result", colour=GREY)
    sheet.y += 0.08
    axes, middles = labelled_rows(sheet, [(f"{call.role}, block {call.block}", DARK) for call in calls])
    finite = [call.relative_l2 for row in rows for call in row.calls if math.isfinite(call.relative_l2)]
    low, high = min([*(value for value in finite if value > 0), rounding]) / 5, 10 * max([*finite, 1.0])
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticker = need("matplotlib.ticker")
    axes.xaxis.set_major_locator(ticker.LogLocator(numticks=6))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.0e}"))  # raised digits are small
    axes.minorticks_off()
    for edge in (rounding, 1.0):
        axes.axvline(edge, color=GREY, linewidth=0.8, linestyle="--")
    for at, row in enumerate(rows):
        colour, marker = _look(at)
        for call, y in zip(row.calls, middles, strict=False):
            y += (at - (len(rows) - 1) / 2) * 0.6 * ROW / len(rows)
            if math.isfinite(call.relative_l2):
                axes.plot(max(call.relative_l2, 1e-17), y, marker, color=colour, markersize=6)
            else:
                axes.text(high, y, "NaN", color=colour, ha="right", va="center", fontsize=SMALL, weight="bold")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    sheet.y += 0.4


def _look(at: int) -> tuple[Any, str]:
    """Colour and marker of a row."""
    return need("matplotlib").colormaps["tab10"](at % 10), MARKERS[at % len(MARKERS)]
