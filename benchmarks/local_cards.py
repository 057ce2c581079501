"""Heads over two workers of one core each against one, on the CPU (`backends/cards`), and the model of their times.

`speed`: whole and divided calls in pairs, in an order that is drawn anew in each. Both workers share the tensors, so
nothing is copied: this says what handing over, two threads of Python and one output cost, and nothing about cards.
Each has half of the heads; `heads_as_chosen`: what the times of this run decided (null: undivided).
`same_bits`: whether both gave the same output. `model`: other calls, with copies that wait as a link of 1 GB/s and 1 ms
would: what `cost.py` predicted from whole calls and a measured link against what divided ones took.

Run: OMP_NUM_THREADS=1 python benchmarks/local_cards.py [--json FILE]   (no ComfyUI needed; about three minutes)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import conftest  # noqa: E402, F401  # loads this folder as the package attention_backends
import torch  # noqa: E402
from attention_backends.backends.cards.card import Card  # noqa: E402
from attention_backends.backends.cards.cost import predicted  # noqa: E402
from attention_backends.backends.cards.heads import HeadsOverCards  # noqa: E402
from attention_backends.backends.cards.transport import Transport  # noqa: E402
from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.engine.plan import CallKind, Slot  # noqa: E402
from attention_backends.backends.engine.routers import router_for  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.values.request import AttentionCall  # noqa: E402
from paired import machine, ratios, training_paused  # noqa: E402

CPU = torch.device("cpu")
PAIRS, FASTER = 21, 1.6
SPEED = (8, 4096, 64)
"""Heads, tokens and head size of the call that is compared."""
SIZES = ((512, 64), (768, 64), (1024, 64), (1024, 128), (1536, 64))
SHAPES = [(heads, tokens, dim) for heads in (4, 6, 8, 12) for tokens, dim in SIZES]
"""Those whose times are predicted."""
WHOLE = 5
"""Calls before the first divided one."""


class Slow(Transport):
    """Copies that take a latency and the time of their bytes."""

    def __init__(self, bytes_per_second: float = 1e9, latency: float = 1e-3) -> None:
        super().__init__("cpu:1", CPU)
        self.bytes_per_second, self.latency = bytes_per_second, latency

    def send(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        time.sleep(self.latency + sum(tensor.nbytes for tensor in tensors) / self.bytes_per_second)
        return list(tensors)

    def bring(self, source: torch.Tensor, target: torch.Tensor) -> None:
        time.sleep(self.latency + target.nbytes / self.bytes_per_second)
        super().bring(source, target)


def session(transport: Transport | None = None) -> Session:
    """On the CPU; with a transport, heads are divided."""
    layers = (AttentionConfig(AttentionSpec("torch_sdpa"), source="benchmark", guard="off"),)
    made = Session(router_for(CPU), layers, checks=False, device=CPU)
    if transport is not None:
        made.divider = HeadsOverCards(made, lambda like: [Card(transport, router_for, layers, like)])
    return made


def make_call(heads: int, tokens: int, dim: int) -> AttentionCall:
    random = torch.Generator().manual_seed(0)
    return AttentionCall(*(torch.randn(1, heads, tokens, dim, generator=random) for _ in range(3)))


def slot_of(of: Session, call: AttentionCall) -> Slot:
    return of.plan(CallKind(call.request(), "self", "self"))


def speed() -> dict[str, Any]:
    """One worker against two."""
    call, one, two = make_call(*SPEED), session(), session(Transport("cpu:1", CPU))
    whole, divided = slot_of(one, call), slot_of(two, call)
    for _ in range(WHOLE + 6):
        output = two.attention(divided, call)
    estimate = _latest(two)
    heads, tokens, dim = SPEED
    chosen, half = estimate.counts, (heads // 2, heads - heads // 2)

    def by_two() -> torch.Tensor:
        estimate.refusal, estimate.counts = None, half
        return two.attention(divided, call)

    found = ratios(lambda: one.attention(whole, call), by_two, PAIRS)
    return {
        "call": f"B1 H{heads} N{tokens} D{dim} float32",
        "one_worker_ms": found["stock_ms"],
        "two_workers_ms": found["ours_ms"],
        "faster": found["faster"],
        "limit": FASTER,
        "pairs": PAIRS,
        "heads_of_each": half,
        "heads_as_chosen": chosen,
        "same_bits": torch.equal(output, one.attention(whole, call)),
    }


def model(calls: int = 5) -> dict[str, Any]:
    """Predicted and measured times of divided calls, each half by half."""
    of = session(Slow())
    rows: dict[str, Any] = {}
    for heads, tokens, dim in SHAPES:
        call = make_call(heads, tokens, dim)
        slot = slot_of(of, call)
        for _ in range(WHOLE - 1):
            of.attention(slot, call)
        estimate = _latest(of)
        counts = (heads // 2, heads - heads // 2)
        home = estimate.whole_seconds / heads
        expected = predicted(counts, estimate.volume, home, estimate.costs(), 0.0)
        times = []
        for number in range(calls + 1):
            estimate.refusal, estimate.counts = None, counts
            start = time.perf_counter()
            of.attention(slot, call)
            if number:  # the first one plans
                times.append(time.perf_counter() - start)
        measured = statistics.median(times)
        rows[f"H{heads} N{tokens} D{dim}"] = {
            "whole_ms": round(estimate.whole_seconds * 1e3, 3),
            "predicted_ms": round(expected * 1e3, 3),
            "measured_ms": round(measured * 1e3, 3),
            "measured_over_predicted": round(measured / expected, 3),
        }
    off = [abs(row["measured_over_predicted"] - 1) for row in rows.values()]
    return {"rows": rows, "within_15_percent": sum(one <= 0.15 for one in off), "worst": round(max(off), 3)}


def _latest(of: Session) -> Any:
    return list(of.divider._estimates.values())[-1]  # type: ignore[attr-defined]  # a HeadsOverCards


def main() -> None:
    parser = argparse.ArgumentParser(description="Heads over two workers of one core each, against one.")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = os.getloadavg()[0]
    with training_paused(), torch.inference_mode():
        found = {"speed": speed(), "model": model()}
    after = os.getloadavg()[0]
    found |= {
        "machine": f"{machine()}, one torch thread for each worker",
        "load_before": round(before, 2),
        "load_after": round(after, 2),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "command": "OMP_NUM_THREADS=1 python benchmarks/local_cards.py --json FILE",
    }
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
