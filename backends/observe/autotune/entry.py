"""One measured choice as plain data: what was measured, what was refused and why, and the documents that carry it.

Boundary: values and their checks; files are in `database.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import time
from typing import Any, NamedTuple

from ...measure.call_key import TuningKey
from ...values.bounded import shortened
from ...values.request import MASK_KINDS, MOST_SIZE
from ...values.tolerance import ACCURACY

FORMAT = "attention_backends.measured"
VERSION = 1
MOST_BYTES, MOST_VALUES = 4 << 20, 200_000
"""Of a document, and of the values in it: the most choices that a store keeps, each with long reasons."""
LONGEST_TEXT = 2000
MOST_NAMES = 64
MOST_NUMBER = 1e300
LEAST_MS = 1e-4
"""Times are kept to this."""
KEY_TYPES: dict[str, type] = {
    name: str if name in ("role", "dtype", "mask") else bool if name in ("is_causal", "exact_only") else int
    for name in TuningKey._fields
}


class Entry(NamedTuple):
    """The winner for one kind of call in one environment."""

    key: TuningKey
    environment: str
    accuracy: str
    """The least exact class that was allowed."""
    winner: str
    incumbent: str
    """What `auto` would take."""
    ms: dict[str, float]
    """Median milliseconds of each candidate that was measured."""
    rejected: dict[str, str]
    """Candidates that are out, each with its reason."""
    put_off: dict[str, int]
    """Candidates that were too slow to start; a later run tries them again. How often that happened."""
    written: float
    """Seconds since 1970."""
    origin: str = "run"
    """`run`, or `tune` for the command."""

    @property
    def place(self) -> tuple[str, str, TuningKey]:
        """What it is found by."""
        return self.environment, self.accuracy, self.key

    @property
    def known(self) -> set[str]:
        """Every candidate that it says something about."""
        return {*self.ms, *self.rejected, *self.put_off}

    def words(self) -> str:
        """What was found, for reports: `3.1 ms, 12 % faster than torch_sdpa, 4 candidates`."""
        ms = self.ms[self.winner]
        count = f"{len(self.known)} candidate{'s' if len(self.known) != 1 else ''}"
        before = self.ms.get(self.incumbent)
        if self.winner == self.incumbent or before is None:
            return f"{ms:.3g} ms, none is faster, {count}"
        return f"{ms:.3g} ms, {100 * (1 - ms / before):.0f} % faster than {self.incumbent}, {count}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data; the fields of the key stand beside the others."""
        return {
            **self.key._asdict(),
            "environment": self.environment,
            "accuracy": self.accuracy,
            "winner": self.winner,
            "incumbent": self.incumbent,
            "ms": {name: round(ms, 4) for name, ms in self.ms.items()},
            "rejected": dict(self.rejected),
            "put_off": dict(self.put_off),
            "written": round(self.written, 3),
            "origin": self.origin,
        }


def document(entries: Iterable[Entry]) -> dict[str, Any]:
    """A document that holds these entries."""
    return {"format": FORMAT, "version": VERSION, "entries": [entry.as_dict() for entry in entries]}


def read_document(data: object, most: int) -> list[Entry]:
    """The entries of a document.

    Raises:
        ValueError: it is not as `document` writes it; the message says where.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"not a document of measured choices: format must be {FORMAT!r}")
    if data.get("version") != VERSION:
        raise ValueError(f"version {shortened(repr(data.get('version')), 80)} of the document is not {VERSION}")
    entries = data.get("entries")
    if not isinstance(entries, list) or len(entries) > most:
        raise ValueError(f"entries must be a list of at most {most}")
    found = []
    for number, entry in enumerate(entries):
        try:
            found.append(read(entry))
        except ValueError as error:
            raise ValueError(f"entries[{number}]: {shortened(str(error))}") from error
    return found


def read(data: object) -> Entry:
    """One entry from plain data; what else stands there is left out.

    Raises:
        ValueError: a field is missing or of another kind; the message names it.
    """
    if not isinstance(data, dict):
        raise ValueError("must be an object")
    key = TuningKey(*(_key_field(data, name, kind) for name, kind in KEY_TYPES.items()))  # type: ignore[arg-type]
    entry = Entry(
        key,
        _text(data, "environment"),
        _text(data, "accuracy"),
        _text(data, "winner"),
        _text(data, "incumbent"),
        _mapping(data, "ms", _milliseconds),
        _mapping(data, "rejected", _reason),
        _mapping(data, "put_off", _count),
        min(_number(data, "written"), time()),  # the oldest are dropped first, and none is newer than now
        _text(data, "origin") if "origin" in data else "run",
    )
    if key.mask not in MASK_KINDS:
        raise ValueError(f"mask {key.mask!r} is not one of {', '.join(MASK_KINDS)}")
    if entry.accuracy not in ACCURACY:
        raise ValueError(f"accuracy {entry.accuracy!r} is not one of {', '.join(ACCURACY)}")
    if entry.winner not in entry.ms:
        raise ValueError(f"winner {entry.winner!r} has no time in ms")
    return entry


def _key_field(data: dict[str, Any], name: str, kind: type) -> object:
    value = data.get(name)
    if kind is str:
        return _text(data, name)
    if type(value) is not kind or (type(value) is int and not 0 < value < MOST_SIZE):
        raise ValueError(f"{name} {value!r} is not {'true or false' if kind is bool else 'a number above 0'}")
    return value


def _text(data: dict[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_TEXT:
        raise ValueError(f"{name} must be a text of 1 to {LONGEST_TEXT} characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON's escapes can make half of a character; SQLite takes none
        raise ValueError(f"{name} has half of a character: {error.reason}") from error
    return value


def _number(data: dict[str, Any], name: str) -> float:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MOST_NUMBER:
        raise ValueError(f"{name} {value!r} is not a number of 0 or more")
    return float(value)


def _mapping(data: dict[str, Any], name: str, read_one: Callable[[dict[str, Any], str], Any]) -> dict[str, Any]:
    values = data.get(name)
    if not isinstance(values, dict) or len(values) > MOST_NAMES:
        raise ValueError(f"{name} must be an object with at most {MOST_NAMES} backends")
    if not all(isinstance(backend, str) and len(backend) <= LONGEST_TEXT for backend in values):
        raise ValueError(f"{name}: a backend must be a name")
    try:
        return {backend: read_one(values, backend) for backend in values}
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _milliseconds(values: dict[str, Any], backend: str) -> float:
    ms = _number(values, backend)
    if ms < LEAST_MS:
        raise ValueError(f"{backend} {ms:g} is not a time")
    return ms


def _reason(values: dict[str, Any], backend: str) -> str:
    return _text(values, backend)


def _count(values: dict[str, Any], backend: str) -> int:
    count = values[backend]
    if type(count) is not int or not 0 < count < 2**31:
        raise ValueError(f"{backend} {count!r} is not a number above 0")
    return count
