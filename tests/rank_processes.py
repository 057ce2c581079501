"""Starts `rank_worker.py` and sends it commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class RankProcesses:
    """Sets of ranks, forked by one process."""

    def __init__(self) -> None:
        worker = Path(__file__).parent / "rank_worker.py"
        self.process = subprocess.Popen(
            [sys.executable, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, size: int) -> RankSet:
        """A new set of ranks."""
        return RankSet(self, self.ask(start=size), size)

    def ask(self, **command: Any) -> Any:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class RankSet:
    """Ranks that can make groups with each other."""

    def __init__(self, processes: RankProcesses, number: int, size: int) -> None:
        self.processes, self.number, self.size = processes, number, size

    def run(
        self, name: str, ranks: tuple[int, ...] | None = None, *, within: float = 100,
        kill_after: tuple[dict[str, float], ...] = (), **args: Any,
    ) -> list[Any]:  # fmt: skip
        """The answer of each of `ranks`, by default of all, to a function of `rank_cases.py`.

        `kill_after`: ranks that are killed meanwhile, such as `{"rank": 1, "seconds": 0.5}`.
        """
        ranks = tuple(range(self.size)) if ranks is None else ranks
        found: list[Any] = self.processes.ask(
            set=self.number, ranks=ranks, name=name, args=args, within=within, kill_after=kill_after
        )
        return found
