"""The list of backends on the selector's help page, in every language: order, accuracy and packages from the code.

What each one is, is the declaration's summary in English; other languages' pages hold their own sentence, which stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...backends.config.names import BACKEND_IDS, menu
from ...backends.kernels import BACKENDS
from ...backends.kernels.backend import Backend
from ...backends.kernels.registry import distributions

ROW = re.compile(r"^\| `(\w+)` \|(?:[^|\n]*\|){2} (.*?) \|$", re.MULTILINE)
"""A row: the id, two cells that every language writes alike, and what the backend is."""


def english() -> dict[str, str]:
    """Id -> what it is."""
    return {name: backend.summary for name, backend in BACKENDS.items()}


def sentences(page: str) -> dict[str, str]:
    """Id -> what it is, as a page has it."""
    return dict(ROW.findall(page))


def with_list(page: str, words: Mapping[str, str]) -> str:
    """The page with its list of backends made anew; a backend that `words` lacks has its English sentence."""
    words = {**english(), **words}
    rows = [_row(BACKENDS[name], words[name]) for name in menu("cuda") if name in BACKEND_IDS]
    places = [found.span() for found in ROW.finditer(page)]
    return page[: places[0][0]] + "\n".join(rows) + page[places[-1][1] :]


def _row(backend: Backend, sentence: str) -> str:
    accuracy = "-" if backend.hosted else f"`{backend.accuracy}`"
    packages = ", ".join(f"`{name}`" for name in distributions([backend.id])) or "-"
    return f"| `{backend.id}` | {accuracy} | {packages} | {sentence} |"
