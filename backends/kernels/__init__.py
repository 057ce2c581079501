"""One file for each backend, and `registry.py`, the list of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backend import Backend

    BACKENDS: dict[str, Backend]


def __getattr__(name: str) -> object:
    """`BACKENDS`, every backend by id, is made when it is asked for."""
    if name != "BACKENDS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .registry import every

    return every()
