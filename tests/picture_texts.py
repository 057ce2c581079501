"""What a figure's texts look like in a Preview Image node that is 560 pixels wide: size, borders, overlap."""

from __future__ import annotations

import re
from typing import Any
from unittest.mock import patch

SHOWN, SMALLEST = 560, 11
LABEL = "a_label_of_sixty_letters_that_a_person_may_well_type_in_here"
assert len(LABEL) == 60


def texts_of(figure: Any) -> list[Any]:
    """Every text that is drawn, tick labels included; the figure is laid out, not rendered."""
    from matplotlib.text import Text

    found: list[Any] = []
    draw = Text.draw

    def noting(self: Any, renderer: Any) -> None:
        if self.get_visible() and self.get_text():
            found.append(self)
        draw(self, renderer)

    with patch.object(Text, "draw", noting):
        figure.draw_without_rendering()
    return found


def check_readable(figure: Any) -> list[str]:
    """The figure's texts; fails for one that is small when shown, leaves the sheet, or stands on another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    texts = texts_of(figure)
    assert len(texts) > 3
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for text in texts:
        shown = text.get_fontsize() * figure.dpi / 72 * SHOWN / figure.bbox.width
        assert shown >= SMALLEST, f"{text.get_text()!r} is {shown:.1f} pixels high"
        assert "^" not in text.get_text(), f"raised digits of {text.get_text()!r} are smaller"
    for at, (one, here) in enumerate(boxes):
        inside = here.x0 >= 0 and here.y0 >= 0 and here.x1 <= figure.bbox.width and here.y1 <= figure.bbox.height
        assert inside, f"{one!r} leaves the sheet: {here}"
        for other, there in boxes[:at]:
            assert not here.overlaps(there), f"{one!r} stands on {other!r}"
    return [one for one, _ in boxes]


def says(texts: list[str], label: str) -> bool:
    """Whether a label stands in full in one of the texts, on however many lines."""
    return any(label in re.sub(r"\s+", "", text) for text in texts)
