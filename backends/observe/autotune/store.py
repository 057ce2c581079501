"""Which backend was measured fastest for which kind of call: one small SQLite file, kept over runs and shared.

An entry belongs to one environment (card, driver, torch and kernel packages, our version), one accuracy that was
allowed and one `TuningKey`. Reading and writing never fail: where the file cannot be used, a message says so once,
what is new stays in memory, and goes into the file as soon as that works again. What a person asks for by hand
(`save`, `clear`, `import_`) raises instead.

Boundary: what is kept, and when the file is tried; SQLite is in `database.py`, who measures, and when, in `tuner.py`.
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
"""Names another file than the usual one."""
OLD_VARIABLE = "ATTENTION_BACKENDS_MEASURED"
"""Its older name; `VARIABLE` wins where both are set."""
FILE = "measured.sqlite3"

log = logging.getLogger("attention_backends")

REST_SECONDS = 30.0
"""After a failure the file is left alone for so long, so that a locked one does not hold up a run at each call."""

Result = TypeVar("Result")


class Store:
    """The entries of one file. Safe to share between threads; each access opens the file anew."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self._database = Database(self.path, self._say)
        self.lock = RLock()
        self.contests: dict[tuple[str, str, TuningKey], Contest] = {}
        """What this process is measuring; `tuner.py` keeps it here because every run shares it."""
        self.here: set[str] = set()
        """Environments of this process."""
        self.problem: str | None = None
        """Why the file cannot be used, or what became of a damaged one; None where all is well."""
        self._unsaved: dict[tuple[str, str, TuningKey], Entry] = {}
        self._said: set[str] = set()
        self._rests: dict[bool, float] = {}
        """Until when the file is left alone after it could not be read (False) or written (True)."""

    def get(self, key: TuningKey, environment: str, accuracy: str) -> Entry | None:
        """The entry for calls of this kind, or None."""
        with self.lock:
            unsaved = self._unsaved.get((environment, accuracy, key))
        if unsaved is not None:
            return unsaved
        where = "WHERE environment = ? AND accuracy = ? AND key = ?"
        found = self._read(where, (environment, accuracy, json.dumps(key)))
        return found[0] if found else None

    def put(self, entry: Entry) -> None:
        """Keep an entry in place of any other of its kind."""
        with self.lock:
            self._unsaved[entry.location] = entry
            self.flush()

    def flush(self) -> None:
        """Write what could not be written before."""
        with self.lock:
            if self._unsaved and not self._is_resting(write=True):
                self._trying(lambda: self._write(list(self._unsaved.values())), write=True)

    def save(self) -> None:
        """Have a file, with all that is known, for a person who waits for that.

        Raises:
            OSError, sqlite3.Error: the file cannot be written.
        """
        with self._by_hand():
            self._write(list(self._unsaved.values()))

    def entries(self) -> list[dict[str, Any]]:
        """Every entry as plain data, newest first; `here` is true where it holds for this process."""
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
        """What a person asked for: it does not wait until the file is tried again, and ends what was wrong before."""
        with self.lock:
            self._rests = dict.fromkeys(self._rests, 0.0)
            before = self.problem
            yield
            self.contests.clear()
            self._rests.clear()
            if self.problem == before:
                self.problem = None

    def export(self) -> dict[str, Any]:
        """Every entry in one document that `import_` takes, here or elsewhere."""
        return measured_entry.document(self._all())

    def import_(self, document: object) -> int:
        """Take over the entries of an exported document; returns how many. Entries of other machines are kept too.

        Raises:
            ValueError: something in it is not as an export has it; then nothing is changed.
            OSError, sqlite3.Error: the file cannot be written; then nothing is changed.
        """
        entries = measured_entry.read_document(document, MOST)
        with self._by_hand():
            self._write([*self._unsaved.values(), *entries])
        return len(entries)

    def summary(self) -> dict[str, Any]:
        """The file's name, entries in all and for this process, size in bytes, and what is wrong with it or None."""
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
        """What is in the file and what is not there yet, newest first."""
        with self.lock:
            self.flush()
            found = {entry.location: entry for entry in self._read("", ())}
            found.update(self._unsaved)
            return sorted(found.values(), key=lambda entry: -entry.written)

    def _read(self, where: str, values: tuple[str, ...]) -> list[Entry]:
        with self.lock:
            resting = self._is_resting(write=False)
            texts = None if resting else self._trying(lambda: self._database.read(where, values), write=False)
        found = []
        for text in texts or ():
            try:
                found.append(measured_entry.read(json.loads(text)))
            except (ValueError, RecursionError) as error:
                self._say(f"an entry of {self.path.name} cannot be understood and is left out: {error}")
        return found

    def _write(self, entries: list[Entry]) -> None:
        self._database.write(
            [(e.environment, e.accuracy, json.dumps(e.key), e.written, json.dumps(e.as_dict())) for e in entries]
        )
        self._unsaved.clear()

    def _is_resting(self, *, write: bool) -> bool:
        """Whether it is too early to try; a file that is read-only or full can still be read."""
        return monotonic() < max(self._rests.get(False, 0.0), self._rests.get(True, 0.0) if write else 0.0)

    def _trying(self, work: Callable[[], Result], *, write: bool) -> Result | None:
        """Do it; where the file cannot be used say why, once, and give None."""
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
            self._rests.pop(False, None)  # what can be written can be read
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
    """The store of a file, one for the whole process."""
    path = Path(os.path.abspath(path))
    with _stores_lock:
        if path not in _stores:
            _stores[path] = Store(path)
        return _stores[path]


def default_path() -> Path:
    """The file of programs other than ComfyUI: as the variables say, else in the user's cache folder."""
    return _given() or remembered.path().with_name(FILE)


def path_in(user_directory: str | Path) -> Path:
    """The file in ComfyUI's user directory, unless a variable names another."""
    return _given() or Path(user_directory) / "attention_backends" / FILE


def _given() -> Path | None:
    """The file that one of the variables names; None where neither is set."""
    given = os.environ.get(VARIABLE, "").strip() or os.environ.get(OLD_VARIABLE, "").strip()
    return Path(os.path.expanduser(given)) if given else None  # a home that is not there stays as it is written
