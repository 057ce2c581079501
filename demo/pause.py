"""A lock that benchmarks hold while they measure, and that training waits for: both would be wrong otherwise.

Boundary: the standard library. A lock is a file in the temporary directory with the holder's process id in its name;
one whose process has ended counts for nothing.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "attention-backends-benchmark-"


@contextmanager
def training_paused() -> Iterator[None]:
    """Training on this machine waits between two steps while the block runs."""
    lock = Path(tempfile.gettempdir()) / f"{PREFIX}{os.getpid()}"
    lock.touch()
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def locked() -> bool:
    """Does a process that runs hold a lock?"""
    return any(_runs(lock.name.removeprefix(PREFIX)) for lock in Path(tempfile.gettempdir()).glob(PREFIX + "*"))


def wait(seconds: float = 1.0) -> float:
    """Return when nothing is locked, looking every so many seconds; the answer is how long that took."""
    began = time.perf_counter()
    while locked():
        time.sleep(seconds)
    return time.perf_counter() - began


def _runs(process: str) -> bool:
    if not process.isdigit():
        return False
    if os.name == "nt":  # os.kill would end the process there
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, int(process))  # type: ignore[attr-defined,unused-ignore]
        if handle:
            ctypes.windll.kernel32.CloseHandle(handle)  # type: ignore[attr-defined,unused-ignore]
        return bool(handle)
    try:
        os.kill(int(process), 0)
    except PermissionError:  # another user's
        return True
    except OSError:
        return False
    return True
