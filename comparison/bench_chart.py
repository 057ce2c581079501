"""Draws a kernel benchmark: horizontal bars of the times, one panel for each case, fastest at the top.

Boundary: matplotlib; it draws what a report says and measures nothing.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from .bench import Case
from .bench_report import SDPA, BenchReport, ranking, ratio
from .bench_tables import times
from .canvas import ALARM, DARK, GREY, MARGIN, box, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"exact": "#3f6ea5", "quantized": "#c9822b", "sparse": "#7a5ea8"}
WIDTH, PANEL, ROW, HEAD, FOOT = 13.0, 0.75, 0.27, 0.75, 0.4
"""Inches: the sheet, what a panel needs beside its bars, one bar, title and footer."""


def draw_benchmark(report: BenchReport) -> Figure:
    """Draw every case that the run reached; what did not run is a line of text with its reason.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    cases = [case for case in report.cases if case.rows]
    pairs = [cases[at : at + 2] for at in range(0, len(cases), 2)]
    heights = [PANEL + ROW * max(len(case.rows) for case in pair) for pair in pairs]
    height = HEAD + FOOT + sum(heights or [ROW])
    figure = new_figure(WIDTH, height)
    title = "Attention kernels: the same inputs for every backend"
    figure.text(MARGIN / WIDTH, 1 - 0.2 / height, title, fontsize=14, weight="bold", color=DARK, va="top")
    figure.text(MARGIN / WIDTH, 1 - 0.5 / height, _subject(report), fontsize=9, color=DARK, va="top")
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    foot = textwrap.shorten(f"{report.machine}; {versions}", 190, placeholder="...")
    figure.text(MARGIN / WIDTH, 0.1 / height, foot, fontsize=8, color=GREY, va="bottom")
    top = height - HEAD
    for pair, tall in zip(pairs, heights, strict=True):
        top -= tall
        for column, case in enumerate(pair):
            left = 1.9 + column * WIDTH / 2
            rows = ROW * len(case.rows)
            rectangle = box(left, top + tall - 0.35 - rows, WIDTH / 2 - 2.2, rows, WIDTH, height)
            _panel(figure, rectangle, case)
    return figure


def _subject(report: BenchReport) -> str:
    size = f"longest side {report.tokens} tokens (scaled down)" if report.tokens else "full size"
    classes = "blue exact, orange quantized, violet sparse"
    ended = f"; ended early: {report.ended}" if report.ended else ""
    text = (
        f"{report.dtype}, seed {report.seed}, {size}; median, line: least to most, ~: may be chance; {classes}{ended}"
    )
    return textwrap.shorten(text, 170, placeholder="...")


def _panel(figure: Figure, rectangle: tuple[float, float, float, float], case: Case) -> None:
    axes = figure.add_axes(rectangle)
    ranked = ranking(case)
    rows = [*ranked, *(row for row in case.rows if row not in ranked)]
    longest = max((row.high or 0.0 for row in ranked), default=1.0)
    for at, row in enumerate(rows):
        if row in ranked and row.ms is not None:
            gain = "" if row.backend == SDPA or ratio(row, case, SDPA) is None else f", {times(row, case, SDPA)} SDPA"
            axes.barh(at, row.ms, color=COLOURS.get(row.accuracy, GREY), height=0.66)
            axes.plot([row.low or row.ms, row.high or row.ms], [at, at], color=DARK, linewidth=1.2)
            axes.text(row.high or row.ms, at, f"  {row.ms:.3g} ms{gain}", va="center", fontsize=8, color=DARK)
        else:
            reason = textwrap.shorten(row.status, 74, placeholder="...")
            axes.text(0, at, f" {reason}", va="center", fontsize=7, color=ALARM)
    axes.set_yticks(
        range(len(rows)), [textwrap.shorten(row.backend, 24, placeholder="...") for row in rows], fontsize=8
    )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.55 * longest)
    axes.set_title(f"{case.name} ({case.request.num_heads} heads, {case.request.q_len} on {case.request.kv_len})",
                   fontsize=9, loc="left", color=DARK)  # fmt: skip
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
