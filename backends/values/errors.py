"""Errors that a configuration or a strict request ends with; raised by several floors."""

from __future__ import annotations

from .bounded import shortened


class ConfigError(ValueError):
    """A configuration that cannot be understood; the message says which part and what is accepted.

    A message that quotes a long text is shortened in its middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


class NoBackendError(RuntimeError):
    """Strict was asked for, and the named backend cannot run the call."""
