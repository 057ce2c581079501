"""Printing that no console can break, and the one way to stop with a sentence."""

from __future__ import annotations

import io
import sys


class Stop(Exception):
    """A sentence for the person: what is missing and what to do. dev.py prints it and ends with status 2."""


def make_output_safe() -> None:
    """Replaces what the console cannot show (cp1252 on Windows) and keeps the order with child processes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace", line_buffering=True)


def say(text: str = "") -> None:
    print(text, flush=True)


class Progress:
    """One line that is rewritten on a terminal; elsewhere a new line, at most every ten seconds."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._width = 0
        self._last = -10.0

    def show(self, text: str, seconds: float) -> None:
        if self._live:
            print("\r" + text.ljust(self._width), end="", flush=True)
            self._width = len(text)
        elif seconds - self._last >= 10:
            self._last = seconds
            say(text)

    def end(self) -> None:
        if self._live and self._width:
            say()


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
