"""Ulysses against ring over processes on this machine, and what `parallel="auto"` predicts of both.

The group is measured once, as the first call with `auto` does (`backends/parallel/link.py`): `link` has the figures and
the seconds that it took. Then each call runs by either strategy, in an order that is drawn anew in each round; a call
takes as long as on the slowest process. `ring_over_ulysses`: the predicted ratio and the measured one, the median of
rounds with a 95 % interval. `auto` is what it takes; `faster` what was faster in the median.

Run: OMP_NUM_THREADS=1 python benchmarks/group.py [--processes 2] [--rounds 11] [--json FILE]   (gloo, on the CPU)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

if "attention_backends" not in sys.modules:
    import conftest  # noqa: F401  # loads this folder as the package attention_backends
import torch  # noqa: E402
from attention_backends.backends import attention  # noqa: E402
from attention_backends.backends.parallel.link import measured  # noqa: E402
from attention_backends.backends.parallel.rank_group import RankGroup, rank_group  # noqa: E402
from attention_backends.backends.parallel.shards import Shards  # noqa: E402
from attention_backends.backends.parallel.strategy import Link, predicted  # noqa: E402
from attention_backends.backends.values.request import AttentionRequest  # noqa: E402
from paired import interval, machine, training_paused  # noqa: E402
from torch import distributed  # noqa: E402

ROUNDS = 11
STRATEGIES = ("ulysses", "ring")


class Shape(NamedTuple):
    """A call over all processes; float32, batch 1."""

    heads: int
    kv_heads: int
    tokens: int
    dim: int
    is_causal: bool = False

    @property
    def name(self) -> str:
        of_keys = f" of {self.kv_heads} key heads" if self.kv_heads != self.heads else ""
        return f"H{self.heads}{of_keys} N{self.tokens} D{self.dim}{' causal' if self.is_causal else ''}"


SHAPES = (
    Shape(8, 8, 256, 64),
    Shape(8, 8, 1024, 64),
    Shape(8, 8, 2048, 64),
    Shape(8, 1, 1024, 64),
    Shape(1, 1, 2048, 64),
    Shape(3, 3, 1024, 128),
    Shape(8, 8, 1024, 64, True),
)


def rows(ranks: RankGroup, link: Link, shapes: Sequence[Shape], rounds: int) -> dict[str, Any]:
    """Predicted and measured figures of each shape; collective."""
    found = {}
    for shape in shapes:
        size = shape.tokens // ranks.size
        shards = Shards((size,) * ranks.size)
        request = AttentionRequest(
            1, shape.heads, shape.tokens, shape.tokens, shape.dim, "float32", shape.kv_heads, shape.dim,
            is_causal=shape.is_causal,
        )  # fmt: skip
        expected = predicted(request, shards, shards, 4, link)
        times = _times(ranks, shape, size, rounds)
        ratios = interval([ring / ulysses for ulysses, ring in zip(*times.values(), strict=True)])
        found[shape.name] = {
            "predicted_ms": {name: round(getattr(expected, name) * 1e3, 3) for name in STRATEGIES},
            "measured_ms": {name: round(statistics.median(of) * 1e3, 3) for name, of in times.items()},
            "ring_over_ulysses": {"predicted": round(expected.ring / expected.ulysses, 3), "measured": ratios},
            "auto": "ring" if expected.ring < expected.ulysses else "ulysses",
            "faster": "ring" if ratios["median"] < 1 else "ulysses",
        }
    return found


def _times(ranks: RankGroup, shape: Shape, size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of the slowest process in each round, by strategy."""
    of = torch.Generator().manual_seed(ranks.rank)
    query = torch.randn(1, shape.heads, size, shape.dim, generator=of)
    key, value = (torch.randn(1, shape.kv_heads, size, shape.dim, generator=of) for _ in range(2))
    draw, found = random.Random(0), {name: list[float]() for name in STRATEGIES}
    for at in range(rounds + 1):
        for name in draw.sample(STRATEGIES, 2):  # the same order on every process
            ranks.numbers([0])
            start = time.perf_counter()
            attention(
                query, key, value, is_causal=shape.is_causal, enable_gqa=shape.heads != shape.kv_heads,
                group=ranks.group, parallel=name,
            )  # fmt: skip
            took = time.perf_counter() - start
            slowest = max(row[0] for row in ranks.numbers([int(took * 1e9)])) / 1e9
            if at:  # the first one is planned
                found[name].append(slowest)
    return found


def link_row(link: Link, seconds: float) -> dict[str, Any]:
    def points(of: Any) -> dict[str, Any]:
        return {
            "ms_by_bytes": {int(size): round(took * 1e3, 4) for size, took in of.measured},
            "gb_per_second": round(of.bytes_per_second / 1e9, 3),
        }

    return {
        "seconds_to_measure": round(seconds, 3), "exchange": points(link.exchange), "to_next": points(link.to_next),
        "attention_gflops": round(link.flops / 1e9, 2), "copies_gb_per_second": round(link.copied_per_second / 1e9, 2),
    }  # fmt: skip


def work(rank: int, size: int, store: str, rounds: int, out: str) -> None:
    """One process of the group; the first writes the figures to `out`."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    with torch.inference_mode():
        ranks = rank_group(distributed.group.WORLD)
        start = time.perf_counter()
        link = ranks.link = measured(ranks, torch.zeros(1))
        seconds = time.perf_counter() - start
        found = {"link": link_row(link, seconds), "calls": rows(ranks, link, SHAPES, rounds)}
    if rank == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Ulysses against ring over processes, measured and predicted.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    asked = parser.parse_args()
    before = os.getloadavg()[0]
    with training_paused(), tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "found.json")
        torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
            work, (asked.processes, str(Path(folder) / "store"), asked.rounds, out), nprocs=asked.processes
        )
        found = json.loads(Path(out).read_text(encoding="utf-8"))
    found = {
        "machine": f"{machine()}; {asked.processes} processes over gloo, one torch thread each",
        "load_before": round(before, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "command": f"OMP_NUM_THREADS=1 python benchmarks/group.py --processes {asked.processes} --rounds "
        f"{asked.rounds} --json FILE",
        **found,
    }
    text = json.dumps(found, indent=2)
    print(text)
    if asked.json is not None:
        asked.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
