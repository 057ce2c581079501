"""The SQLite file of measured choices: its one table, a transaction for each access, and what becomes of a bad file.

Boundary: it knows SQLite and text; what the text says is in `entry.py`, and what happens where the file cannot be used
is for `store.py` to say.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

SCHEMA = 1
MOST = 1000
"""Entries kept; the oldest go first. All of them make a document of less than 4 MiB."""
BUSY_SECONDS = 2.0
"""How long one access waits for another process."""

TABLE = (
    "CREATE TABLE measured (environment TEXT NOT NULL, accuracy TEXT NOT NULL, key TEXT NOT NULL, "
    "written REAL NOT NULL, entry TEXT NOT NULL, PRIMARY KEY (environment, accuracy, key))"
)
MOST_BYTES = 32 << 20
"""Of the file; a full one has less than a tenth of it."""
LONGEST_ENTRY = 512 << 10
"""Characters of one entry; the longest that `entry.py` allows has half of it."""
SELECT = (
    f"SELECT CASE WHEN typeof(entry) = 'text' AND length(entry) <= {LONGEST_ENTRY} THEN entry ELSE '' END "  # noqa: S608
    "FROM measured"
)
UPSERT = "INSERT OR REPLACE INTO measured VALUES (?, ?, ?, ?, ?)"
PRUNE = f"DELETE FROM measured WHERE rowid NOT IN (SELECT rowid FROM measured ORDER BY written DESC LIMIT {MOST})"  # noqa: S608

Row = tuple[str, str, str, float, str]
"""Environment, accuracy, key, when it was written, and the whole entry."""


class OtherVersionError(Exception):
    """The file is not of this version's schema; the version stands in the message."""


class Database:
    """One file; each access opens it anew."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """`say` is told what became of a file that could not be read."""
        self.path = path
        self._say = say

    def read(self, where: str, values: tuple[str, ...]) -> list[str]:
        """The entries that fit, newest first; none where there is no file. What is no text, or too long, is empty."""
        if not self.path.exists():
            return []
        with self._opened(write=False) as file:
            rows = file.execute(f"{SELECT} {where} ORDER BY written DESC LIMIT {MOST}", values)
            return [text for (text,) in rows]

    def write(self, rows: list[Row]) -> None:
        """Keep rows, each in place of any other of its kind; the oldest go where there are too many."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened(write=True) as file:
            file.executemany(UPSERT, rows)
            file.execute(PRUNE)

    def clear(self) -> None:
        """Remove every entry."""
        if self.path.exists():
            with self._opened(write=True) as file:
                file.execute("DELETE FROM measured")
            self._shrink()

    def _shrink(self) -> None:
        """Give the disk back what a cleared file took; where another process reads it now, that is for next time."""
        with suppress(sqlite3.Error), closing(self._connect()) as file:
            file.execute("VACUUM")

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
        file = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        file.text_factory = lambda text: text.decode(errors="replace")
        return file

    def _connected(self, write: bool) -> sqlite3.Connection:
        if self.path.exists():
            if not self.path.is_file():
                raise sqlite3.OperationalError("it is a folder, a device or a pipe, not a file")
            if (size := self.path.stat().st_size) > MOST_BYTES:  # before its pages are read
                raise sqlite3.DatabaseError(f"{size} bytes > {MOST_BYTES}")
        file = self._connect()
        try:
            file.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            (version,) = file.execute("PRAGMA user_version").fetchone()
            objects = "SELECT name, sql FROM sqlite_master WHERE type != 'index' AND name NOT LIKE 'sqlite_%'"
            made = dict(file.execute(objects).fetchall())
            if version == 0 and not made:
                if not write:  # two processes that both go on from reading to writing would wait for each other
                    file.close()
                    return self._connected(write=True)
                file.execute(TABLE)
                file.execute(f"PRAGMA user_version = {SCHEMA}")
            elif version != SCHEMA:
                raise OtherVersionError(f"schema {version} is not {SCHEMA}")
            elif made != {"measured": TABLE}:  # another column would fail at each access, a trigger change what is kept
                raise sqlite3.DatabaseError(f"it has {', '.join(made) or 'nothing'} and not the one table of this pack")
            else:
                (verdict,) = file.execute("PRAGMA quick_check(1)").fetchone()  # it reads every page: milliseconds
                if verdict != "ok":
                    raise sqlite3.DatabaseError(verdict)
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
