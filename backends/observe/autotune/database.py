"""The SQLite file of autotune: one table, one transaction per access; a damaged file is renamed and replaced.

Rows are text; `entry.py` reads them, `store.py` handles errors.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

SCHEMA = 1
MOST = 1000
"""Entries kept; the oldest are deleted first. A document of all of them is below 4 MiB."""
BUSY_SECONDS = 2.0
"""Seconds that one access waits for another process's lock."""

TABLE = (
    "CREATE TABLE measured (environment TEXT NOT NULL, accuracy TEXT NOT NULL, key TEXT NOT NULL, "
    "written REAL NOT NULL, entry TEXT NOT NULL, PRIMARY KEY (environment, accuracy, key))"
)
MOST_BYTES = 32 << 20
"""Of the file; with all entries it has less than a tenth of this."""
LONGEST_ENTRY = 512 << 10
"""Characters of one entry; twice what `entry.py` allows."""
SELECT = (
    f"SELECT CASE WHEN typeof(entry) = 'text' AND length(entry) <= {LONGEST_ENTRY} THEN entry ELSE '' END "  # noqa: S608
    "FROM measured"
)
UPSERT = "INSERT OR REPLACE INTO measured VALUES (?, ?, ?, ?, ?)"
PRUNE = f"DELETE FROM measured WHERE rowid NOT IN (SELECT rowid FROM measured ORDER BY written DESC LIMIT {MOST})"  # noqa: S608

Row = tuple[str, str, str, float, str]
"""Environment, accuracy, key, time written (seconds since 1970), entry as JSON."""


class OtherVersionError(Exception):
    """The file has another schema version, which the message names."""


class Database:
    """One file, opened at each access."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """`say` gets a message if a file cannot be read and is set aside."""
        self.path = path
        self._say = say

    def read(self, where: str, values: tuple[str, ...]) -> list[str]:
        """Entries that match `where`, newest first; an entry that is no text, or too long, is an empty text."""
        if not self.path.exists():
            return []
        with self._opened(write=False) as file:
            rows = file.execute(f"{SELECT} {where} ORDER BY written DESC LIMIT {MOST}", values)
            return [text for (text,) in rows]

    def write(self, rows: list[Row]) -> None:
        """Insert or replace rows; the oldest are deleted above `MOST`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened(write=True) as file:
            file.executemany(UPSERT, rows)
            file.execute(PRUNE)

    def clear(self) -> None:
        if self.path.exists():
            with self._opened(write=True) as file:
                file.execute("DELETE FROM measured")
            self._shrink()

    def _shrink(self) -> None:
        """Shrink a cleared file; skipped while another process reads it."""
        with suppress(sqlite3.Error), closing(self._connect()) as file:
            file.execute("VACUUM")

    @contextmanager
    def _opened(self, *, write: bool) -> Iterator[sqlite3.Connection]:
        """One transaction; a file that is damaged or of another version is set aside first."""
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
        # No WAL: it is unsafe on network file systems, and writes are few.
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
                if not write:  # upgrading a read lock could deadlock two processes
                    file.close()
                    return self._connected(write=True)
                file.execute(TABLE)
                file.execute(f"PRAGMA user_version = {SCHEMA}")
            elif version != SCHEMA:
                raise OtherVersionError(f"schema {version} is not {SCHEMA}")
            elif made != {"measured": TABLE}:  # another column or a trigger would break each access
                raise sqlite3.DatabaseError(f"it has {', '.join(made) or 'nothing'} and not the one table of this pack")
            else:
                (verdict,) = file.execute("PRAGMA quick_check(1)").fetchone()  # reads every page: milliseconds
                if verdict != "ok":
                    raise sqlite3.DatabaseError(verdict)
        except BaseException:
            file.close()
            raise
        return file

    def _set_aside(self, error: Exception) -> None:
        """Rename an unreadable file and its journals, so that a new one can be made."""
        kind = "other-version" if isinstance(error, OtherVersionError) else "damaged"
        try:
            self._connected(write=False).close()
        except sqlite3.OperationalError:
            raise  # locked by a process that makes a new one
        except (sqlite3.DatabaseError, OtherVersionError):
            pass
        else:
            return  # another process has replaced it already
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
