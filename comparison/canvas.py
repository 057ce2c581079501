"""The sheet that figures are drawn on: its heading and footer, and what becomes of it.

Boundary: matplotlib's Figure, not pyplot: no window, and no state of the process.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .metrics import need
from .report import Report

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
    machine = textwrap.shorten(f"{report.machine}; torch {torch_version}", lines)
    figure.text(MARGIN / width, 0.12 / height, machine, fontsize=8, color=GREY, va="bottom")


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
