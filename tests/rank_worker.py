"""Ranks of torch.distributed (gloo) for tests: this process imports torch once, and the ranks are its forks.

It reads commands from its input, one JSON object a line, and answers each with one line:

- `{"start": 4}` forks a set of ranks with a store of their own; the answer is the number of the set.
- `{"set": 0, "ranks": [0, 1], "name": "sweep", "args": {...}, "within": 60}` calls a function of `rank_cases.py` on
  some ranks. The answer has for each rank what the function returns, or `{"error": ..., "text": ...}`; null where the
  rank ended, or did not answer within so many seconds.
- `{"set": 0, "kill": [1]}` kills ranks.

Run: python tests/rank_worker.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent


class Rank(NamedTuple):
    """A forked process, and the ends of its pipes."""

    pid: int
    commands: int
    answers: int


def load_cases() -> Any:
    """`rank_cases.py`, with this folder as the package."""
    sys.path[:0] = [str(ROOT / "tests")]
    spec = importlib.util.spec_from_file_location(
        "attention_backends", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["attention_backends"] = package
    spec.loader.exec_module(package)
    import rank_cases

    return rank_cases


def serve(cases: Any, rank: int, size: int, port: int, commands: int, answers: int) -> None:
    """One rank: run commands until its input ends."""
    from torch import distributed

    store = distributed.TCPStore("127.0.0.1", port, size, is_master=False, timeout=timedelta(seconds=60))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    cases.make_groups(size)
    with os.fdopen(commands) as lines, os.fdopen(answers, "w") as out:
        for line in lines:
            command = json.loads(line)
            try:
                answer = getattr(cases, command["name"])(tuple(command["ranks"]), **command["args"])
            except Exception as error:
                answer = {"error": type(error).__name__, "text": str(error)}
            out.write(json.dumps(answer) + "\n")
            out.flush()


def start(cases: Any, size: int, port: int, others: list[Rank]) -> list[Rank]:
    """Fork the ranks of a set."""
    ranks: list[Rank] = []
    for rank in range(size):
        (command_r, command_w), (answer_r, answer_w) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for other in (*others, *ranks):  # else the input of another rank would not end
                    os.close(other.commands)
                    os.close(other.answers)
                for file in (0, command_w, answer_r):
                    os.close(file)
                serve(cases, rank, size, port, command_r, answer_w)
            finally:
                sys.stderr.flush()
                os._exit(0)
        os.close(command_r)
        os.close(answer_w)
        ranks.append(Rank(pid, command_w, answer_r))
    return ranks


def answers_of(ranks: list[Rank], within: float) -> list[Any]:
    """One line of each rank."""
    texts = {rank.answers: b"" for rank in ranks}
    waiting, until = set(texts), time.monotonic() + within
    while waiting and (left := until - time.monotonic()) > 0:
        for file in select.select(list(waiting), [], [], left)[0]:
            data = os.read(file, 1 << 16)
            texts[file] += data
            if not data or texts[file].endswith(b"\n"):
                waiting.discard(file)
    return [json.loads(text) if text.endswith(b"\n") else None for text in texts.values()]


def main() -> None:
    cases = load_cases()
    from torch import distributed

    sets: list[list[Rank]] = []
    stores = []
    for line in sys.stdin:
        command = json.loads(line)
        answer: Any = None
        if "start" in command:
            stores.append(distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
            everyone = [rank for ranks in sets for rank in ranks]
            sets.append(start(cases, command["start"], stores[-1].port, everyone))
            answer = len(sets) - 1
        elif "kill" in command:
            for at in command["kill"]:
                os.kill(sets[command["set"]][at].pid, signal.SIGKILL)
        else:
            ranks = [sets[command["set"]][at] for at in command["ranks"]]
            for rank in ranks:
                os.write(rank.commands, line.encode())
            for late in command.get("kill_after", []):
                time.sleep(late["seconds"])
                os.kill(sets[command["set"]][late["rank"]].pid, signal.SIGKILL)
            answer = answers_of(ranks, command["within"])
        print(json.dumps(answer), flush=True)
    for ranks in sets:
        for rank in ranks:
            os.kill(rank.pid, signal.SIGKILL)
            os.waitpid(rank.pid, 0)  # its CPU time counts for this process


if __name__ == "__main__":
    main()
