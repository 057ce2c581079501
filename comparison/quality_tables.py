"""What `quality` found as tables: aligned text for a console, Markdown for a file.

Boundary: it formats what a `QualityReport` holds and computes nothing. ASCII only.
"""

from __future__ import annotations

import math

from .quality_report import EQUAL, QualityReport, QualityRow, Summary, summary
from .report import LEVEL
from .tables import aligned, markdown_table, spread

COLUMNS = (
    "backend", "kept", "computed", "ms per step", "total s", "speed-up", "attention ms", "attention speed-up",
    "peak MB", "PSNR dB", "worst", "SSIM", "worst", "temporal", "right",
)  # fmt: skip
NOT_MEASURED = "not measured"

HOW_TO_READ = f"""\
**kept**: mean share of query-key pairs that was computed in calls with a block map. **computed**: the same over all
self-attention calls, where dense steps and other calls that were computed whole count 1. **ms per step** and **total
s** (one clip): median, then least and most; sampling alone, without loading and decoding. **speed-up**: the time of
the reference's clip divided by this one's, prompt by prompt, the median with its 95 % interval; ~ where the interval
holds 1, so that it may be chance. All backends take turns at each step, in a new order each time. **attention ms**:
time in attention for one step, self- and cross-attention, with the choice of blocks. **peak MB**: the most memory of a
step, model included, and how far it is from the reference's. **PSNR** and **SSIM** compare
each frame with the same frame of the reference's clip: the mean over all frames of all prompts, and the worst frame. A
frame that is equal to the bit counts as {EQUAL:g} dB. **temporal**: how much neighbouring frames differ (mean absolute
difference, in levels of an 8-bit colour), and that divided by the reference's own: below 1 the clip moves or flickers
less. **right**: clips whose shapes and directions are those of the caption, as the program `demo/judge_motion.py`
finds."""

VBENCH = """\
## Real models: VBench

These figures are of a small model, and PSNR against dense attention says how far a clip is from the dense one, not
whether it is worse. Smart-Diffusion's document leaves its table of quality "to be tested" with
[VBench](https://github.com/Vchitect/VBench) (Huang et al., CVPR 2024). Its 16 dimensions are:

- quality: subject_consistency, background_consistency, temporal_flickering, motion_smoothness, dynamic_degree,
  aesthetic_quality, imaging_quality
- semantics: object_class, multiple_objects, human_action, color, spatial_relationship, scene, appearance_style,
  temporal_style, overall_consistency

By their names, the columns *Subject*, *Motion* and *Aesthetic* of that document are subject_consistency,
motion_smoothness and aesthetic_quality, and *Quality Score* is VBench's weighted mean of the seven under quality.
VBench measures six of these on videos of your own prompts, all but temporal_flickering. Sample the same prompts and
seeds once with each backend, into a folder for each, and run for each folder and dimension:

    pip install vbench
    vbench evaluate --videos_path FOLDER --dimension subject_consistency --mode=custom_input

The Quality Score and the other dimensions need videos of VBench's own prompts, with the file names that it expects;
leave `--mode` out there. None of this was run here: it needs a GPU and VBench's own models."""


def cells(report: QualityReport) -> list[list[str]]:
    """A heading and a line for each row that ran; without the column of memory where none was measured."""
    lines = [list(COLUMNS)] + [_line(row, summary(row, report), report) for row in report.rows if row.clips]
    measured = [
        at for at, name in enumerate(COLUMNS) if name != "peak MB" or any(line[at] != "-" for line in lines[1:])
    ]
    return [[line[at] for at in measured] for line in lines]


def _line(row: QualityRow, found: Summary, report: QualityReport) -> list[str]:
    temporal = "-" if found.temporal is None else f"{found.temporal / LEVEL:.2f}"
    ratio = "" if found.temporal_ratio is None or row is report.rows[0] else f" ({found.temporal_ratio:.2f})"
    return [
        row.name if row.ran is None or row.ran == row.asked.partition(" ")[0] else f"{row.name} -> {row.ran}",
        _percent(row.kept),
        _percent(row.computed),
        spread(found.step_ms),
        spread(found.total_ms, scale=1e-3),
        _speed(found.speedup),
        "-" if found.attention_ms is None else f"{found.attention_ms:.4g}",
        _speed(found.attention_speedup),
        _memory(row, report.rows[0]),
        "identical" if found.identical else _number(found.psnr, ".1f"),
        _number(found.psnr_worst, ".1f"),
        _number(found.ssim, ".3f"),
        _number(found.ssim_worst, ".3f"),
        temporal + ratio,
        f"{found.right} of {found.count}",
    ]


def console(report: QualityReport) -> str:
    """What was sampled, the table, and the notes."""
    parts = [f"{subject(report)}\n{report.machine}; torch {report.versions.get('torch', 'unknown')}"]
    parts.append("\n".join(aligned(cells(report))))
    parts.append("\n".join(f"Note: {note}" for note in notes(report)))
    return "\n\n".join(filter(None, parts))


def markdown(report: QualityReport) -> str:
    """The whole report as a page."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    load = " at the start, ".join(f"{value:g}" for value in report.load)
    header = [
        f"Machine: {report.machine}",
        f"Load average over a minute: {load} at the end; this run itself is part of the second." if load else "",
        f"Versions: {versions}",
        f"{subject(report)}. Model: {report.model}.",
    ]
    options = [["row", "backend and options"]] + [[row.name, f"`{row.asked}`"] for row in report.rows]
    parts = [
        "# Quality and time of attention backends on the embedded video model",
        "\n\n".join(filter(None, header)),
        f"    {report.command}" if report.command else "",
        markdown_table(cells(report)),
        "\n".join(f"- {note}" for note in notes(report)),
        HOW_TO_READ,
        "![PSNR against time in attention](quality.png)",
        "The first prompt, one line for each backend:",
        "![Frames of the first prompt](frames.png)",
        "## Options\n\n" + markdown_table(options),
        VBENCH,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def subject(report: QualityReport) -> str:
    """What was sampled, in one line."""
    prompts = "1 prompt" if report.prompts == 1 else f"{report.prompts} prompts"
    return (
        f"{prompts}, seed {report.seed}, {report.frames} frames of {report.size}x{report.size} "
        f"({report.tokens} tokens), {report.steps} steps, guidance {report.guidance:g}, {report.dtype}"
    )


def notes(report: QualityReport) -> list[str]:
    """What did not run, what was computed whole, and what could not be measured."""
    found = []
    for row in report.rows:
        if row.failed is not None:
            found.append(f"{row.name} {'stopped early' if row.clips else 'did not run'}: {row.failed}")
        broken = [clip for clip in row.clips if clip.broken]
        if broken:
            found.append(f"{row.name}: {len(broken)} of {len(row.clips)} clips are broken, {broken[0].broken}")
        found += [f"{row.name}: {count} calls computed whole: {reason}" for reason, count in row.whole.items()]
    if all(row.peak_memory is None for row in report.rows):
        found.append(f"peak memory: {NOT_MEASURED}, PyTorch keeps no count on this device that can be reset")
    if report.ended is not None:
        found.append(report.ended)
    return found


def _memory(row: QualityRow, first: QualityRow) -> str:
    """Peak in MB, model included, and how far it is from the reference's."""
    if row.peak_memory is None:
        return "-"
    base = first.peak_memory if row is not first else None
    change = f" ({100 * (row.peak_memory / base - 1):+.0f} %)" if base else ""
    return f"{row.peak_memory / 1e6:.1f}{change}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" if math.isfinite(value) else "NaN"


def _speed(value: dict[str, float] | None) -> str:
    """`1.25x (1.20-1.31)`, with ~ before it where the interval holds 1."""
    if value is None:
        return "-"
    chance = "~" if value["low"] <= 1 <= value["high"] else ""
    return f"{chance}{value['median']:.2f}x ({value['low']:.2f}-{value['high']:.2f})"
