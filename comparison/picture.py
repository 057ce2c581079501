"""Draws a comparison: pictures side by side with what ran, and below each where it differs from the reference.

Boundary: matplotlib and torch tensors; it draws what a report says and measures nothing.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .canvas import ALARM, DARK, DPI, GREY, MARGIN, box, heading, new_figure
from .chart import draw_calls
from .metrics import need
from .report import LEVEL, Report, Row
from .tables import most, speed, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4
"""Panels side by side before the next band begins."""
MOST_FRAMES = 4
SCALE = (1e-4, 255.0)
"""The differences that the colours span, in 8-bit levels: fixed, so that any two figures can be compared."""
NAN_COLOUR = (1.0, 0.0, 1.0)
PANEL, GAP = 2.75, 0.25
HEAD, SEAM, FOOT = 0.76, 0.12, 0.92
"""Inches: width of a panel, space between panels; text above a picture, picture to map, text below."""


def draw_pictures(report: Report, pictures: Sequence[Tensor | None]) -> Figure:
    """Draw a comparison of pictures.

    Args:
        pictures: for each row of the report (frames, height, width, 3) in 0..1, or None where nothing came out;
            the first is the reference. Of more than four frames, four are shown, spread over the whole length.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: there are not as many pictures as rows.
    """
    if len(pictures) != len(report.rows) or not pictures:
        raise ValueError(f"{len(pictures)} pictures for {len(report.rows)} rows: give one, or None, for each")
    reference = pictures[0]
    strips = [None if picture is None else _strip(picture) for picture in pictures]
    shown = next((strip for strip in strips if strip is not None), torch.zeros(1, 1, 3))
    panel = PANEL * min(2.0, max(1.0, shown.shape[1] / shown.shape[0] / 1.6))
    tall = panel * shown.shape[0] / shown.shape[1]
    columns = min(COLUMNS, len(pictures), max(1, int(12.5 / panel)))
    rows_of = [strips[at : at + columns] for at in range(0, len(strips), columns)]
    full, words_only = HEAD + tall + SEAM + tall + FOOT, HEAD + tall + GAP
    bands = [words_only if all(strip is None for strip in band) else full for band in rows_of]
    width = max(9.0, 2 * MARGIN + columns * panel + (columns - 1) * GAP)
    top, bottom = 0.95, 1.05
    height = top + sum(bands) + bottom
    figure = new_figure(width, height)
    heading(figure, report, width, height)
    colours, norm = _difference_colours()
    for at, (row, picture, strip) in enumerate(zip(report.rows, pictures, strips, strict=True)):
        x = MARGIN + (at % columns) * (panel + GAP)
        y = height - top - sum(bands[: at // columns])
        _label(figure, report, row, x / width, y / height, height, panel)
        image = figure.add_axes(box(x, y - HEAD - tall, panel, tall, width, height))
        below = figure.add_axes(box(x, y - HEAD - 2 * tall - SEAM, panel, tall, width, height))
        foot = (x + panel / 2) / width, (y - HEAD - 2 * tall - SEAM - 0.08) / height
        if strip is None or picture is None:
            _blank(image, textwrap.fill(f"did not run: {row.failed}", int(panel * 12.5)), ALARM)
            below.set_axis_off()
            continue
        image.imshow(_without_nan(strip), interpolation="nearest" if max(strip.shape) < 400 else "antialiased")
        _bare(image)
        if at == 0:
            words = "reference:\neach map shows where\nits picture differs\nfrom this one"
            _blank(below, textwrap.fill(row.verdict, int(panel * 12.5)) if row.broken else words,
                   ALARM if row.broken else GREY)  # fmt: skip
            figure.text(*foot, _frames_text(picture), ha="center", va="top", fontsize=9, color=GREY)
        elif reference is None:
            _blank(below, "no reference to compare with", GREY)
        else:
            below.imshow(
                _difference(picture, reference, int(panel * DPI)), cmap=colours, norm=norm, interpolation="nearest"
            )
            _bare(below)
            _foot(figure, row, *foot, height, panel)
    _colour_bar(figure, colours, norm, width, height)
    return figure


def draw(report: Report, pictures: Sequence[Tensor | None]) -> Figure:
    """The figure that fits the report's mode."""
    return draw_calls(report) if report.mode == "attention" else draw_pictures(report, pictures)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=DPI, format="png")


def to_tensor(figure: Figure) -> Tensor:
    """A figure as a picture (1, height, width, 3) in 0..1."""
    canvas = need("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    columns, rows = canvas.get_width_height()
    return pixels.view(1, rows, columns, 4)[..., :3].float() / 255


def _label(figure: Figure, report: Report, row: Row, x: float, y: float, height: float, panel: float) -> None:
    """Name, time and speed-up over a picture."""
    name = textwrap.shorten(row.name, int(panel * 10), placeholder="...")
    colour = ALARM if row.failed or row.broken else DARK
    figure.text(x, y - 0.08 / height, name, fontsize=12, weight="bold", color=colour, va="top")
    if row.step_ms is None:
        return
    middle, _, rest = spread(row.step_ms).partition(" ")
    gain = "reference" if row is report.rows[0] else f"speed {speed(row, report)}" if row.speedup else ""
    figure.text(x, y - 0.33 / height, f"{middle} ms per step {rest}\n{gain}", fontsize=10, color=DARK, va="top")


def _foot(figure: Figure, row: Row, x: float, y: float, height: float, panel: float) -> None:
    """Verdict, largest difference and metrics below a difference map."""
    colour = ALARM if row.failed or row.broken else DARK
    verdict = textwrap.wrap(row.verdict, int(panel * 12.5), max_lines=2, placeholder="...")
    figure.text(x, y, "\n".join(verdict), ha="center", va="top", fontsize=10, weight="bold", color=colour)
    if row.max_difference is None or row.psnr is None:
        return
    largest = "NaN" if math.isnan(row.max_difference) else f"{most(row)} of 255"
    ratio = "infinite" if row.psnr == math.inf else "NaN" if math.isnan(row.psnr) else f"{row.psnr:.1f} dB"
    similar = "" if row.ssim is None else f", SSIM {row.ssim:.4f}".replace("nan", "NaN")
    y -= 0.21 * max(1, len(verdict)) / height
    text = f"largest difference {largest}\nPSNR {ratio}{similar}"
    figure.text(x, y, text, ha="center", va="top", fontsize=9, color=DARK, linespacing=1.35)


def _frames_text(picture: Tensor | None) -> str:
    if picture is None or len(picture) < 2:
        return ""
    numbers = ", ".join(str(at + 1) for at in _picked(len(picture)))
    return f"frames {numbers} of {len(picture)}, from left to right"


def _picked(count: int) -> list[int]:
    """Up to four frames, from the first to the last."""
    shown = min(count, MOST_FRAMES)
    return [round(at * (count - 1) / max(1, shown - 1)) for at in range(shown)]


def _strip(video: Tensor) -> Tensor:
    """Frames side by side: (height, frames * width, channels), on the CPU."""
    return torch.cat([video[at].detach().float().cpu() for at in _picked(len(video))], dim=1)


def _without_nan(strip: Tensor) -> Any:
    shown = torch.where(strip.isfinite().all(-1, keepdim=True), strip, torch.tensor(NAN_COLOUR))
    return shown.clamp(0, 1).numpy()


def _difference(picture: Tensor, reference: Tensor, room: int) -> Any:
    """The largest difference of the three colours in 8-bit levels, (height, width); NaN where it is not finite.

    A map wider than `room` pixels is reduced by its maximum, so that one wrong pixel stays.
    """
    levels = (_strip(picture) - _strip(reference)).abs().amax(-1) / LEVEL
    levels = torch.where(levels.isfinite(), levels, math.inf)  # the maximum below is to keep them
    factor = math.ceil(levels.shape[1] / room)
    if factor > 1:
        levels = F.max_pool2d(levels[None, None], factor, ceil_mode=True)[0, 0]
    # Zero has no logarithm: equal pixels go below the scale, whose colour is black.
    return torch.where(levels.isfinite(), levels.clamp(min=SCALE[0] / 10), math.nan).numpy()


def _difference_colours() -> tuple[Any, Any]:
    """Black for equal, blue up to one 8-bit level, then yellow to red; magenta for NaN. Logarithmic."""
    colors = need("matplotlib.colors")
    steps, (low, high) = 256, SCALE
    border = round(steps * math.log(1 / low) / math.log(high / low))
    blue = colors.LinearSegmentedColormap.from_list("", ["#0c1220", "#5f83b8"])
    warm = colors.LinearSegmentedColormap.from_list("", ["#ffe28a", "#ff9a2e", "#d7191c", "#8a0012"])
    table = [blue(at / max(1, border - 1)) for at in range(border)]
    table += [warm(at / (steps - border - 1)) for at in range(steps - border)]
    colours = colors.ListedColormap(table).with_extremes(bad=NAN_COLOUR, under="black")
    return colours, colors.LogNorm(low, high)


def _colour_bar(figure: Figure, colours: Any, norm: Any, width: float, height: float) -> None:
    """The one scale of all difference maps, with numbers and what they mean."""
    mappable = need("matplotlib.cm").ScalarMappable(norm, colours)
    left, wide = 2.75, width - 2.75 - 1.6
    axes = figure.add_axes(box(left, 0.62, wide, 0.16, width, height))
    bar = figure.colorbar(mappable, cax=axes, orientation="horizontal")
    ticks = (0.0001, 0.001, 0.01, 0.1, 1, 10, 100)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=9, length=3)
    bar.outline.set_visible(False)
    low, high = SCALE
    border = math.log(1 / low) / math.log(high / low)
    for at, words in ((border / 2, "too small to see"), ((1 + border) / 2, "can be seen")):
        axes.text(at, 1.15, words, transform=axes.transAxes, ha="center", va="bottom", fontsize=9, color=DARK)
    figure.text(MARGIN / width, 0.70 / height, "Difference, in levels of\nan 8-bit colour (0 to 255)", fontsize=9,
                color=DARK, va="center")  # fmt: skip
    figure.text((left + wide + 0.2) / width, 0.70 / height, "black: equal\nmagenta: NaN", fontsize=9, color=DARK,
                va="center")  # fmt: skip


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#c5cad3")


def _blank(axes: Axes, words: str, colour: str) -> None:
    """A panel with text instead of a picture."""
    axes.set_facecolor("#f1f3f6")
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=colour)
    _bare(axes)
