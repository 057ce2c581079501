"""A report as tables: aligned text for a console, Markdown for a file.

Boundary: it formats what a `Report` holds and computes nothing. ASCII only.
"""

from __future__ import annotations

import math

from .report import LEVEL, Report, Row, Spread

PICTURE_COLUMNS = (
    "backend", "result", "ms per step", "speed-up", "total s", "attention", "peak MB", "PSNR dB", "SSIM", "max/255",
    "rel. L2", "CLIP",
)  # fmt: skip
ATTENTION_COLUMNS = ("backend", "result", "ms per pass", "speed-up", "worst rel. L2", "worst cosine")
DID_NOT_RUN, STOPPED, FELL_BACK, BROKEN = "did not run", "stopped early", "fell back", "broken"
MOST_RESULT = 28
"""Characters of a failure in a console's table; what is longer is a note below it."""

ROUNDING = 4
"""An error of up to so many times the reference's own counts as rounding, in another order of summation."""

OVERLAP = "~ before a speed: its times overlap with the reference's, so it may be chance"
ABOUT = "about "
ABOUT_MEANS = "about: timed once, or the times overlap with the reference's, so it may be chance"
CLOSE = 1.05
"""Speeds whose ratio is less count as equal in words."""

HOW_TO_READ = """\
Times are of sampling alone, without loading and decoding: the median, then least and most. PSNR, SSIM (its mean over
frames) and max/255 (the largest difference of a colour value, in 8-bit levels) compare decoded pictures with the
reference's, rel. L2 compares latents, CLIP is the cosine of both pictures' CLIP embeddings. `same to the eye`: no
colour differs by a whole level. `a different picture`: PSNR under 30 dB."""

HOW_TO_READ_CALLS = f"""\
Every backend ran on the same query, key and value, taken from the model. Errors are against attention computed in
float64; of long sequences some query rows are checked, spread evenly. A pass is all of these calls once; times are the
median, then least and most. `rounding only`: at most {ROUNDING} times the reference's own error."""


def cells(report: Report) -> list[list[str]]:
    """A heading and a line for each row, as text; without the columns in which nothing was measured."""
    if report.mode == "attention":
        lines = [
            [
                row.name, result(row, report), spread(row.step_ms), speed(row, report),
                _number(row.relative_l2, ".2e"), _cosine(row.cosine),
            ]
            for row in report.rows
        ]  # fmt: skip
        return [list(ATTENTION_COLUMNS), *lines]
    lines = [
        [
            row.name,
            result(row, report),
            spread(row.step_ms),
            speed(row, report),
            spread(row.total_ms, scale=1e-3),
            _number(None if row.attention_share is None else 100 * row.attention_share, ".0f", " %"),
            _memory(row),
            _psnr(row),
            _number(row.ssim, ".5f"),
            most(row),
            _number(row.relative_l2, ".1e"),
            _number(row.clip_similarity, ".4f"),
        ]
        for row in report.rows
    ]
    measured = [at for at in range(len(PICTURE_COLUMNS)) if any(line[at] != "-" for line in lines)]
    return [[line[at] for at in measured] for line in [PICTURE_COLUMNS, *lines]]


def console(report: Report) -> str:
    """The table with columns aligned, then the notes; a result that would make lines wrap is one of them."""
    table = cells(report)
    long = []
    for line, row in zip(table[1:], report.rows, strict=True):
        if (row.failed or row.broken) and len(line[1]) > MOST_RESULT:
            long.append(f"{row.name}: {line[1]}")
            line[1] = BROKEN if row.broken else FELL_BACK if line[1].startswith(FELL_BACK) else _failure(row)
    lines = aligned(table)
    unclear = [OVERLAP] if any(speed(row, report).startswith("~") for row in report.rows) else []
    return "\n".join([*lines, *(f"Note: {note}" for note in [*long, *unclear, *report.notes])])


def aligned(table: list[list[str]]) -> list[str]:
    """Lines of text with columns of equal width."""
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]) - 1)]
    return [
        "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in table
    ]


def markdown(report: Report) -> str:
    """The whole report for people: what was run, the table, frame by frame or call by call, and how to read it."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    parts = [
        "# Attention backends compared",
        f"{report.subject()}. Model: {report.model}. Sampling: {report.sampling}. Mode: {report.mode}.",
        "" if report.mode == "attention" else "![Pictures and differences](comparison.png)",
        markdown_table(cells(report)),
        _how_to_read(report),
    ]
    if report.mode == "attention":
        parts += ["![Errors and times](comparison.png)", "## Call by call", markdown_table(_calls(report))]
    if report.frames > 1 and any(row.frame_scores for row in report.rows):
        parts += ["## Frame by frame", markdown_table(_frames(report))]
    parts += ["\n".join(f"- {note}" for note in [OVERLAP, *report.notes])]
    parts += [f"Machine: {report.machine}\n\nVersions: {versions}", f"    {report.command}" if report.command else ""]
    return "\n\n".join(filter(None, parts)) + "\n"


def spread(value: Spread | None, scale: float = 1.0) -> str:
    """`12.3 (11.9-14.0)`: median, then the least and the most."""
    if value is None:
        return "-"
    middle, low, high = (_short(number * scale) for number in (value.median, value.low, value.high))
    return f"{middle} ({low}-{high})" if value.count > 1 else middle


def speed(row: Row, report: Report) -> str:
    """The speed-up such as `1.25x`, with `~` before it where times overlap with the reference's or ran only once."""
    if row.speedup is None:
        return "-"
    return f"{'' if row is report.rows[0] or is_clear(row, report) else '~'}{row.speedup:.2f}x"


def is_clear(row: Row, report: Report) -> bool:
    """Whether both were timed more than once and their times do not overlap."""
    first, total = report.rows[0].total_ms, row.total_ms
    if first is None or total is None or min(first.count, total.count) < 2:
        return False
    return total.high < first.low or first.high < total.low


def speed_in_words(row: Row, report: Report) -> str:
    """`1.8x faster`, `about 1.2x slower`, `as fast`, `reference`; empty where there is no speed-up.

    A number stands only where half of the faster one's steps took less than any step of the slower one.
    """
    if row is report.rows[0]:
        return "" if row.failed else "reference"
    if row.speedup is None or row.speedup <= 0:
        return ""
    ratio, clear = max(row.speedup, 1 / row.speedup), is_clear(row, report)
    if ratio < CLOSE:
        return "as fast"
    fast, slow = (row, report.rows[0]) if row.speedup > 1 else (report.rows[0], row)
    if not clear and fast.step_ms and slow.step_ms and fast.step_ms.median >= slow.step_ms.low:
        return "no clear difference in speed"
    return f"{'' if clear else ABOUT}{ratio:.2g}x {'faster' if row.speedup > 1 else 'slower'}"


def verdict(row: Row, report: Report) -> str:
    """One line for a row: `sage_attn: 1.8x faster, slightly different (PSNR 38 dB)`."""
    if row.failed or row.broken:
        found = result(row, report)
        known = row.broken or found.startswith(FELL_BACK)
        return f"{row.name}: {found if known else f'{_failure(row)}: {found}'}"
    parts = [speed_in_words(row, report)]
    if row is not report.rows[0]:
        parts.append(result(row, report))
    elif row.step_ms:
        parts.append(f"{milliseconds(row.step_ms)} per {'pass' if report.mode == 'attention' else 'step'}")
    said = ", ".join(filter(None, parts))
    ratio = "" if row.psnr is None or not math.isfinite(row.psnr) else f" (PSNR {row.psnr:.0f} dB)"
    return f"{row.name}: {said or 'not compared'}{ratio}"


def _failure(row: Row) -> str:
    return DID_NOT_RUN if row.step_ms is None else STOPPED


def milliseconds(value: Spread) -> str:
    """The median alone, such as `12.3 ms`."""
    return f"{_short(value.median)} ms"


def _short(number: float, digits: int = 3) -> str:
    return f"{number:.0f}" if number >= 10 ** (digits - 1) else f"{number:.{digits}g}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{form}}{unit}" if math.isfinite(value) else str(value)


def _cosine(value: float | None) -> str:
    """1 is printed only for what is 1: a rounding difference shows as the distance from it."""
    return _number(value, ".6f") if value is None or not 0.999999 < value < 1 else f"1 - {1 - value:.1e}"


def _psnr(row: Row) -> str:
    return "identical" if row.identical else _number(row.psnr, ".1f")


def most(row: Row) -> str:
    """The largest difference in 8-bit levels."""
    return "-" if row.max_difference is None else _short(row.max_difference / LEVEL, digits=2)


def _memory(row: Row) -> str:
    if row.peak_memory is None:
        return "-"
    less = "" if row.memory_reduction is None else f" ({-100 * row.memory_reduction:+.0f} %)"
    return f"{row.peak_memory / 1e6:.1f}{less}"


def result(row: Row, report: Report) -> str:
    """What came out, in a few words."""
    first = report.rows[0]
    if row.failed or row.broken:
        sentence = row.verdict
    elif row is first:
        sentence = "reference"
    elif report.mode == "attention" and row.relative_l2 is not None and first.relative_l2:
        rounding = row.relative_l2 <= ROUNDING * first.relative_l2
        sentence = "rounding only" if rounding else f"error {100 * row.relative_l2:.2g} % of the result"
    else:
        sentence = row.verdict
    return f"{sentence}; runs differ" if row.repeatable is False else sentence


def markdown_table(table: list[list[str]]) -> str:
    """A heading and lines as a Markdown table."""
    lines = [f"| {' | '.join(text.replace('|', '/') for text in line)} |" for line in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def _frames(report: Report) -> list[list[str]]:
    scored = [row for row in report.rows if row.frame_scores]
    heading = ["frame", *(f"{row.name}: PSNR dB, SSIM" for row in scored)]
    lines = [
        [str(number + 1), *(f"{_frame_psnr(row, number)}, {row.frame_scores[number].ssim:.5f}" for row in scored)]
        for number in range(report.frames)
    ]
    return [heading, *lines]


def _frame_psnr(row: Row, number: int) -> str:
    value = row.frame_scores[number].psnr
    return "identical" if value == math.inf else f"{value:.1f}"


def _calls(report: Report) -> list[list[str]]:
    heading = ["backend", "role", "block", "call", "ms", "rel. L2", "cosine", "result"]
    return [heading] + [
        [row.name, call.role, call.block, call.request, spread(call.ms), _number(call.relative_l2, ".2e"),
         _cosine(call.cosine), call.broken or ""]
        for row in report.rows for call in row.calls
    ]  # fmt: skip


def _how_to_read(report: Report) -> str:
    return HOW_TO_READ_CALLS if report.mode == "attention" else f"The reference is {report.rows[0].name}. {HOW_TO_READ}"
