"""Draws a comparison of attention alone: the error of each call, and the time of all of them.

Boundary: matplotlib; it draws what a report says and measures nothing.
"""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

import torch

from .canvas import ALARM, DARK, GREY, box, heading, new_figure
from .metrics import need
from .report import Report
from .tables import milliseconds, speed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_calls(report: Report) -> Figure:
    """Draw a comparison of attention alone: the error of each call against float64, and the time of a pass.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    rows = report.rows
    sites = [(call.role, call.block) for call in max(rows, key=lambda row: len(row.calls)).calls]
    width, height = max(11.5, 0.55 * len(sites) + 5), 2.2 + max(3.0, 0.5 * len(rows) + 0.8)
    figure = new_figure(width, height)
    heading(figure, report, width, height)
    errors = figure.add_axes(box(0.95, 0.95, width * 0.58 - 0.95, height - 2.15, width, height))
    times = figure.add_axes(box(width * 0.58 + 1.6, 0.95, width * 0.42 - 2.6, height - 2.15, width, height))
    markers, palette = "osD^vP*X", need("matplotlib").colormaps["tab10"]
    finite = [call.relative_l2 for row in rows for call in row.calls if math.isfinite(call.relative_l2)]
    top = 10 * max([*finite, 1.0])
    rounding = torch.finfo(getattr(torch, report.dtype)).eps / 2
    for at, words in ((1.0, "as large as the result itself"), (rounding, f"rounding of one {report.dtype} number")):
        errors.axhline(at, color=GREY, linewidth=0.8, linestyle="--")
        errors.text(-0.55, at / 1.3, words, fontsize=8.5, color=GREY, va="top", zorder=5,
                    bbox={"color": "white", "alpha": 0.8, "pad": 0.5})  # fmt: skip
    for at, row in enumerate(rows):
        colour = palette(at % 10)
        for index, call in enumerate(row.calls):
            x = index + (at - (len(rows) - 1) / 2) * 0.5 / len(rows)
            if math.isfinite(call.relative_l2):
                errors.plot(x, max(call.relative_l2, 1e-17), markers[at % 8], color=colour, markersize=7)
            else:
                errors.text(x, top, "NaN", color=colour, ha="center", va="top", rotation=90, fontsize=11, weight="bold")
        text = textwrap.shorten(row.name, 26, placeholder="...")
        if row.step_ms:
            times.barh(at, row.step_ms.median, color=colour, height=0.6)
            times.plot([row.step_ms.low, row.step_ms.high], [at, at], color=DARK, linewidth=1.2)
            gain = "reference" if at == 0 else f"speed {speed(row, report)}" if row.speedup else ""
            times.text(row.step_ms.high, at, f"  {milliseconds(row.step_ms)}, {gain}", va="center", fontsize=9)
        else:
            times.text(0, at, textwrap.fill(f" did not run: {row.failed}", 40), va="center", fontsize=8, color=ALARM)
        beside = times.get_yaxis_transform()
        times.plot([-0.035], [at], markers[at % 8], color=colour, transform=beside, clip_on=False)
        times.text(-0.07, at, text, transform=beside, ha="right", va="center", fontsize=9.5,
                   color=ALARM if row.failed or row.broken else DARK)  # fmt: skip
    errors.set_yscale("log")
    errors.set_ylim(min([*(value for value in finite if value > 0), rounding]) / 5, top)
    errors.set_xticks(range(len(sites)), [f"{role}\n{block}" for role, block in sites], fontsize=9)
    errors.set_xlim(-0.6, len(sites) - 0.4)
    errors.set_title("Error of each attention call (lower is better; relative L2 against float64)", fontsize=10)
    errors.set_xlabel("role and block of the call", fontsize=9)
    errors.grid(axis="y", color="#dddddd", linewidth=0.6)
    times.set_yticks([])
    times.set_ylim(len(rows) - 0.4, -0.6)
    longest = max((row.step_ms.high for row in rows if row.step_ms), default=1.0)
    times.set_xlim(0, 1.9 * longest)
    times.set_title("Time of all these calls (median; line: least to most)", fontsize=10)
    times.set_xlabel("ms", fontsize=9)
    for axes in (errors, times):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
