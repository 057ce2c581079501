"""The sheet that figures are drawn on, with its heading and footer.

Boundary: matplotlib's Figure, not pyplot: no window, and no state of the process.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from .metrics import need
from .report import Report
from .tables import OVERLAP, speed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY, DARK, ALARM = "#5f6672", "#1d2430", "#b00020"
DPI = 110
MARGIN = 0.3
"""Inches at the border."""


def new_figure(width: float, height: float) -> Figure:
    """An empty white sheet; sizes in inches."""
    figure: Figure = need("matplotlib.figure").Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    return figure


def box(x: float, y: float, w: float, h: float, width: float, height: float) -> tuple[float, float, float, float]:
    """A rectangle in inches, from the lower left, as the fractions that matplotlib takes."""
    return x / width, y / height, w / width, h / height


def heading(figure: Figure, report: Report, width: float, height: float) -> None:
    """Title and subject at the top, the machine at the bottom."""
    title = {
        "end_to_end": "Same model, same seed, same noise: only the attention backend differs",
        "one_step": "One step from the same latent: only the attention backend differs",
        "attention": "Attention alone: the same query, key and value for every backend",
    }[report.mode]
    figure.text(MARGIN / width, 1 - 0.22 / height, title, fontsize=14, weight="bold", color=DARK, va="top")
    lines = int(width * 13)
    figure.text(MARGIN / width, 1 - 0.54 / height, report.subject(lines), fontsize=9.5, color=DARK,
                va="top")  # fmt: skip
    torch_version = report.versions.get("torch", "unknown")
    foot = [f"{report.machine}; torch {torch_version}"]
    if any(speed(row, report).startswith("~") for row in report.rows):
        foot.insert(0, OVERLAP)  # on a separate line: on a narrow sheet one line has no room for both
    text = "\n".join(textwrap.shorten(line, int(width * 16)) for line in foot)
    figure.text(MARGIN / width, (0.12 if len(foot) == 1 else 0.07) / height, text, fontsize=8, color=GREY, va="bottom")
