"""A kernel benchmark as tables: aligned text for a console, Markdown for a file.

Boundary: it formats what a `BenchReport` holds and computes nothing. ASCII only.
"""

from __future__ import annotations

from collections.abc import Sequence

from .bench import TIMED, WARM_UP, Case, KernelResult
from .bench_report import CUDNN, SDPA, BenchReport, blanks, notes, overlap, ranking, ratio, result, subject
from .tables import BROKEN, DID_NOT_RUN, ROUNDING

COLUMNS = ("rank", "backend", "result", "ms", "spread", "vs SDPA", "vs cuDNN", "rel. L2", "cosine", "peak MB")
KEPT = "kept"
"""A column of cases with sparse backends: the share of query-key pairs that was computed."""

HOW_TO_READ = f"""\
ms is the median of {TIMED} calls after {WARM_UP} for warming up, spread the least and the most; the device is waited
for around each call, and the sets of inputs are cycled so that no cache helps. vs SDPA and vs cuDNN: their time divided
by this one's, above 1 is faster. rel. L2 and cosine: against attention by its definition in float64, which is stricter
than float32, on some query rows of every head. `rounding only`: at most {ROUNDING} times SDPA's own error. peak MB: the
most memory beyond the inputs, the output included. ~ before a ratio or a name: times overlap, so it may be chance."""

CHANCE = "~ before a name: its times overlap with those of the one before it, so their order may be chance"


def cells(case: Case) -> list[list[str]]:
    """A heading and a line for each row: those that ran by rank, then the others."""
    ranked = ranking(case)
    others = [row for row in case.rows if row.status != "ok"]
    sparse = any(row.kept is not None for row in case.rows)
    return [[*COLUMNS, *([KEPT] if sparse else [])]] + [
        [
            str(rank + 1) if row in ranked else "-",
            row.label if row.member in (None, row.backend) else f"{row.backend} -> {row.member}",
            result(row, case),
            _number(row.ms),
            f"{_number(row.low)}-{_number(row.high)}" if row.ms is not None else "-",
            times(row, case, SDPA),
            times(row, case, CUDNN),
            "-" if row.relative_l2 is None else f"{row.relative_l2:.2e}",
            _cosine(row.cosine),
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
            *(["-" if row.kept is None else f"{100 * row.kept:.1f} %"] if sparse else []),
        ]
        for rank, row in enumerate([*ranked, *others])
    ]


def rank_line(case: Case) -> str:
    """`hv15, no mask: a 4.7 ms, ~b 4.8 ms`: all that ran, fastest first."""
    parts: list[str] = []
    before: KernelResult | None = None
    for row in ranking(case):
        close = before is not None and overlap(row, before)
        lossy = "" if row.accuracy == "exact" else f" ({row.accuracy})"
        parts.append(f"{'~' if close else ''}{row.label} {_number(row.ms)} ms{lossy}")
        before = row
    return f"{case.name}: {', '.join(parts) or 'nothing ran'}"


def console(report: BenchReport) -> str:
    """Each case as an aligned table, then the ranking."""
    parts = [f"{report.machine}; torch {report.versions.get('torch', 'unknown')}"]
    for case in _measured(report):
        table = cells(case)
        failed = [row for row in case.rows if row.status != "ok"]
        for line, row in zip(table[len(table) - len(failed) :], failed, strict=True):
            line[2] = DID_NOT_RUN if row.ms is None else BROKEN  # the reason is a note, so that no line wraps
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]) - 1)]
        lines = [
            "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
            for line in table
        ]
        about = f"{case.name}{'' if case.preset is None else f' ({case.preset.title})'}: {subject(case)}"
        parts.append("\n".join([about, *lines, *_said([*_failures(failed), *blanks(case)])]))
    ranked = "\n".join(["Ranking, fastest first", *(f"  {rank_line(case)}" for case in _measured(report))])
    return "\n\n".join([*parts, f"{ranked}\n  {CHANCE}", *filter(None, ["\n".join(_said(notes(report)))])])


def markdown(report: BenchReport) -> str:
    """The whole report as a page."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    parts = [
        "# Attention kernels compared",
        f"Machine: {report.machine}\n\nVersions: {versions}\n\nSeed {report.seed}, {report.dtype}.",
        f"    {report.command}" if report.command else "",
        "\n".join(f"- {note}" for note in notes(report)),
        HOW_TO_READ,
        "## Ranking, fastest first\n\n" + "\n".join(f"- {rank_line(case)}" for case in _measured(report)),
        CHANCE + ".",
        "![Times](benchmark.png)",
    ]
    for case in _measured(report):
        parts.append(f"## {case.name}\n\n{subject(case)}{_source(case)}")
        parts += [_table(cells(case)), "\n".join(f"- {text}" for text in blanks(case))]
    return "\n\n".join(filter(None, parts)) + "\n"


def _measured(report: BenchReport) -> list[Case]:
    """The cases that the run reached."""
    return [case for case in report.cases if case.rows]


def _failures(rows: Sequence[KernelResult]) -> list[str]:
    return [f"{row.label} {DID_NOT_RUN if row.ms is None else 'gave no usable result'}: {row.status}" for row in rows]


def _said(reasons: Sequence[str]) -> list[str]:
    return [f"Note: {reason}" for reason in reasons]


def _source(case: Case) -> str:
    return f". {case.preset.model}; source: {case.preset.source}." if case.preset is not None else ""


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def times(row: KernelResult, case: Case, base: str) -> str:
    """The ratio to another backend such as `1.25x`, with `~` before it where their times overlap."""
    value, other = ratio(row, case, base), case.row(base)
    if value is None or other is None:
        return "-"
    return f"{'~' if row is not other and overlap(row, other) else ''}{value:.2f}x"


def _cosine(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.6f}" if not 0.999999 < value < 1 else f"1 - {1 - value:.1e}"


def _table(table: list[list[str]]) -> str:
    lines = [f"| {' | '.join(text.replace('|', '/') for text in line)} |" for line in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])
