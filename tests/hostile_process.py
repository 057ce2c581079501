"""Runs `hostile_texts.py` in a process of its own, which may take only so much.

    python hostile_process.py FOLDER_OF_THE_PACK [PART OF A NAME ...]

It prints a line of JSON for each case: what became of it, the CPU seconds and the memory that it took. Where the
system knows limits, a case that goes on for too long is ended, and one that takes too much memory fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from hostile_texts import CASES, Work, ours

LONGEST_SECONDS = 8
"""CPU seconds after which a case is ended."""
MOST_MEMORY = 3 << 30
"""Bytes of address space above what is there before the first case."""


def load_package(root: Path) -> None:
    """The pack as a package, and its `nodes` as one too, without what needs ComfyUI."""
    spec = importlib.util.spec_from_file_location(
        "attention_backends", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["attention_backends"] = package
    spec.loader.exec_module(package)
    nodes = ModuleType("attention_backends.nodes")
    nodes.__path__ = [str(root / "nodes")]
    sys.modules["attention_backends.nodes"] = nodes


class TooLongError(BaseException):
    """A case was ended; no reader catches it."""


def limit() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, resource.RLIM_INFINITY))

    def end(number: int, frame: FrameType | None) -> None:
        raise TooLongError

    signal.signal(signal.SIGPROF, end)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, LONGEST_SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


class Memory:
    """The highest memory of a case, in MB above what was there before it; None where the system does not tell."""

    def __init__(self) -> None:
        self.before = self._begin()

    def _begin(self) -> int | None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        return self._highest()

    def _highest(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0])

    @property
    def taken(self) -> float | None:
        return None if self.before is None else (self._highest() - self.before) / 1024


def measured(work: Work, folder: Path) -> dict[str, Any]:
    """Run one case; what is made for it is not measured."""
    run = work(folder)
    memory, start = Memory(), time.process_time()
    try:
        with watched():
            run()
        outcome = {"outcome": "read"}
    except BaseException as error:
        outcome = {"outcome": type(error).__name__, "message": str(error)[:5000]}
    return {**outcome, "seconds": time.process_time() - start, "memory": memory.taken}


def main() -> None:
    load_package(Path(sys.argv[1]))
    wanted = sys.argv[2:]
    with contextlib.suppress(Exception):  # load what the first case would load
        ours("backends.config.text").parse_config("a: {b: [x]}\n")
        ours("cli").main(["explain", "--platform", "cpu", "--request", "x"])
    for name in ("comparison.replay_command", "nodes.http.machine_settings", "backends.values.privacy"):
        ours(name)
    limit()
    for name, work in CASES.items():
        if wanted and not any(part in name for part in wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"case": name, **measured(work, Path(folder))}), flush=True)


if __name__ == "__main__":
    main()
