"""What two processes keep that write at once, one of which is killed in the middle: SQLite against one JSON file.

`sqlite` is the store of autotune, `json` the file of probes, which is read, changed and replaced as a whole. In each
round two processes put 150 entries each; the first is killed (SIGKILL, so not on Windows) at a random moment. Then the
file is read: `acked` entries were reported as put, `lost` are those of them that are not there.

Run: python benchmarks/store_killed.py [ROUNDS]
"""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = 150


def inside(name: str) -> Any:
    return importlib.import_module(f"attention_backends.backends.{name}")


def put_and_known(kind: str, folder: Path) -> Any:
    """How to put one entry by name, and how to read the names of all."""
    if kind == "json":
        os.environ["ATTENTION_BACKENDS_CACHE"] = str(folder)
        remembered, machine = inside("measure.remembered"), inside("values.platform").Platform

        def put(name: str) -> None:
            remembered.remember({"reference": remembered.Outcome("ok", name)}, machine("cuda", torch=name))

        return put, lambda: {one.reason for one in remembered._outcomes(remembered.path()).values()}
    store = inside("observe.autotune.store").Store(folder / "measured.sqlite3")
    entry, key = inside("observe.autotune.entry").Entry, inside("measure.call_key").TuningKey

    def put(name: str) -> None:
        facts = key(name, "bfloat16", 1, 8, 8, 4096, 4096, 128, 128, "none", False, False)
        store.put(entry(facts, "here", "exact", "a", "a", {"a": 1.0}, {}, {}, time.time()))

    return put, lambda: {one["role"] for one in store.entries()}


def writer(kind: str, folder: str, prefix: str) -> None:
    put, _ = put_and_known(kind, Path(folder))
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(ENTRIES):
        put(f"{prefix}{number}")
        print(f"{prefix}{number}", flush=True)


def one_round(kind: str, folder: Path, wait: float) -> dict[str, int]:
    command = [sys.executable, str(ROOT / "devtools/inside/with_package.py"), __file__, "writer", kind, str(folder)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, prefix], **pipes) for prefix in "ab"]
    for one in writers:
        one.stdout.readline()
    for one in writers:
        one.stdin.write("\n")
        one.stdin.flush()
    time.sleep(wait)
    writers[0].kill()
    acked = {line for one in writers for line in one.communicate()[0].splitlines()}
    lost = acked - put_and_known(kind, folder)[1]()
    left = len(list(folder.iterdir())) - 1
    return {"acked": len(acked), "lost": len(lost), "rounds with a loss": bool(lost), "files left behind": left}


if __name__ == "__main__":
    if sys.argv[1:2] == ["writer"]:
        writer(*sys.argv[2:])
    elif "attention_backends" not in sys.modules:
        command = [sys.executable, str(ROOT / "devtools/inside/with_package.py"), *sys.argv]
        sys.exit(subprocess.call(command))
    else:
        rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 50
        for kind in ("sqlite", "json"):
            source, found = random.Random(7), Counter[str]()
            for _ in range(rounds):
                with tempfile.TemporaryDirectory() as folder:
                    found.update(one_round(kind, Path(folder), source.uniform(0.02, 0.6)))
            print(kind, dict(found))
