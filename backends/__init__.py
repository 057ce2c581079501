"""Dispatches attention calls to kernels; `attention` and `attention_backend` are the entry points.

Nothing in this package imports ComfyUI, and importing it imports neither torch nor any kernel package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import (
        CheckError,
        GroupError,
        account,
        attention,
        attention_backend,
        checks,
        force_backend,
        read_environment,
    )

__all__ = [
    "CheckError",
    "GroupError",
    "account",
    "attention",
    "attention_backend",
    "checks",
    "force_backend",
    "read_environment",
]


def __getattr__(name: str) -> object:
    """Import public names on access."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)
