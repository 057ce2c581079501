"""Paired timing: two ways of doing the same thing, alternated, with a 95 % interval of their ratio."""

from __future__ import annotations

import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def interval(values: list[float], digits: int = 3) -> dict[str, float]:
    """Median and its 95 % bootstrap interval."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(500))
    figures = {"median": statistics.median(values), "low": medians[12], "high": medians[487]}
    return {name: round(value, digits) for name, value in figures.items()}


def ratios(stock: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Time of `stock` divided by that of `ours`, pair by pair, order drawn anew in each round; above 1 is faster.

    Both run twice before anything counts.
    """
    rng, times = random.Random(0), {"stock": [], "ours": []}
    kinds = {"stock": stock, "ours": ours}
    for function in (stock, ours) * 2:
        function()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in rng.sample(["stock", "ours"], 2):
                start = time.perf_counter()
                kinds[name]()
                times[name].append((time.perf_counter() - start) * 1e3)
    finally:
        gc.enable()
    return {
        "stock_ms": round(statistics.median(times["stock"]), 3),
        "ours_ms": round(statistics.median(times["ours"]), 3),
        "faster": interval([a / b for a, b in zip(times["stock"], times["ours"], strict=True)]),
    }


def machine() -> str:
    """The processor's name and the number of cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {os.cpu_count()} cores"
