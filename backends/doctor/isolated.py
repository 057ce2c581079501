"""Runs a command in a separate process, which may crash, hang, print without end or leave children behind.

Nothing here knows about kernels: it starts, waits, kills the whole tree, keeps the last lines of stderr, and says
in words how the process ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from threading import Thread
from typing import IO, NamedTuple

TAIL_LINES, TAIL_WIDTH = 8, 200
CHUNK = 8192
"""Bytes read at a time, and kept."""

WINDOWS_ENDS = {
    0xC0000005: "access violation",
    0xC000001D: "illegal instruction",
    0xC0000094: "integer division by zero",
    0xC00000FD: "stack overflow",
    0xC0000135: "a library was not found",
    0xC0000139: "a library lacks a function",
    0xC0000374: "heap corruption",
    0xC0000409: "stack buffer overrun or abort",
}
"""NTSTATUS values as which a process of Windows ends when it crashes (ntstatus.h)."""


class Ended(NamedTuple):
    """How a process ended. `status` is that of subprocess, None where it was killed at the time limit."""

    status: int | None
    tail: tuple[str, ...]
    """The last lines of stderr."""


def run(command: list[str], timeout: float) -> Ended:
    """Run `command` for at most `timeout` seconds; stdout is thrown away, children end with it."""
    process = _start(command)
    tail = _Tail(process.stderr)
    status: int | None = None
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also after Ctrl-C
        _kill_tree(process)
        process.wait()
    return Ended(status, tail.lines())


def words_of(status: int) -> str:
    """`signal 11 (SIGSEGV)`, `exit code 0xc0000005 (access violation)` or `exit code 3`."""
    if -64 <= status < 0:
        try:
            return f"signal {-status} ({signal.Signals(-status).name})"
        except ValueError:
            return f"signal {-status}"
    code = status & 0xFFFFFFFF
    return f"exit code {code:#x} ({WINDOWS_ENDS[code]})" if code in WINDOWS_ENDS else f"exit code {status}"


def same_interpreter() -> list[str]:
    """The running Python with the flags that decide which packages it sees."""
    flags = [
        flag
        for flag, is_set in (
            ("-I", sys.flags.isolated),
            ("-E", sys.flags.ignore_environment and not sys.flags.isolated),
            ("-s", sys.flags.no_user_site and not sys.flags.isolated),
            ("-S", sys.flags.no_site),
        )
        if is_set
    ]
    return [sys.executable or "python", *flags]


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # ignored on Windows
    )


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        if process.poll() is None:
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
            process.kill()
        return
    try:  # its own session: its compilers and workers are in the group, alive or not itself
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()


class _Tail:
    """Reads a stream to its end and keeps the last lines."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        self._stream = stream
        self._kept = b""
        self._thread = Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while self._stream is not None and (chunk := os.read(self._stream.fileno(), CHUNK)):
            self._kept = (self._kept + chunk)[-CHUNK:]

    def lines(self) -> tuple[str, ...]:
        self._thread.join(timeout=2)  # a process that escaped the kill may hold the stream open
        text = self._kept.decode("utf-8", errors="replace")
        lines = [line.rstrip()[:TAIL_WIDTH] for line in text.splitlines() if line.strip()]
        return tuple(lines[-TAIL_LINES:])
