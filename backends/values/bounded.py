"""Input within bounds: files up to a size, the nearest of known names, and messages of bounded length.

Needs the standard library alone, so that every part may use it.
"""

from __future__ import annotations

import difflib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

MOST_JSON = 1_000_000
"""Bytes of a configuration or a record as JSON."""
MOST_TEXT = 32 * 1024
"""Bytes of a configuration in any other form: YAML, flags, pairs."""
MOST_MESSAGE = 2000
"""Characters of an error message; it may quote a text of a megabyte."""
_TAIL = 700
_LONGEST_NAME = 80


def shortened(text: str, most: int = MOST_MESSAGE) -> str:
    """The text itself, or its beginning and its end with the number of characters that are left out between them."""
    if len(text) <= most:
        return text
    tail = min(_TAIL, most // 3)
    left_out = len(text) - most
    return f"{text[: most - tail]} [{left_out} characters left out] {text[-tail:]}"


def read_file(path: str | Path, most: int) -> bytes:
    """The bytes of an ordinary file of at most `most` bytes; a longer one is not read to its end.

    Raises:
        OSError: it cannot be read, is a folder, a device or a pipe, or is longer; `strerror` says which.
    """
    try:
        mode = os.stat(path).st_mode  # before opening: opening a pipe waits for its other end
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
    """The known names that are most like `name`, best first; none for a name longer than any of ours.

    Comparing two names takes time with the product of their lengths.
    """
    if len(name) > _LONGEST_NAME:
        return []
    return difflib.get_close_matches(name, list(known), n=count, cutoff=cutoff)
