"""One result of autotune as plain data: times, rejections, winner; and documents of many, for import and export."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from time import time
from typing import Any, NamedTuple, TypeVar

from ...measure.call_key import TuningKey
from ...values.bounded import shortened
from ...values.fields import LONGEST_TEXT, Fields
from ...values.request import MASK_KINDS
from ...values.tolerance import ACCURACY

Value = TypeVar("Value")

FORMAT = "attention_backends.measured"
VERSION = 1
MOST_BYTES, MOST_VALUES = 4 << 20, 200_000
"""Limits of a document: a full store, each entry with long reasons."""
MOST_NAMES = 64
LEAST_MS = 1e-4
"""Resolution of stored times."""
KEY_TYPES: dict[str, type] = {
    name: str if name in ("role", "dtype", "mask") else bool if name in ("is_causal", "exact_only") else int
    for name in TuningKey._fields
}


class Entry(NamedTuple):
    """The winner for one kind of call in one environment."""

    key: TuningKey
    environment: str
    accuracy: str
    """The least exact class allowed."""
    winner: str
    incumbent: str
    """The backend that `auto` would take."""
    ms: dict[str, float]
    """Median milliseconds of each candidate that was measured."""
    rejected: dict[str, str]
    """Rejected candidates, each with the reason."""
    deferred: dict[str, int]
    """Candidates whose budget ended before their time was known, each with how often; a later run tries them again."""
    written: float
    """Seconds since 1970."""
    origin: str = "run"
    """`run`, or `tune` for the command."""

    @property
    def location(self) -> tuple[str, str, TuningKey]:
        """The key of the store."""
        return self.environment, self.accuracy, self.key

    @property
    def known(self) -> set[str]:
        """Every candidate that it has a time, a rejection or a deferral of."""
        return {*self.ms, *self.rejected, *self.deferred}

    def summary(self) -> str:
        """The result for reports: `3.1 ms, 12 % faster than torch_sdpa, 4 candidates`."""
        ms = self.ms[self.winner]
        count = f"{len(self.known)} candidate{'s' if len(self.known) != 1 else ''}"
        before = self.ms.get(self.incumbent)
        if self.winner == self.incumbent or before is None:
            return f"{ms:.3g} ms, none is faster, {count}"
        return f"{ms:.3g} ms, {100 * (1 - ms / before):.0f} % faster than {self.incumbent}, {count}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the fields of the key among the others."""
        return {
            **self.key._asdict(),
            "environment": self.environment,
            "accuracy": self.accuracy,
            "winner": self.winner,
            "incumbent": self.incumbent,
            "ms": {name: round(ms, 4) for name, ms in self.ms.items()},
            "rejected": dict(self.rejected),
            "put_off": dict(self.deferred),
            "written": round(self.written, 3),
            "origin": self.origin,
        }


def document(entries: Iterable[Entry]) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "entries": [entry.as_dict() for entry in entries]}


def read_document(data: object, most: int) -> list[Entry]:
    """The entries of a document.

    Raises:
        ValueError: it differs from what `document` writes; the message says where.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"not a document of measured choices: format must be {FORMAT!r}")
    if data.get("version") != VERSION:
        raise ValueError(f"version {shortened(repr(data.get('version')), 80)} of the document is not {VERSION}")
    entries = data.get("entries")
    if not isinstance(entries, list) or len(entries) > most:
        raise ValueError(f"entries must be a list of at most {most}")
    checked = []
    for number, entry in enumerate(entries):
        try:
            checked.append(read(entry))
        except ValueError as error:
            raise ValueError(f"entries[{number}]: {shortened(str(error))}") from error
    return checked


def read(data: object) -> Entry:
    """One entry from plain data; unknown fields are ignored.

    Raises:
        ValueError: a field is missing or of the wrong type; the message names it.
    """
    fields = Fields(data)
    readers: dict[type, Callable[[str], Any]] = {
        str: partial(fields.text, least=1),
        bool: fields.flag,
        int: partial(fields.whole, least=1),
    }
    entry = Entry(
        TuningKey(*(readers[kind](name) for name, kind in KEY_TYPES.items())),
        fields.text("environment", least=1),
        fields.one_of("accuracy", ACCURACY),
        fields.text("winner", least=1),
        fields.text("incumbent", least=1),
        _of_backends(fields.inner("ms"), lambda ms, name: ms.number(name, LEAST_MS)),
        _of_backends(fields.inner("rejected"), lambda reasons, name: reasons.text(name, least=1)),
        _of_backends(fields.inner("put_off"), lambda times, name: times.whole(name, 1, below=2**31)),
        min(fields.number("written", 0), time()),  # the oldest are dropped first, and none is newer than now
        fields.text("origin", "run", least=1),
    )
    fields.one_of("mask", MASK_KINDS)
    if entry.winner not in entry.ms:
        raise fields.wrong("winner", f"{entry.winner!r} has no time in ms")
    try:  # JSON escapes can make lone surrogates, which SQLite refuses
        json.dumps(entry.as_dict(), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise fields.wrong("", f"a text has half of a character: {error.reason}") from error
    return entry


def _of_backends(fields: Fields, read_one: Callable[[Fields, str], Value]) -> dict[str, Value]:
    names = list(fields.data)
    if len(names) > MOST_NAMES or not all(isinstance(name, str) and len(name) <= LONGEST_TEXT for name in names):
        raise fields.wrong("", f"expected at most {MOST_NAMES} names of backends")
    return {name: read_one(fields, name) for name in names}
