"""Fast parts for the command `card`, which `tests/project/test_card.py` has its processes import; and kills in a write.

`CARD_TEST_KILL` holds `WHO:NUMBER:MOMENT`: the process that writes (`child` or `parent`) kills itself with SIGKILL in
its write of that number, at one of `MOMENTS`; once, after which there is the file `CARD_TEST_KILLED`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attention_backends.comparison.card import store
from attention_backends.comparison.card.work import CHILD, Skipped, Work

MOMENTS = ("opened", "half written", "not synced", "not replaced", "replaced")
MACHINE = {"card": "Some Card sm_90", "device": "cuda", "machine": "a machine", "versions": {"torch": "2"}}
ITEMS = [f"item {number}" for number in range(4)]


def machine(work: Work) -> None:
    work.results.update(MACHINE)


def quick(work: Work) -> None:
    for item in work.each(ITEMS):
        work.results[item] = {"text": "x" * 5000}


def crashing(work: Work) -> None:
    for item in work.each(ITEMS):
        if item == "item 2":
            os.kill(os.getpid(), signal.SIGSEGV)
        work.results[item] = 1


def hanging(work: Work) -> None:
    for item in work.each(ITEMS):
        if item == "item 1":
            time.sleep(600)
        work.results[item] = 1


def losing(work: Work) -> None:
    for item in work.each(ITEMS):
        if item == "item 0":
            work.lose("the device is gone")
        work.results[item] = 1


def raising(work: Work) -> None:
    work.results["before"] = 1
    raise ValueError(f"no kernel image in {Path.home()}/secret/kernel.so")


def skipping(work: Work) -> None:
    raise Skipped("no CUDA device")


def late(work: Work) -> None:
    """Its first process has no time for the last items."""
    first = not work.results
    for item in work.each(ITEMS):
        work.results[item] = 1
        if first and item == "item 1":
            work._seconds = 0.0


PARTS: dict[str, Callable[[Work], None]] = {
    "machine": machine,
    "quick": quick,
    "crashing": crashing,
    "hanging": hanging,
    "losing": losing,
    "raising": raising,
    "skipping": skipping,
    "late": late,
}


def kill_in_a_write(number: int, moment: str) -> None:
    """Have this process die in its write of this number."""
    writes = [0]
    whole, replace, sync = store.write_whole, os.replace, os.fsync

    def die(*_: Any) -> None:
        Path(os.environ["CARD_TEST_KILLED"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def write(path: Path, text: str) -> None:
        writes[0] += 1
        if writes[0] != number:
            return whole(path, text)
        if moment in ("opened", "half written"):
            part = "" if moment == "opened" else text[: len(text) // 2]
            path.with_name(f"{path.name}.{os.getpid()}{store.UNFINISHED}").write_text(part)
            die()
        os.fsync = die if moment == "not synced" else sync
        os.replace = die if moment == "not replaced" else replace
        whole(path, text)
        die()

    store.write_whole = write


who, _, rest = os.environ.get("CARD_TEST_KILL", "").partition(":")
if who == ("child" if CHILD in sys.argv else "parent") and not Path(os.environ["CARD_TEST_KILLED"]).exists():
    kill_in_a_write(int(rest.partition(":")[0]), rest.partition(":")[2])
