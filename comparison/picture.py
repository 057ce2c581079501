"""Draws a comparison: pictures side by side with what ran, and below each where it differs from the reference.

Boundary: matplotlib and torch tensors; it draws what a report says and measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .canvas import (
    ALARM,
    DARK,
    DPI,
    GREY,
    INNER,
    MARGIN,
    NORMAL,
    SMALL,
    Sheet,
    bare,
    footer,
    heading,
    line_height,
    wrap,
)
from .chart import draw_calls
from .metrics import need
from .report import LEVEL, Report, Row
from .tables import most, speed_in_words, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_FRAMES = 4
SCALE = (1e-4, 255.0)
"""The differences that the colours span, in 8-bit levels: fixed, so that any two figures can be compared."""
NAN_COLOUR = (1.0, 0.0, 1.0)
WIDE, WIDER = 1.3, 3.0
"""Width by height of a panel's picture, from which on two stand side by side, and one alone."""
TALLEST, LOW = 4.5, 1.25
"""Inches of a picture, and of panels where none of a band ran."""
GAP, SEAM = 0.2, 0.08
"""Inches between panels, and between the parts of one."""


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
    strips = [None if picture is None else _strip(picture) for picture in pictures]
    shown = next((strip for strip in strips if strip is not None), torch.zeros(1, 1, 3))
    shape = shown.shape[1] / shown.shape[0]
    columns = columns_of(len(pictures), shape)
    panel = (INNER - (columns - 1) * GAP) / columns
    tall = min(panel / shape, TALLEST)
    sheet = Sheet()
    heading(sheet, report)
    colours, norm = _difference_colours()
    panels = list(zip(report.rows, pictures, strips, strict=True))
    for first in range(0, len(panels), columns):
        band = panels[first : first + columns]
        heads = [_head(row, report, panel) for row, _, _ in band]
        sheet.y += max(map(_height, heads)) + SEAM
        top, maps = sheet.y, sheet.y + tall + SEAM
        blank = all(strip is None for _, _, strip in band)
        high = min(tall, LOW) if blank else tall
        feet: list[Words] = []
        for column, (row, picture, strip) in enumerate(band):
            x = MARGIN + column * (panel + GAP)
            _write(sheet, heads[column], x, top - SEAM - _height(heads[column]), panel)
            image = sheet.axes(x, top, panel, high)
            if strip is None or picture is None:
                _blank(image, f"did not run: {row.failed}", panel, ALARM)
                continue
            image.imshow(_without_nan(strip), interpolation="nearest" if max(strip.shape) < 400 else "antialiased",
                         aspect="auto" if tall == panel / shape else "equal")  # fmt: skip
            bare(image)
            below = sheet.axes(x, maps, panel, tall)
            foot = _map(below, row, picture, pictures[0], colours, norm, first + column == 0, panel)
            _write(sheet, foot, x, maps + tall + SEAM, panel)
            feet.append(foot)
        sheet.y = top + high if blank else maps + tall + SEAM + max(map(_height, feet))
        sheet.y += GAP
    _colour_bar(sheet, colours, norm)
    footer(sheet, report)
    return sheet.finish()


def columns_of(count: int, shape: float) -> int:
    """How many panels stand side by side, by their number and their pictures' width by height."""
    if shape >= WIDER:
        return 1
    return min(count, 2 if shape >= WIDE or count in (2, 4) else 3)


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


Words = list[tuple[str, float, bool, str]]
"""Texts under one another: each with size, bold or not, and colour."""


def _head(row: Row, report: Report, panel: float) -> Words:
    """Name, speed and time over a picture."""
    words: Words = [(row.name, NORMAL, True, ALARM if row.failed or row.broken else DARK)]
    if row.step_ms is not None:
        words.append((speed_in_words(row, report), SMALL, False, DARK))
        middle, _, rest = spread(row.step_ms).partition(" ")
        words.append((f"{middle} ms per step {rest}", SMALL, False, DARK))
    return _wrapped(words, panel)


def _foot(row: Row) -> Words:
    """Verdict, largest difference and metrics below a difference map."""
    words: Words = [(row.verdict, NORMAL, True, ALARM if row.failed or row.broken else DARK)]
    if row.max_difference is None or row.psnr is None:
        return words
    largest = "NaN" if math.isnan(row.max_difference) else f"{most(row)} of 255"
    ratio = "infinite" if row.psnr == math.inf else "NaN" if math.isnan(row.psnr) else f"{row.psnr:.1f} dB"
    similar = "" if row.ssim is None else f", SSIM {row.ssim:.4f}".replace("nan", "NaN")
    words += [(f"largest difference {largest}", SMALL, False, DARK), (f"PSNR {ratio}{similar}", SMALL, False, DARK)]
    return words


def _map(
    axes: Axes, row: Row, picture: Tensor, reference: Tensor | None, colours: Any, norm: Any, first: bool, panel: float
) -> Words:
    """Draw where a picture differs from the reference; what stands below."""
    if first:
        words = row.verdict if row.broken else "reference: each map shows where its picture differs from this one"
        _blank(axes, words, panel, ALARM if row.broken else GREY)
        return _wrapped([(_frames_text(picture), SMALL, False, GREY)], panel)
    if reference is None:
        _blank(axes, "no reference to compare with", panel, GREY)
        return []
    levels = _difference(picture, reference, int(panel * DPI))
    axes.imshow(levels, cmap=colours, norm=norm, interpolation="nearest", aspect="auto")
    if row.max_difference == 0:
        axes.text(0.5, 0.5, "identical", transform=axes.transAxes, ha="center", va="center", fontsize=NORMAL,
                  color="white", weight="bold")  # fmt: skip
    bare(axes)
    return _wrapped(_foot(row), panel)


def _wrapped(words: Words, panel: float) -> Words:
    return [
        ("\n".join(wrap(text, panel, size, bold)), size, bold, colour) for text, size, bold, colour in words if text
    ]


def _height(words: Words) -> float:
    return sum(len(text.split("\n")) * line_height(size) for text, size, _, _ in words if text)


def _write(sheet: Sheet, words: Words, x: float, y: float, panel: float) -> None:
    for text, size, bold, colour in words:
        y += sheet.write(text, x, y, panel, size=size, bold=bold, colour=colour)


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


def _colour_bar(sheet: Sheet, colours: Any, norm: Any) -> None:
    """The one scale of all difference maps, with numbers and what they mean."""
    sheet.write("Difference, in levels of an 8-bit colour (0 to 255). Black: equal. Magenta: NaN.")
    mappable = need("matplotlib.cm").ScalarMappable(norm, colours)
    sheet.y += 0.25
    axes = sheet.axes(MARGIN + 0.2, sheet.y, INNER - 0.4, 0.16)
    bar = sheet.figure.colorbar(mappable, cax=axes, orientation="horizontal")
    ticks = (0.0001, 0.001, 0.01, 0.1, 1, 10, 100)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=SMALL, length=3)
    bar.outline.set_visible(False)
    low, high = SCALE
    border = math.log(1 / low) / math.log(high / low)
    for at, words in ((border / 2, "too small to see"), ((1 + border) / 2, "can be seen")):
        axes.text(at, 1.15, words, transform=axes.transAxes, ha="center", va="bottom", fontsize=SMALL, color=DARK)
    sheet.y += 0.45


def _blank(axes: Axes, words: str, panel: float, colour: str) -> None:
    """A panel with text instead of a picture."""
    axes.set_facecolor("#f1f3f6")
    axes.text(0.5, 0.5, "\n".join(wrap(words, panel - 0.2, SMALL)), transform=axes.transAxes, ha="center", va="center",
              fontsize=SMALL, color=colour, parse_math=False)  # fmt: skip
    bare(axes)
