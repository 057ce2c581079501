"""Which backend was measured fastest for which kind of call: one small SQLite file, kept over runs and shared.

An entry belongs to one environment (card, driver, torch and kernel packages, our version), one accuracy that was
allowed and one `TuningKey`. Reading and writing never fail: where the file cannot be used, a message says so once,
what is new stays in memory, and goes into the file as soon as that works again. What a person asks for by hand
(`clear`, `import_`) raises instead.

Boundary: it knows SQLite and plain data; who measures, and when, is in `tuner.py`.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import RLock
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from . import entry as measured_entry
from .entry import Entry
from .key import TuningKey
from .place import FILE, VARIABLE, default_path, environment_of, path_in

if TYPE_CHECKING:
    from .race import Race

__all__ = ["FILE", "VARIABLE", "Store", "default_path", "environment_of", "path_in", "shared_store"]

log = logging.getLogger("attention_backends")

SCHEMA = 1
MOST = 1000
"""Entries kept; the oldest go first. All of them make a document of less than 4 MiB."""
BUSY_SECONDS = 2.0
"""How long one access waits for another process."""
REST_SECONDS = 30.0
"""After a failure the file is left alone for so long, so that a locked one does not hold up a run at each call."""

TABLE = (
    "CREATE TABLE measured (environment TEXT NOT NULL, accuracy TEXT NOT NULL, key TEXT NOT NULL, "
    "written REAL NOT NULL, entry TEXT NOT NULL, PRIMARY KEY (environment, accuracy, key))"
)
UPSERT = "INSERT OR REPLACE INTO measured VALUES (?, ?, ?, ?, ?)"
PRUNE = f"DELETE FROM measured WHERE rowid NOT IN (SELECT rowid FROM measured ORDER BY written DESC LIMIT {MOST})"  # noqa: S608

Result = TypeVar("Result")


class OtherVersionError(Exception):
    """The file is not of this version's schema; the version stands in the message."""


class Store:
    """The entries of one file. Safe to share between threads; each access opens the file anew."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.lock = RLock()
        self.races: dict[tuple[str, str, TuningKey], Race] = {}
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
            self._unsaved[entry.place] = entry
            self.flush()

    def flush(self) -> None:
        """Write what could not be written before."""
        with self.lock:
            if self._unsaved and not self._is_resting(write=True):
                self._trying(lambda: self._write(list(self._unsaved.values())), write=True)

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
            if self.path.exists():
                with self._opened(write=True) as file:
                    file.execute("DELETE FROM measured")
                self._shrink()
            self._unsaved.clear()
            self.problem = None
            return count

    def _shrink(self) -> None:
        """Give the disk back what a cleared file took; where another process reads it now, that is for next time."""
        with suppress(sqlite3.Error), closing(self._connect()) as file:
            file.execute("VACUUM")

    @contextmanager
    def _by_hand(self) -> Iterator[None]:
        """What a person asked for: it does not wait until the file is tried again, and ends what was wrong before."""
        with self.lock:
            self._rests = dict.fromkeys(self._rests, 0.0)
            before = self.problem
            yield
            self.races.clear()
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
            from ..platform import detect

            self.here.add(environment_of(detect()))
        return self.here

    def _all(self) -> list[Entry]:
        """What is in the file and what is not there yet, newest first."""
        with self.lock:
            self.flush()
            found = {entry.place: entry for entry in self._read("", ())}
            found.update(self._unsaved)
            return sorted(found.values(), key=lambda entry: -entry.written)

    def _read(self, where: str, values: tuple[str, ...]) -> list[Entry]:
        def read() -> list[tuple[str]]:
            if not self.path.exists():
                return []
            with self._opened(write=False) as file:
                return file.execute(f"SELECT entry FROM measured {where} ORDER BY written DESC", values).fetchall()  # noqa: S608  # two constants

        with self.lock:
            rows = None if self._is_resting(write=False) else self._trying(read, write=False)
        found = []
        for (text,) in rows or ():
            try:
                found.append(measured_entry.read(json.loads(text)))
            except (ValueError, RecursionError) as error:
                self._say(f"an entry of {self.path.name} cannot be understood and is left out: {error}")
        return found

    def _write(self, entries: list[Entry]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened(write=True) as file:
            rows = [(e.environment, e.accuracy, json.dumps(e.key), e.written, json.dumps(e.as_dict())) for e in entries]
            file.executemany(UPSERT, rows)
            file.execute(PRUNE)
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

    @contextmanager
    def _opened(self, *, write: bool) -> Iterator[sqlite3.Connection]:
        """One transaction on the file; a file that is damaged or of another version is set aside first."""
        try:
            file = self._connected(write)
        except (sqlite3.DatabaseError, OtherVersionError) as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            self._set_aside(error)
            file = self._connected(write=True)
        try:
            yield file
            file.execute("COMMIT")
        except BaseException:
            if file.in_transaction:
                file.execute("ROLLBACK")
            raise
        finally:
            file.close()

    def _connect(self) -> sqlite3.Connection:
        # No WAL: on a network's file system it is not safe, and so little is written that nobody waits long.
        return sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)

    def _connected(self, write: bool) -> sqlite3.Connection:
        file = self._connect()
        try:
            file.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            (version,) = file.execute("PRAGMA user_version").fetchone()
            names = {name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if version == 0 and not names:
                if not write:  # two processes that both go on from reading to writing would wait for each other
                    file.close()
                    return self._connected(write=True)
                file.execute(TABLE)
                file.execute(f"PRAGMA user_version = {SCHEMA}")
            elif version != SCHEMA or "measured" not in names:
                raise OtherVersionError(f"schema {version} is not {SCHEMA}")
            else:
                (found,) = file.execute("PRAGMA quick_check(1)").fetchone()  # it reads every page: milliseconds
                if found != "ok":
                    raise sqlite3.DatabaseError(found)
        except BaseException:
            file.close()
            raise
        return file

    def _set_aside(self, error: Exception) -> None:
        """Rename a file that cannot be understood, with its journal, so that a new one can take its place."""
        kind = "other-version" if isinstance(error, OtherVersionError) else "damaged"
        try:
            self._connected(write=False).close()
        except sqlite3.OperationalError:
            raise  # locked, by one who makes a new one
        except (sqlite3.DatabaseError, OtherVersionError):
            pass
        else:
            return  # another process was faster, and the file is a new one
        number, aside = 1, self.path.with_name(f"{self.path.name}.{kind}")
        while aside.exists():
            number += 1
            aside = self.path.with_name(f"{self.path.name}.{kind}-{number}")
        self.path.replace(aside)
        for ending in ("-journal", "-wal", "-shm"):
            journal = self.path.with_name(self.path.name + ending)
            if journal.exists():
                journal.replace(aside.with_name(aside.name + ending))
        self._say(f"{self.path.name} cannot be read ({error}); it is {aside.name} now, and a new one begins")


_stores: dict[Path, Store] = {}
_stores_lock = RLock()


def shared_store(path: Path) -> Store:
    """The store of a file, one for the whole process."""
    path = Path(os.path.abspath(path))
    with _stores_lock:
        if path not in _stores:
            _stores[path] = Store(path)
        return _stores[path]
