"""The store of autotune: the fastest backend for each kind of call, in one SQLite file that processes share.

An entry belongs to one environment (card, driver, torch and kernel packages, our version), one allowed accuracy and one
`TuningKey`. Reading and writing during a run never raise: if the file cannot be used, that is logged once, and new
entries stay in memory until it can. `save`, `clear` and `import_`, which a person calls, raise. SQLite is in
`database.py`, trials are in `tuner.py`.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from ...measure import remembered
from ...measure.call_key import TuningKey
from ...measure.environment import environment_of
from . import entry as measured_entry
from .database import MOST, Database
from .entry import Entry

if TYPE_CHECKING:
    from .contest import Contest

__all__ = ["FILE", "VARIABLE", "Store", "default_path", "environment_of", "path_in", "shared_store"]

VARIABLE = "ATTENTION_BACKENDS_AUTOTUNE"
"""Path of another file than the default."""
OLD_VARIABLE = "ATTENTION_BACKENDS_MEASURED"
"""Older name of `VARIABLE`, which wins if both are set."""
FILE = "measured.sqlite3"

log = logging.getLogger("attention_backends")

REST_SECONDS = 30.0
"""Pause after a failure, so that a locked file does not delay every call of a run."""

Result = TypeVar("Result")


class Store:
    """The entries of one file. Thread-safe; each access opens the file."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self._database = Database(self.path, self._say)
        self.lock = RLock()
        self.contests: dict[tuple[str, str, TuningKey], Contest] = {}
        """Open contests of this process, which runs share."""
        self.here: set[str] = set()
        """Environments of this process."""
        self.problem: str | None = None
        """Why the file cannot be used, or that a damaged one was set aside; None otherwise."""
        self._unsaved: dict[tuple[str, str, TuningKey], Entry] = {}
        self._said: set[str] = set()
        self._rests: dict[bool, float] = {}
        """End of the pause after a failed read (False) or write (True), by the monotonic clock."""

    def get(self, key: TuningKey, environment: str, accuracy: str) -> Entry | None:
        """The entry of a key, or None."""
        with self.lock:
            unsaved = self._unsaved.get((environment, accuracy, key))
        if unsaved is not None:
            return unsaved
        where = "WHERE environment = ? AND accuracy = ? AND key = ?"
        entries = self._read(where, (environment, accuracy, json.dumps(key)))
        return entries[0] if entries else None

    def put(self, entry: Entry) -> None:
        """Store an entry, replacing the one of its location."""
        with self.lock:
            self._unsaved[entry.location] = entry
            self.flush()

    def flush(self) -> None:
        """Write entries that could not be written before."""
        with self.lock:
            if self._unsaved and not self._is_resting(write=True):
                self._trying(lambda: self._write(list(self._unsaved.values())), write=True)

    def save(self) -> None:
        """Write all entries now.

        Raises:
            OSError, sqlite3.Error: the file cannot be written.
        """
        with self._by_hand():
            self._write(list(self._unsaved.values()))

    def entries(self) -> list[dict[str, Any]]:
        """Every entry as plain data, newest first; `here`: it is of this process's environment."""
        here = self._environments()
        return [{**entry.as_dict(), "here": entry.environment in here} for entry in self._all()]

    def clear(self) -> int:
        """Remove all entries, in the file and in memory; returns how many there were.

        Raises:
            OSError, sqlite3.Error: the file cannot be changed; then nothing is removed.
        """
        with self._by_hand():
            count = len(self._all())
            self._database.clear()
            self._unsaved.clear()
            self.problem = None
            return count

    @contextmanager
    def _by_hand(self) -> Iterator[None]:
        """For what a person asks for: ignores the pause, and clears an earlier problem on success."""
        with self.lock:
            self._rests = dict.fromkeys(self._rests, 0.0)
            before = self.problem
            yield
            self.contests.clear()
            self._rests.clear()
            if self.problem == before:
                self.problem = None

    def export(self) -> dict[str, Any]:
        """Every entry as a document for `import_`."""
        return measured_entry.document(self._all())

    def import_(self, document: object) -> int:
        """Add the entries of an exported document, those of other machines too; returns how many.

        Raises:
            ValueError: the document is invalid; then nothing is changed.
            OSError, sqlite3.Error: the file cannot be written; then nothing is changed.
        """
        entries = measured_entry.read_document(document, MOST)
        with self._by_hand():
            self._write([*self._unsaved.values(), *entries])
        return len(entries)

    def summary(self) -> dict[str, Any]:
        """Name of the file, bytes, number of entries in all and of this environment, and the problem or None."""
        entries, here = self._all(), self._environments()
        return {
            "path_name": self.path.name,
            "entries": len(entries),
            "entries_here": sum(entry.environment in here for entry in entries),
            "bytes": self.path.stat().st_size if self.path.is_file() else 0,
            "problem": self.problem,
        }

    def _environments(self) -> set[str]:
        if not self.here and "torch" in sys.modules:  # asked before any run
            from ...kernels.registry import detect

            self.here.add(environment_of(detect()))
        return self.here

    def _all(self) -> list[Entry]:
        """Entries of the file and unsaved ones, newest first."""
        with self.lock:
            self.flush()
            entries = {entry.location: entry for entry in self._read("", ())}
            entries.update(self._unsaved)
            return sorted(entries.values(), key=lambda entry: -entry.written)

    def _read(self, where: str, values: tuple[str, ...]) -> list[Entry]:
        with self.lock:
            resting = self._is_resting(write=False)
            texts = None if resting else self._trying(lambda: self._database.read(where, values), write=False)
        entries = []
        for text in texts or ():
            try:
                entries.append(measured_entry.read(json.loads(text)))
            except (ValueError, RecursionError) as error:
                self._say(f"an entry of {self.path.name} cannot be understood and is left out: {error}")
        return entries

    def _write(self, entries: list[Entry]) -> None:
        self._database.write(
            [(e.environment, e.accuracy, json.dumps(e.key), e.written, json.dumps(e.as_dict())) for e in entries]
        )
        self._unsaved.clear()

    def _is_resting(self, *, write: bool) -> bool:
        """Whether the pause after a failure lasts; a read-only file can still be read."""
        return monotonic() < max(self._rests.get(False, 0.0), self._rests.get(True, 0.0) if write else 0.0)

    def _trying(self, work: Callable[[], Result], *, write: bool) -> Result | None:
        """The result of `work`; if the file cannot be used, log that once and return None."""
        try:
            done = work()
        except (sqlite3.Error, OSError) as error:
            self._rests[write and "locked" not in str(error)] = monotonic() + REST_SECONDS
            self._say(
                f"the measured choices in {self.path.name} cannot be used ({error}); they are kept in memory until "
                "that works again"
            )
            return None
        if self._rests:
            self._rests.pop(False, None)  # reading works again
            if write:
                self._rests.clear()
            if not self._rests:
                self.problem = None
        return done

    def _say(self, problem: str) -> None:
        self.problem = problem
        if problem not in self._said:
            self._said.add(problem)
            log.warning("%s", problem)


_stores: dict[Path, Store] = {}
_stores_lock = RLock()


def shared_store(path: Path) -> Store:
    """The store of a file, one per process."""
    path = Path(os.path.abspath(path))
    with _stores_lock:
        if path not in _stores:
            _stores[path] = Store(path)
        return _stores[path]


def default_path() -> Path:
    """The file outside ComfyUI: as the variables say, else in the user's cache folder."""
    return _given() or remembered.path().with_name(FILE)


def path_in(user_directory: str | Path) -> Path:
    """The file in ComfyUI's user directory, unless a variable names another."""
    return _given() or Path(user_directory) / "attention_backends" / FILE


def _given() -> Path | None:
    """The file that a variable names; None if neither is set."""
    given = os.environ.get(VARIABLE, "").strip() or os.environ.get(OLD_VARIABLE, "").strip()
    return Path(os.path.expanduser(given)) if given else None  # an unknown ~user is left unchanged
