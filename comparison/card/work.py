"""One part of `card` in its own process: what it is given, how it keeps its results, and how the process ends.

A part is a function that takes a `Work`. It puts what it finds into `results`, goes through its items with `each`, and
raises `Skipped` where this machine lacks what it measures. Results are written after every item.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ...backends.measure.remembered import CACHE_VARIABLE
from . import store

CHILD = "card-part"
"""The first argument of a process that measures one part; not a command for people."""
OURS = "attention_backends.comparison.card.parts:PARTS"


class Skipped(Exception):
    """The machine lacks what a part measures; the message says what."""


class Work:
    """The time, the results and the file of one part."""

    def __init__(self, name: str, file: Path, seconds: float, parent: int | None = None) -> None:
        """`seconds` from now; `parent`: the process without which the part ends at once, None for no such process."""
        self.name, self.file, self.parent = name, file, parent
        self._start = time.monotonic()
        self._seconds = seconds
        self._step: float | None = None
        self._longest = 0.0
        self._data = store.read(file)
        self._entry = self._data["parts"].setdefault(name, {})
        self.results: store.Data = self._entry.setdefault("results", {})
        self.lost: dict[str, str] = {}
        """What crashed or hung in this run, in this part or in one before it, with the reason."""
        for entry in self._data["parts"].values():
            self.lost.update(entry.get("lost", {}))
        self.doing = ""
        """The item, such as a kernel, that a crash is ascribed to."""
        self.not_reached: list[str] = []
        self._missing: list[str] = self._entry.get("not_reached", [])  # when the part ran before

    def left(self) -> float:
        """Seconds that the part may still take."""
        return self._seconds - (time.monotonic() - self._start)

    def is_over(self) -> bool:
        """Whether the time does not suffice for one more step, as long as the longest between two calls of this."""
        now = time.monotonic()
        if self._step is not None:
            self._longest = max(self._longest, now - self._step)
        self._step = now
        return self.left() <= self._longest

    def each(self, items: Sequence[str]) -> Iterator[str]:
        """The items without whole results that did not crash, as long as there is time; the rest is `not_reached`."""
        missing = [item for item in items if item not in self.results or item in self._missing]
        open_items = [item for item in missing if item not in self.lost]
        for number, item in enumerate(open_items):
            if self.left() <= 0:
                self.not_reached += open_items[number:]
                return
            self.doing = item
            self.keep()
            yield item
        self.doing = ""

    def keep(self, status: str = "running", reason: str = "") -> None:
        """Write what there is. Ends the process where the one that started it is gone."""
        if self.parent is not None and hasattr(os, "getppid") and os.getppid() != self.parent:
            os._exit(1)
        state = {"status": status, "reason": reason, "doing": self.doing, "not_reached": self.not_reached}
        self._entry.update({**state, "results": self.results})
        store.write(self.file, self._data)

    def lose(self, reason: str) -> None:
        """The item in work left the device unusable: end the process, so that the part goes on in a new one."""
        self._entry.setdefault("lost", {})[self.doing] = reason
        self.keep()
        os._exit(3)


def child(arguments: list[str]) -> int:
    """Measure one part here: `NAME FILE SECONDS PARENT MODULE:ATTRIBUTE CACHE`. Does not return.

    Outcomes of probes go to the folder `CACHE`: what is probed in a short time is not remembered for other programs.
    """
    name, file, seconds, parent, source, cache = arguments
    os.environ[CACHE_VARIABLE] = cache
    sys.stdout = sys.stderr  # what packages print while they load
    faulthandler.enable(all_threads=False)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    work = Work(name, Path(file), float(seconds), int(parent))
    module, _, attribute = source.partition(":")
    parts: Mapping[str, Callable[[Work], None]] = getattr(importlib.import_module(module), attribute)
    try:
        parts[name](work)
        status, reason = ("out of time", "") if work.not_reached else ("ok", "")
    except Skipped as lacking:
        status, reason = "skipped", str(lacking)
    except (Exception, SystemExit) as error:  # of a kernel, of a package: it costs this part alone
        status, reason = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        print(reason, file=sys.stderr)
    work.doing = ""
    work.keep(status, reason)
    # Libraries that crash while Python shuts down cost nothing any more.
    os._exit(0)
