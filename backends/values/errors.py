"""Errors of configurations and of strict requests, which several folders raise."""

from __future__ import annotations

from .bounded import shortened


class ConfigError(ValueError):
    """An invalid configuration; the message has the part and what is accepted. Long messages are shortened."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


class NoBackendError(RuntimeError):
    """No backend may run the call: strict and the named one cannot, or every one failed."""


class GroupError(RuntimeError):
    """The ranks of a group have stopped: the message has the rank that failed and its reason, where it gave one."""
