"""The placeholder for a backend whose file cannot be loaded: only that backend is lost."""

from __future__ import annotations

from ..values.platform import Platform
from .backend import Backend


class BrokenBackend(Backend):
    """Keeps the id and is unavailable everywhere, with the reason."""

    candidate = False
    by_name_only = True
    summary = "Its file cannot be loaded."

    def __init__(self, backend_id: str, reason: str) -> None:
        self.id = backend_id  # type: ignore[misc]  # each instance is its own backend
        self.reason = reason

    def unavailable_reasons(self, platform: Platform) -> list[str]:
        return [self.reason]
