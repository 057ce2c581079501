"""Bounded input: files up to a size, nearest names, messages of limited length. Standard library only."""

from __future__ import annotations

import difflib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

MOST_JSON = 1_000_000
"""Most bytes of a configuration or a record as JSON."""
MOST_TEXT = 32 * 1024
"""Most bytes of a configuration in any other form: YAML, flags, pairs."""
MOST_MESSAGE = 2000
"""Most characters of an error message, which may quote a text of a megabyte."""
_TAIL = 700
_LONGEST_NAME = 80


def shortened(text: str, most: int = MOST_MESSAGE) -> str:
    """The text; if longer than `most` characters its beginning and end, with the number of characters left out."""
    if len(text) <= most:
        return text
    tail = min(_TAIL, most // 3)
    left_out = len(text) - most
    return f"{text[: most - tail]} [{left_out} characters left out] {text[-tail:]}"


def read_file(path: str | Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes; a longer one is not read to its end.

    Raises:
        OSError: it cannot be read, is a folder, a device or a pipe, or is longer; `strerror` says which.
    """
    try:
        mode = os.stat(path).st_mode  # first: opening a pipe would block
    except ValueError as error:  # a NUL character in the name
        raise OSError(errno.EINVAL, str(error)) from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise OSError(errno.EINVAL, f"it is {what}, not a file")
    with open(path, "rb") as file:
        data = file.read(most + 1)
        if len(data) > most:
            size = max(os.fstat(file.fileno()).st_size, len(data))
            raise OSError(errno.EFBIG, f"{size} bytes > {most}")
    return data


def nearest(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """The `count` known names most similar to `name`, best first; none for a name longer than every known one.

    Comparing takes time in the product of the lengths.
    """
    if len(name) > _LONGEST_NAME:
        return []
    return difflib.get_close_matches(name, list(known), n=count, cutoff=cutoff)
