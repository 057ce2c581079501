"""Draws a kernel benchmark: horizontal bars of the times, one panel for each case, fastest at the top.

Boundary: matplotlib; it draws what a report says and measures nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .bench import Case
from .bench_report import SDPA, BenchReport, in_words, ranking, ratio, title
from .bench_tables import times
from .canvas import ALARM, DARK, GREY, INNER, LARGE, NORMAL, SMALL, Sheet
from .chart import NAMES, TIMES, labelled_rows
from .metrics import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"exact": "#3f6ea5", "quantized": "#c9822b", "sparse": "#7a5ea8"}


def draw_benchmark(report: BenchReport) -> Figure:
    """Draw every case that the run reached; what did not run is a line of text with its reason.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    cases = [case for case in report.cases if case.rows]
    sheet = Sheet()
    sheet.write("Attention kernels on the same inputs", size=LARGE, bold=True)
    sheet.y += 0.06
    for case in cases:
        sheet.write(in_words(case), size=NORMAL)
    sheet.y += 0.06
    sheet.write(_subject(report), colour=GREY)
    sheet.y += 0.12
    for case in cases:
        _panel(sheet, case)
    for line in _not_run(cases):
        sheet.write(line, colour=ALARM)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    sheet.y += 0.1
    sheet.write(f"{report.machine}; {versions}", colour=GREY)
    return sheet.finish()


def _subject(report: BenchReport) -> str:
    size = f"longest side {report.tokens} tokens (scaled down)" if report.tokens else "full size"
    reading = "median, line: least to most; ~: may be chance; blue exact, orange quantized, violet sparse"
    ended = f"; ended early: {report.ended}" if report.ended else ""
    return f"{report.dtype}, seed {report.seed}, {size}; {reading}{ended}"


def _panel(sheet: Sheet, case: Case) -> None:
    ranked = ranking(case)
    shape = f"{case.request.num_heads} heads, {case.request.q_len} on {case.request.kv_len}"
    sheet.write(f"{title(case)}: ms per call ({shape})", bold=True)
    sheet.y += 0.06
    if not ranked:
        sheet.write("nothing ran", colour=ALARM)
        sheet.y += 0.1
        return
    axes, middles = labelled_rows(sheet, [(row.label, DARK) for row in ranked])
    longest = max(row.high or 0.0 for row in ranked)
    room = INNER - NAMES
    axes.set_xlim(0, (longest or 1.0) * room / (room - TIMES))
    for row, y in zip(ranked, middles, strict=True):
        ms = row.ms or 0.0
        gain = "" if row.backend == SDPA or ratio(row, case, SDPA) is None else f", {times(row, case, SDPA)} SDPA"
        axes.barh(y, ms, color=COLOURS.get(row.accuracy, GREY), height=0.17)
        axes.plot([row.low or ms, row.high or ms], [y, y], color=DARK, linewidth=1.2)
        axes.text(row.high or ms, y, f"  {ms:.3g} ms{gain}", va="center", fontsize=SMALL, color=DARK)
    axes.xaxis.set_major_locator(need("matplotlib.ticker").MaxNLocator(nbins=5))
    sheet.y += 0.4


def _not_run(cases: list[Case]) -> list[str]:
    """What did not run and why, each reason once, with the cases where it holds for some of them alone."""
    found: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        for row in case.rows:
            if row not in ranking(case):
                found.setdefault((row.label, row.status), []).append(case)
    return [
        f"{backend}: {reason}" + ("" if len(where) == len(cases) else f" ({'; '.join(title(case) for case in where)})")
        for (backend, reason), where in found.items()
    ]
