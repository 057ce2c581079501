"""Reads and checks fields of untrusted plain data; an error has the path of the field and what was expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .bounded import nearest, shortened
from .request import MOST_SIZE

LONGEST_TEXT = 2000
MOST_NUMBER = 1e300


class Fields:
    """The fields of one mapping. A field without a default is required.

    Raises:
        Exception: `error(message)`, from every method.
    """

    def __init__(self, data: object, where: str = "", error: Callable[[str], Exception] = ValueError) -> None:
        """`where`: path of the mapping."""
        self.where, self._error = where, error
        self.data: Mapping[Any, Any] = data if isinstance(data, Mapping) else {}
        if self.data is not data:
            raise self.wrong("", f"expected a mapping, not {type(data).__name__}")

    def wrong(self, name: str, problem: str) -> Exception:
        """The error to raise about a field; with an empty name about the mapping."""
        return self._error(": ".join(filter(None, (".".join(filter(None, (self.where, name))), problem))))

    def only(self, known: tuple[str, ...]) -> Fields:
        """These fields; other names than the known ones raise."""
        unknown = [str(name) for name in self.data if name not in known]
        if unknown:
            near = nearest(unknown[0], known) if len(unknown) == 1 else []
            hint = f" did you mean {near[0]}?" if near else ""
            raise self.wrong("", f"unknown entry {', '.join(unknown)};{hint} known: {', '.join(known)}")
        return self

    def text(self, name: str, default: str | None = None, least: int = 0) -> str:
        """A text of `least` to `LONGEST_TEXT` characters."""
        value = self.data.get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, f"expected text, not {type(value).__name__}")
        if not least <= len(value) <= LONGEST_TEXT:
            raise self.wrong(name, f"expected a text of {least} to {LONGEST_TEXT} characters, not of {len(value)}")
        return value

    def whole(self, name: str, least: int, default: int | None = None, below: int = MOST_SIZE) -> int:
        """A whole number, `least` <= number < `below`."""
        value = self.data.get(name, default)
        if type(value) is not int or not least <= value < below:
            raise self.wrong(name, f"expected a whole number from {least}, not {shortened(repr(value), 80)}")
        return value

    def number(self, name: str, least: float = -MOST_NUMBER) -> float:
        """A finite number of at least `least`."""
        value = self.data.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < MOST_NUMBER:
            bound = f" from {least:g}" if least > -MOST_NUMBER else ""
            raise self.wrong(name, f"expected a number{bound}, not {shortened(repr(value), 80)}")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self.data.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, f"expected true or false, not {shortened(repr(value), 80)}")
        return value

    def one_of(self, name: str, known: tuple[str, ...], default: str | None = None) -> str:
        """One of the known texts."""
        value = self.data.get(name, default)
        if value not in known:
            raise self.wrong(name, f"{shortened(repr(value), 80)} is not one of {', '.join(filter(None, known))}")
        return str(value)

    def items(self, name: str, default: list[Any] | None = None) -> list[Any]:
        value = self.data.get(name, default)
        if not isinstance(value, list):
            raise self.wrong(name, f"expected a list, not {type(value).__name__}")
        return value

    def inner(self, name: str, default: Mapping[str, Any] | None = None) -> Fields:
        return Fields(self.data.get(name, default), ".".join(filter(None, (self.where, name))), self._error)
