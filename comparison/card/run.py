"""Runs the parts of `card` one after another within a given time, each in its own process.

A part may take a third of the time that is left, the last but one half of it and the last one all of it, so that a part
that hangs leaves time for those after it. Where a kernel crashes, its part goes on in a new process without it.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from ...backends.doctor.isolated import Ended, run, same_interpreter, words_of
from . import store
from .work import CHILD, OURS

MACHINE = "machine"
"""The first part: it says which card this is, after which the folder of the results is named."""
GRACE = 3.0
"""Seconds between the time that a part is given and the moment when its process is killed."""
LEAST = 5.0
"""Seconds without which a part is not started: importing torch takes most of them."""

MARGIN = 4.0
"""Seconds at the end, for the last file and the start of this program."""

UNDONE = ("out of time", "not started")
"""Statuses of parts that are taken up at the end."""

Say = Callable[[str], None]


def measure(
    out: Path, names: Sequence[str], minutes: float, command: str, say: Say, *, source: str = OURS
) -> tuple[Path, bool]:
    """Measure all parts of `names`; the file with the results, and whether a person interrupted it.

    Args:
        out: where the folder of the card is made.
        source: `module:attribute` of the functions of the parts.
    """
    end = time.monotonic() + 60 * minutes - MARGIN
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    facts = {"kind": store.KIND, "format": store.FORMAT, "command": command, "minutes": minutes, "started": now}
    out.mkdir(parents=True, exist_ok=True)
    file = out / store.RUNNING
    store.write(file, {**facts, "state": "running", "parts": {}})
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="attention-card-", ignore_cleanup_errors=True) as cache:
        try:
            for number, name in enumerate((MACHINE, *names)):
                _part(file, name, end, max(1 / 3, 1 / (len(names) + 1 - number)), (source, cache), say)
                if name == MACHINE:
                    file = _in_its_folder(file, out)
            for name in names:  # what had too little time in its turn
                if store.read(file)["parts"][name]["status"] in UNDONE and end - time.monotonic() > LEAST:
                    _part(file, name, end, 1.0, (source, cache), say)
        except KeyboardInterrupt:
            interrupted = True
    data = store.read(file)
    data["state"] = "interrupted" if interrupted else "complete"
    ended = file.with_name(store.RUNNING if interrupted else store.ENDED)
    store.write(ended, data)
    if ended != file:
        for left in (file, file.with_suffix(".md")):
            left.unlink()
    return ended, interrupted


def _part(file: Path, name: str, end: float, share: float, given: tuple[str, str], say: Say) -> None:
    say(f"{name} ... ({max(0.0, end - time.monotonic()):.0f} s left)")
    _run(file, name, end, share, given)
    entry = store.read(file)["parts"][name]
    say(f"  {': '.join(filter(None, (entry['status'], entry['reason'])))}, {entry['seconds']:.0f} s")


def _run(file: Path, name: str, end: float, share: float, given: tuple[str, str]) -> None:
    """Run one part, again without what crashed, until it ends or its time is over; its entry says what came of it."""
    now = time.monotonic()
    known = store.read(file)["parts"].get(name, {})
    start, limit = now - known.get("seconds", 0.0), (end - now) * share
    until = now + limit
    folder = Path(__file__).resolve().parents[2]
    if limit < LEAST:
        if not known:
            _note(file, name, start, "not started", f"{max(0.0, limit):.0f} s left for it")
        return
    while True:
        left = until - time.monotonic()
        words = [CHILD, name, str(file), str(max(0.0, left - GRACE)), str(os.getpid()), *given]
        ended = run([*same_interpreter(), str(folder), *words], max(left, 0.1))
        entry = store.read(file)["parts"].get(name, {})
        if entry.get("status", "running") != "running":
            return _note(file, name, start, entry["status"], entry["reason"])
        doing = entry.get("doing", "")
        reason = entry.get("lost", {}).get(doing) or _why(ended, limit)
        _note(file, name, start, "crashed" if ended.status is not None else "out of time", reason, doing, ended)
        if ended.status is None or not doing or until - time.monotonic() < LEAST:
            return


def _why(ended: Ended, limit: float) -> str:
    return f"killed after {limit:.0f} s" if ended.status is None else words_of(ended.status)


def _note(
    file: Path, name: str, start: float, status: str, reason: str, doing: str = "", ended: Ended | None = None
) -> None:
    data = store.read(file)
    entry = data["parts"].setdefault(name, {"results": {}})
    entry.update(status=status, reason=f"{reason} in {doing}" if doing else reason, seconds=time.monotonic() - start)
    if doing:
        entry.setdefault("lost", {})[doing] = reason
    if ended is not None:
        entry["stderr"] = list(ended.tail)
    store.write(file, data)


def _in_its_folder(file: Path, out: Path) -> Path:
    """Move the results to the folder of their card."""
    card = str(store.read(file)["parts"][MACHINE]["results"].get("card", ""))
    folder = out / (re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") or "unknown")
    folder.mkdir(exist_ok=True)
    for left in folder.glob(f"*{store.UNFINISHED}"):  # of a run that was killed while it wrote
        left.unlink(missing_ok=True)
    for name in (file.name, file.with_suffix(".md").name):
        os.replace(out / name, folder / name)
    return folder / file.name
