"""The sheet that figures are drawn on: text that wraps by its measured width, and axes, from the top down.

A sheet is `SHOWN` pixels wide in a Preview Image node; the smallest text is `SMALLEST` pixels high there.

Boundary: matplotlib's Figure, not pyplot: no window, and no state of the process.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .metrics import need
from .report import Report
from .tables import ABOUT, ABOUT_MEANS, speed_in_words, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, DARK, ALARM = "#5f6672", "#1d2430", "#b00020"
SHOWN, SMALLEST = 560, 11
"""Pixels on the screen: the width of a node that shows a picture, and the least height of a letter in it."""
WIDTH, DPI = 7.0, 160
"""Inches, and dots per inch: twice as many pixels as are shown."""
MOST_LETTERS = 2000
"""Of one text, however it wraps."""
SMALL, NORMAL, LARGE = 10.0, 11.0, 13.5
"""Sizes of text in points."""
MARGIN = 0.25
"""Inches at the border."""
INNER = WIDTH - 2 * MARGIN
LINE_SPACING = 1.2
MOST_LINES = 6
"""Of one text; a label of sixty letters fits into the narrowest column."""


class Sheet:
    """A white sheet of `WIDTH` that grows downwards; positions in inches from the upper left."""

    def __init__(self) -> None:
        transforms = need("matplotlib.transforms")
        self.figure: Figure = need("matplotlib.figure").Figure(figsize=(WIDTH, 1), dpi=DPI, facecolor="white")
        self.y = MARGIN
        self._down = transforms.Affine2D()
        self._inches = self.figure.dpi_scale_trans + self._down
        self._placed: list[tuple[Axes, tuple[float, float, float, float]]] = []

    def write(
        self,
        text: str,
        x: float = MARGIN,
        y: float | None = None,
        width: float = INNER,
        *,
        size: float = SMALL,
        bold: bool = False,
        colour: str = DARK,
        align: str = "left",
        most: int = MOST_LINES,
    ) -> float:
        """Write text, wrapped to `width` from `x` on, and return its height; without `y` below what is there.

        Characters are what they are: a dollar sign does not start a formula.
        """
        lines = wrap(text, width, size, bold, most)
        at = x + {"left": 0.0, "center": width / 2, "right": width}[align]
        if text:
            self.figure.text(
                at, -(self.y if y is None else y), "\n".join(lines), transform=self._inches, fontsize=size,
                weight="bold" if bold else "normal", color=colour, va="top", ha=align, parse_math=False,
                linespacing=LINE_SPACING,
            )  # fmt: skip
        height = len(lines) * line_height(size) if text else 0.0
        if y is None:
            self.y += height
        return height

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes whose upper left corner is at `x`, `y`."""
        made = self.figure.add_axes((0.0, 0.0, 1.0, 1.0), label=str(len(self._placed)))
        self._placed.append((made, (x, y, width, height)))
        return made

    def finish(self) -> Figure:
        """The figure, as high as it has become."""
        height = self.y + MARGIN
        self.figure.set_size_inches(WIDTH, height)
        self._down.translate(0, height * DPI)
        for axes, (x, y, wide, tall) in self._placed:
            axes.set_position((x / WIDTH, 1 - (y + tall) / height, wide / WIDTH, tall / height))
        return self.figure


def line_height(size: float) -> float:
    """Inches from one line of text to the next."""
    return size * LINE_SPACING * 1.16 / 72


def wrap(text: str, width: float, size: float, bold: bool = False, most: int = MOST_LINES) -> list[str]:
    """Lines that fit into `width` inches, broken at spaces, and in a word only where one has no room for it.

    Of a text with more than `most` lines the last one ends in three dots.
    """
    lines: list[str] = []
    text = text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}..."
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if text_width(longer, size, bold) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            while text_width(word, size, bold) > width and len(word) > 1:
                fits = max(1, sum(text_width(word[:end], size, bold) <= width for end in range(1, len(word))))
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines.append(line)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and text_width(f"{last}...", size, bold) > width:
        last = last[:-1]
    return [*lines[: most - 1], f"{last}..."]


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Inches that a line of text takes, rounded up by a little for what a renderer adds."""
    return 1.01 * sum(_advance(letter, bold) for letter in text) * size / 72


@lru_cache(maxsize=1024)
def _advance(letter: str, bold: bool) -> float:
    """Width of a letter as a part of the size of its font."""
    properties = need("matplotlib.font_manager").FontProperties(weight="bold" if bold else "normal", size=100)
    width: float = need("matplotlib.textpath").text_to_path.get_text_width_height_descent(letter, properties, False)[0]
    return width / 100


def heading(sheet: Sheet, report: Report) -> None:
    """Title, one verdict for each row, and what was compared."""
    title = {
        "end_to_end": "Attention backends on the same seed",
        "one_step": "Attention backends on one step from the same latent",
        "attention": "Attention backends on the same query, key and value",
    }[report.mode]
    sheet.write(title, size=LARGE, bold=True)
    sheet.y += 0.06
    for row in report.rows:
        sheet.write(verdict(row, report), size=NORMAL, colour=ALARM if row.failed or row.broken else DARK)
    sheet.y += 0.06
    sheet.write(report.subject(150), colour=GREY, most=3)
    sheet.y += 0.1


def footer(sheet: Sheet, report: Report) -> None:
    """What `about` means where it stands, and the machine."""
    sheet.y += 0.1
    if any(speed_in_words(row, report).startswith(ABOUT) for row in report.rows):
        sheet.write(ABOUT_MEANS, colour=GREY)
    sheet.write(f"{report.machine}; torch {report.versions.get('torch', 'unknown')}", colour=GREY)


def bare(axes: Any) -> None:
    """No ticks, a thin frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#c5cad3")
