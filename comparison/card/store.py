"""The file in which a run of `card` keeps its results.

Each change writes the whole file anew beside the old one and replaces it, so that a process killed at any moment leaves
either the results before the change or those after it. What is written has passed `nameless`.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import platform
import re
from pathlib import Path
from typing import Any

from ...backends.values.plain_data import load_json
from ...backends.values.privacy import clean

KIND = "attention-backends card"
FORMAT = 1
RUNNING, ENDED = "card.partial.json", "card.json"
"""Names of the file while the run goes on, or after it was killed; and once it has ended."""
UNFINISHED = ".unfinished"
"""How the name of a file ends that is being written."""
MOST_BYTES = 32 << 20
COMMON = frozenset(
    ("admin", "administrator", "computer", "debian", "default", "desktop", "docker", "guest", "home", "host", "laptop",
     "linux", "local", "localhost", "machine", "root", "runner", "server", "test", "ubuntu", "user", "users", "windows",
     "work", "workspace")
)  # fmt: skip
"""Names of users and hosts that tell nothing, and that are words of messages."""

Data = dict[str, Any]


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step, after its text has reached the disk."""
    beside = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    with beside.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, path)


def write(path: Path, data: Data) -> None:
    """Write the results and, beside them, their page."""
    from .page import page

    data = nameless(data)
    write_whole(path, dumped(data))
    write_whole(path.with_suffix(".md"), page(data))


def dumped(data: Data) -> str:
    """The results as text."""
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def read(path: Path) -> Data:
    """The results of a file.

    Raises:
        ValueError: it is not a file of `card`.
        OSError: it cannot be read.
    """
    data = load_json(path.read_text(encoding="utf-8"), path.name, most_bytes=MOST_BYTES, most_entries=1_000_000)
    if not isinstance(data, dict) or data.get("kind") != KIND or data.get("format") != FORMAT:
        raise ValueError(f"{path.name} is not a result of the command card")
    return data


def newest(folder: Path) -> Path | None:
    """The file of the last run under a folder, complete or not; None where there is none."""
    found = [path for name in (RUNNING, ENDED) for path in (*folder.glob(name), *folder.glob(f"*/{name}"))]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def nameless(data: Data) -> Data:
    """The data as JSON can hold it, without the names of folders, of the user and of the host.

    The two are replaced as whole words of a text; those of at most three letters and those in `COMMON` stay.
    """
    both = (_user(), platform.node().partition(".")[0])
    names = [name for name in sorted(both, key=len, reverse=True) if len(name) > 3 and name.lower() not in COMMON]
    name = re.compile("|".join(rf"(?<!\w){re.escape(each)}(?!\w)" for each in names)) if names else None

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return name.sub("...", value) if name and " " in value else value  # a single word is a name of ours
        if isinstance(value, dict):
            return {str(key): walk(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [walk(each) for each in value]
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        return value

    cleaned: Data = walk(clean(data))
    return {**cleaned, "kind": KIND}


def _user() -> str:
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # no such entry, or Windows without the variables
        return ""
