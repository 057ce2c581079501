"""What a change costs per attention call: the same measurement in two commits, alternated.

Each commit runs in a separate process, from its own checkout, with the functions of its `overhead.py`.
The two take turns, in random order in each round, so that drift of the machine falls on
both. The figures are microseconds per attention call and the difference of each pair, with a 95 % interval.

Run: python benchmarks/two_commits.py BEFORE [AFTER] [--rounds N] [--json FILE]   (AFTER: this folder)
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from paired import interval, machine

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


def compare(before: Worker, after: Worker, part: str, rounds: int) -> dict[str, Any]:
    rng = random.Random(0)
    times: dict[str, list[float]] = {"before": [], "after": []}
    for worker in (before, after):
        worker.measure(part)
    for _ in range(rounds):
        for name in rng.sample(["before", "after"], 2):
            times[name].append((before if name == "before" else after).measure(part))
    pairs = list(zip(times["before"], times["after"], strict=True))
    return {
        "before_us": round(statistics.median(times["before"]), 2),
        "after_us": round(statistics.median(times["after"]), 2),
        "difference_us": interval([b - a for a, b in pairs], 2),
        "ratio": interval([b / a for a, b in pairs]),
    }


def commit_of(revision: str) -> str:
    return subprocess.check_output(["git", "rev-parse", "--short", revision], cwd=ROOT, text=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", nargs="?")
    parser.add_argument("after", nargs="?", help="a commit; left out: this folder")
    parser.add_argument("--rounds", type=int, default=30)
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
            workers = {name: Worker(tree) for name, tree in trees.items()}
            parts = PARTS if arguments.part is None else [arguments.part]
            result: dict[str, Any] = {
                name: compare(workers["before"], workers["after"], name, arguments.rounds) for name in parts
            }
            for worker in workers.values():
                worker.process.kill()
        finally:
            for tree in trees.values():
                if tree != ROOT:
                    subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    after = commit_of(arguments.after or "HEAD") + ("" if arguments.after else ", with the changes in this folder")
    import torch

    result |= {"before": commit_of(arguments.before), "after": after, "rounds": arguments.rounds}
    result |= {"torch": torch.__version__, "python": sys.version.split()[0]}
    result["machine"] = f"{machine()}, one torch thread"
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
