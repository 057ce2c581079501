"""Draws what `quality` found: PSNR against the time in attention, and frames of one prompt.

Boundary: matplotlib and torch tensors; it draws what a report says and measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .canvas import ALARM, DARK, GREY, INNER, LARGE, MARGIN, SMALL, Sheet, bare, line_height, wrap
from .film import side_by_side
from .quality_report import EQUAL, QualityReport, summary
from .quality_tables import subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

COLOURS = ("#3f6ea5", "#c9822b", "#4f8f4f", "#7a5ea8", "#b0433f", "#8a6a4f", "#c45f9a", "#5a5f68", "#9a9a2f", "#3f9fa5")
MARKERS = "osD^vP*X"
HEIGHT = 4.2
"""Inches of the chart."""
NAMES = 2.15
"""Inches for the names beside the frames."""
TALLEST = 0.6
"""Inches of a frame."""
GAP = 0.05
WIDE, HIGH = 0.055, 0.035
"""Of a label in the chart, as shares of its axes."""
MOST_NAME_LINES = 3


def draw_quality(report: QualityReport) -> Figure:
    """Draw PSNR against dense attention over the time in attention of one step; a line joins the rows of a backend.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    sheet = Sheet()
    sheet.write("Quality against time in attention", size=LARGE, bold=True)
    sheet.y += 0.06
    sheet.write(subject(report), colour=GREY)
    reading = "PSNR in dB against dense attention: mean over all frames, line: down to the worst one"
    sheet.write(f"{reading}; with the share of query-key pairs that was computed, dense steps included", colour=GREY)
    sheet.y += 0.15
    axes = sheet.axes(MARGIN + 0.35, sheet.y, INNER - 0.35, HEIGHT)
    sheet.y += HEIGHT + 0.25
    found = [(row, summary(row, report)) for row in report.rows]
    points: dict[str, list[tuple[float, float, float, float | None]]] = {}
    for row, numbers in found[1:]:
        psnr, worst, ms = numbers.psnr, numbers.psnr_worst, numbers.attention_ms
        if ms is None or psnr is None or worst is None or numbers.identical or not math.isfinite(psnr):
            continue
        points.setdefault(row.asked.partition(" ")[0], []).append((ms, psnr, worst, row.computed))
    dense = found[0][1].attention_ms
    if dense is not None:
        axes.axvline(dense, color=DARK, linewidth=1, linestyle="--")
        axes.text(dense, 1.01, report.rows[0].name, transform=axes.get_xaxis_transform(), ha="center",
                  fontsize=SMALL, color=DARK)  # fmt: skip
    for at, (backend, line) in enumerate(points.items()):
        colour, marker = COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)]
        line.sort(key=lambda point: point[:2])
        axes.plot([x for x, *_ in line], [y for _, y, *_ in line], marker=marker, color=colour, label=backend)
        for x, y, worst, _ in line:
            axes.plot([x, x], [worst, y], color=colour, linewidth=0.8, alpha=0.5)
    axes.set_xlabel("ms in attention for one step", fontsize=SMALL)
    axes.set_xlim(0, 1.06 * axes.get_xlim()[1])
    places: list[tuple[float, float]] = []
    for at, line in enumerate(points.values()):
        for x, y, _, computed in line:
            across, up = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
            place = float(across), float(up)
            if computed is None or any(_is_near(place, other) for other in places):
                continue  # it would lie on another label
            places.append(place)
            axes.annotate(f"{100 * computed:.0f} %", (x, y), (5, 5), textcoords="offset points", fontsize=SMALL,
                          color=COLOURS[at % len(COLOURS)])  # fmt: skip
    axes.tick_params(labelsize=SMALL)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if points:
        axes.legend(fontsize=SMALL, frameon=False, loc="best")
    else:
        axes.text(0.5, 0.5, "nothing to compare", transform=axes.transAxes, ha="center", color=ALARM, fontsize=SMALL)
    sheet.y += 0.3
    same = [row.name for row, numbers in found[1:] if numbers.identical]
    if same:
        sheet.write(f"Equal to dense attention to the bit, not drawn: {', '.join(same)}", colour=GREY)
    sheet.write(f"{report.machine}; torch {report.versions.get('torch', 'unknown')}", colour=GREY)
    return sheet.finish()


def _is_near(place: tuple[float, float], other: tuple[float, float]) -> bool:
    return abs(place[0] - other[0]) < WIDE and abs(place[1] - other[1]) < HIGH


def draw_frames(report: QualityReport, clips: Sequence[Tensor | None]) -> Figure:
    """Draw the frames of one prompt, a line for each row, the reference on top.

    Args:
        clips: for each row (frames, height, width, 3) in 0..1, or None where nothing came out.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: there are not as many clips as rows.
    """
    if len(clips) != len(report.rows):
        raise ValueError(f"{len(clips)} clips for {len(report.rows)} rows: give one, or None, for each")
    sheet = Sheet()
    prompt = report.rows[0].clips[0].prompt if report.rows[0].clips else ""
    sheet.write("Frames of one prompt", size=LARGE, bold=True)
    sheet.y += 0.06
    sheet.write(f'"{prompt}", {subject(report)}', colour=GREY)
    sheet.y += 0.12
    for row, clip in zip(report.rows, clips, strict=True):
        first = row.clips[0].psnr if row.clips and row is not report.rows[0] else []
        result: list[str] = []
        if row is report.rows[0]:
            result.append("reference")
        elif first and min(first) == math.inf:
            result.append("identical")
        elif first:
            result.append(f"PSNR {sum(min(value, EQUAL) for value in first) / len(first):.1f} dB")
        if clip is None:
            sheet.write(f"{row.name}: {row.failed or 'nothing came out'}", colour=ALARM)
            sheet.y += GAP
            continue
        strip = side_by_side(clip)
        high = min(TALLEST, (INNER - NAMES) * strip.shape[0] / strip.shape[1])
        lines = wrap(row.name, NAMES - 0.15, SMALL, most=MOST_NAME_LINES) + result
        sheet.write("\n".join(lines), MARGIN, sheet.y, NAMES - 0.15, colour=DARK)
        axes = sheet.axes(MARGIN + NAMES, sheet.y, high * strip.shape[1] / strip.shape[0], high)
        axes.imshow(strip.numpy(), interpolation="nearest", aspect="auto")
        bare(axes)
        sheet.y += max(high, len(lines) * line_height(SMALL)) + GAP
    return sheet.finish()
