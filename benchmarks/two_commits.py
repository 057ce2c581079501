"""What a change costs per attention call: the same measurement in two commits, alternated.

Each commit runs in a separate process, from its own checkout, with the functions of its `overhead.py`.
The two take turns, in random order in each round, so that drift of the machine falls on both. A process keeps its
layout of memory to its end, which alone changes a figure by up to 4 %, so several pairs of processes are started, and
each gives one difference. The figures are microseconds per attention call, and the difference with a 95 % interval over
the pairs. A commit compared with itself shows what the method can tell apart.

Run: python benchmarks/two_commits.py BEFORE [AFTER] [--pairs N] [--rounds N] [--json FILE]   (AFTER: this folder)
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paired import interval, machine, training_paused

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "override_path_over_bare_sdpa": ("override_path", 20, ("ours_over_bare_us", "median")),
    "mask_plan_lookup": ("mask_lookup", 20, ("median",)),
    "tiny_wan_over_stock": ("tiny_wan", 60, ("ours_minus_stock_us_per_attention_call", "median")),
}
"""Figure: the function of `overhead.py`, its rounds each time it is asked, and where its result has the figure."""


def work(tree: Path) -> None:
    """Measure what standard input names, a line each, until it ends. Runs in a separate process."""
    sys.path[:0] = [str(tree / "tests"), str(tree / "benchmarks")]
    import logging

    import comfy_location
    import overhead  # loads `tree` as the package
    import tiny_sampling
    import torch

    comfyui = comfy_location.find_comfyui()
    if comfyui is None:
        raise SystemExit(comfy_location.why_no_comfyui())
    answers = sys.stdout
    sys.stdout = sys.stderr  # what ComfyUI prints while it starts is no answer
    tiny_sampling.prepare(comfyui, "--use-pytorch-cross-attention")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with torch.inference_mode():
        for line in sys.stdin:
            function, rounds, path = PARTS[line.strip()]
            figure: Any = getattr(overhead, function)(rounds)
            for name in path:
                figure = figure[name]
            print(json.dumps(figure), file=answers, flush=True)


class Worker:
    """One commit's process."""

    def __init__(self, tree: Path) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--work", str(tree)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def measure(self, part: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(part, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(map(str, self.process.args))} ended without an answer; run it by hand")  # type: ignore[arg-type]
        return float(json.loads(answer))


def measure_pair(trees: dict[str, Path], parts: Iterable[str], rounds: int) -> dict[str, dict[str, float]]:
    """One process of each commit: for each part the medians of their turns, in microseconds."""
    workers = {name: Worker(trees[name]) for name in random.sample(["before", "after"], 2)}
    medians = {}
    for part in parts:
        times: dict[str, list[float]] = {"before": [], "after": []}
        for worker in workers.values():
            worker.measure(part)  # not counted
        for _ in range(rounds):
            for name in random.sample(["before", "after"], 2):
                times[name].append(workers[name].measure(part))
        medians[part] = {name: statistics.median(values) for name, values in times.items()}
    for worker in workers.values():
        worker.process.kill()
        worker.process.wait()
    return medians


def compared(pairs: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "before_us": round(statistics.median(pair["before"] for pair in pairs), 2),
        "after_us": round(statistics.median(pair["after"] for pair in pairs), 2),
        "difference_us": interval([pair["after"] - pair["before"] for pair in pairs], 2),
        "ratio": interval([pair["after"] / pair["before"] for pair in pairs]),
    }


def commit_of(revision: str) -> str:
    return subprocess.check_output(["git", "rev-parse", "--short", revision], cwd=ROOT, text=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", nargs="?")
    parser.add_argument("after", nargs="?", help="a commit; left out: this folder")
    parser.add_argument("--pairs", type=int, default=12, help="pairs of processes; default: 12")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each pair; default: 3")
    parser.add_argument("--part", choices=PARTS, help="measure that one alone")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work)
        return
    if arguments.before is None:
        parser.error("name the commit to compare with")
    with tempfile.TemporaryDirectory() as folder:
        trees = {}
        for name in ("before", "after"):
            revision = getattr(arguments, name)
            trees[name] = Path(folder, name) if revision else ROOT
            if revision:
                command = ["git", "worktree", "add", "--quiet", "--detach", str(trees[name]), revision]
                subprocess.run(command, cwd=ROOT, check=True)
        try:
            parts = list(PARTS) if arguments.part is None else [arguments.part]
            pairs = [measure_pair(trees, parts, arguments.rounds) for _ in range(arguments.pairs)]
            result: dict[str, Any] = {part: compared([pair[part] for pair in pairs]) for part in parts}
        finally:
            for tree in trees.values():
                if tree != ROOT:
                    subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    after = commit_of(arguments.after or "HEAD") + ("" if arguments.after else ", with the changes in this folder")
    import torch

    result |= {
        "before": commit_of(arguments.before),
        "after": after,
        "pairs": arguments.pairs,
        "rounds": arguments.rounds,
    }
    result |= {"torch": torch.__version__, "python": sys.version.split()[0]}
    result["machine"] = f"{machine()}, one torch thread"
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    with training_paused():
        main()
