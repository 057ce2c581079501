"""What size of error the guard sees, how soon, and what honest arithmetic looks like to it.

Errors of known size are planted into the output of arithmetic that real kernels have (tests/tolerance.py and the
backend emulated_int8 emulate it): every row of one head of 24, or of all heads, off by a share of its size in a
random direction; and the softmax scale of one head, or of all, off by some percent. Each is shown to the guard's check
with the limits of that arithmetic. How soon is counted by simulated runs whose kernels compute nothing. The honest
figures are those of the same arithmetic without an error, on plain random numbers, on the same with scores three times
as large, and with two channels of query and key eight times as large as the others (outlier channels).

Run: python benchmarks/guard_sight.py [--json FILE]   (no ComfyUI and no GPU needed; about two minutes on one core)
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import conftest  # noqa: E402, F401  # loads this folder as the package attention_backends
import tolerance  # noqa: E402
import torch  # noqa: E402
from guarded_runs import int8, sdpa  # noqa: E402
from paired import machine, training_paused  # noqa: E402

HEADS, TOKENS, HEAD_DIM = 24, 256, 64
CALLS = 40
"""Checks behind each share."""
HONEST = 100
SIZES = (0.03, 0.05, 0.07, 0.09, 0.1, 0.12, 0.15, 0.2, 0.3, 0.5)
SCALES = (1.05, 1.1, 1.2, 1.3, 1.5, 2.0)
RUNS = (2, 4, 8, 20, 50)
BLOCKS = 80
DATA = ("plain", "scores x3", "outlier channels")

ARITHMETIC: dict[str, tuple[str, torch.dtype, Callable[[Any], torch.Tensor]]] = {
    "bfloat16, every step rounded": ("half", torch.bfloat16, tolerance._plain),
    "INT8 scores": ("int8", torch.bfloat16, int8),
    "INT8 scores, FP8 weights and values": ("fp8", torch.bfloat16, tolerance._int8_fp8),
}


def tensors(kind: str, draw: torch.Generator) -> list[torch.Tensor]:
    query, key, value = (torch.randn(1, HEADS, TOKENS, HEAD_DIM, generator=draw) for _ in range(3))
    key = key + torch.randn(1, HEADS, 1, HEAD_DIM, generator=draw)
    if kind == "scores x3":
        query = 3 * query
    elif kind == "outlier channels":
        channels = torch.randperm(HEAD_DIM, generator=draw)[:2]
        query[..., channels] *= 8
        key[..., channels] *= 8
    return [query, key, value]


def checked(call: Any, output: torch.Tensor, arithmetic: str, seed: int) -> Any:
    """The findings of one check of a call with this output."""
    from attention_backends.backends.observe.guard import Guard
    from attention_backends.backends.report import Row, RunReport
    from attention_backends.backends.values.tolerance import tolerance

    guard, row = Guard("watch", RunReport(), everything=True, seed=seed), Row("self", "0", "", "", "none")
    output = output.to(call.query.dtype)
    watch = guard.watched(lambda _: output, "exact", row, tolerance(arithmetic))
    guard.check(watch, call, 0)  # type: ignore[arg-type]
    return row.guard


def calls(kind: str, dtype: torch.dtype, count: int) -> list[Any]:
    from attention_backends.backends.values.request import AttentionCall

    draw = torch.Generator().manual_seed(1)
    return [AttentionCall(*(tensor.to(dtype) for tensor in tensors(kind, draw))) for _ in range(count)]


def off_by(output: torch.Tensor, error: float, heads: slice, draw: torch.Generator) -> torch.Tensor:
    output, direction = output.float().clone(), torch.randn(output.shape, generator=draw)
    direction *= output.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True)
    output[:, heads] += error * direction[:, heads]
    return output


def scaled(call: Any, factor: float, heads: slice, kernel: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    from attention_backends.backends.values.request import AttentionCall

    query = call.query.clone()
    query[:, heads] *= factor
    return kernel(AttentionCall(query, call.key, call.value))


def of_sizes() -> dict[str, dict[str, dict[str, float]]]:
    """Arithmetic -> what is off -> the share of checks that gave an alarm."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, (arithmetic, dtype, kernel) in ARITHMETIC.items():
        made, draw = calls("plain", dtype, CALLS), torch.Generator().manual_seed(2)
        right = [kernel(call) for call in made]
        lines = table[name] = {}
        for where, heads in (("one head", slice(7, 8)), ("all heads", slice(None))):
            for error in SIZES:
                wrong = [off_by(output, error, heads, draw) for output in right]
                seen = [checked(call, wrong[at], arithmetic, at).alarms for at, call in enumerate(made)]
                lines.setdefault(f"{error:.0%} of a row's size", {})[where] = sum(seen) / CALLS
            for factor in SCALES:
                wrong = [scaled(call, factor, heads, kernel) for call in made]
                seen = [checked(call, wrong[at], arithmetic, at).alarms for at, call in enumerate(made)]
                lines.setdefault(f"softmax scale x {factor:g}", {})[where] = sum(seen) / CALLS
        print(name, lines, flush=True)
    return table


def of_honest() -> dict[str, dict[str, dict[str, float]]]:
    """Data -> arithmetic -> figures of checks without a planted error: median, worst, share of alarms."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for kind in DATA:
        for name, (arithmetic, dtype, kernel) in {**ARITHMETIC, "SDPA": ("half", torch.bfloat16, sdpa)}.items():
            found = [checked(call, kernel(call), arithmetic, at) for at, call in enumerate(calls(kind, dtype, HONEST))]
            table.setdefault(kind, {})[name] = {
                "head_median": statistics.median(one.relative_l2 for one in found),
                "head_worst": max(one.relative_l2 for one in found),
                "call_median": statistics.median(one.call_l2 for one in found),
                "call_worst": max(one.call_l2 for one in found),
                "row_worst": max(one.row_error for one in found),
                "alarms": sum(one.alarms > 0 for one in found) / HONEST,
            }
            print(kind, name, table[kind][name], flush=True)
    return table


def checks_of(steps: int) -> list[tuple[int, int]]:
    """Step and block of each check of a run."""
    from attention_backends.backends.observe.guard import Guard
    from attention_backends.backends.observe.guard.turns import Step
    from attention_backends.backends.report import Row, RunReport
    from attention_backends.backends.values.request import AttentionCall

    nothing = AttentionCall(*[torch.zeros(1)] * 3)
    guard = Guard("watch", RunReport(), everything=False)
    found: list[tuple[int, int]] = []
    guard.check = lambda watch, call, number: found.append((guard.turns.step, int(watch.role_and_block[1])))  # type: ignore
    watches: list[Any] = []

    def model() -> list[Any]:
        for block in range(BLOCKS):
            if len(watches) == block:
                row = Row("cross" if block % 2 else "self", str(block), "", "", "")
                watches.append(guard.watched(lambda call: None, "quantized", row))
            watches[block](nothing)
        return []

    for step in range(steps):
        guard.model_call(object(), model, model, Step(step, steps))
    return found


def of_runs(count: int = 400) -> dict[str, dict[str, float]]:
    """Steps of a run -> after how many steps an error that each check sees is seen: in all blocks, in one block.

    Begin and block are drawn. `unseen` is the share of the runs that end before the block's next turn.
    """
    from attention_backends.backends.observe.guard.turns import period

    table = {}
    for steps in RUNS:
        source, looked_at = random.Random(steps), checks_of(steps)
        delays, everywhere = [], []
        for _ in range(count):
            begin, block = source.randrange(steps), source.randrange(BLOCKS)
            delays.append(min((s - begin + 1 for s, b in looked_at if b == block and s >= begin), default=None))
            everywhere.append(min(s - begin + 1 for s, _ in looked_at if s >= begin))
        seen = [delay for delay in delays if delay is not None]
        table[str(steps)] = {
            "checks_of_a_block": len(looked_at) / BLOCKS,
            "stated_steps": period(steps),
            "all_blocks_worst": max(everywhere),
            "one_block_median": statistics.median(seen),
            "one_block_worst": max(seen),
            "one_block_unseen": 1 - len(seen) / count,
        }
        print(steps, table[str(steps)], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    chosen = parser.parse_args()
    from attention_backends.backends.values.tolerance import tolerance
    from guard_budget import rounded

    torch.set_num_threads(1)  # on tensors this small, threads mostly wait for each other
    with torch.inference_mode():
        runs, honest, sizes = of_runs(), of_honest(), of_sizes()
    found = rounded(
        {
            "command": "python benchmarks/guard_sight.py",
            "machine": f"{machine()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "call": f"1 x {HEADS} heads x {TOKENS} tokens x {HEAD_DIM}",
            "checks_behind_each_share": CALLS,
            "limits": {
                name: {**tolerance(name)._asdict(), "call_l2": tolerance(name).call_l2}
                for name in ("half", "int8", "fp8")
            },
            "runs": runs,
            "honest": honest,
            "sizes": sizes,
        }
    )
    text = json.dumps(found, indent=1)
    if chosen.json:
        chosen.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    with training_paused():
        main()
