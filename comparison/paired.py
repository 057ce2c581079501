"""Paired timing: ways of doing the same thing, alternated, with a 95 % interval. Standard library only."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def interval(values: list[float], digits: int = 3) -> dict[str, float]:
    """Median and its 95 % bootstrap interval."""
    rng = random.Random(0)  # noqa: S311
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(500))
    figures = {"median": statistics.median(values), "low": medians[12], "high": medians[487]}
    return {name: round(value, digits) for name, value in figures.items()}


def alternated(
    kinds: Mapping[str, Callable[[], Any]], rounds: int, calls: int = 1, wait: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Milliseconds of `calls` calls of each kind in each round, in an order that is drawn anew in each.

    All run twice before anything counts. `wait` is called before and after the calls, for a device.
    """
    rng = random.Random(0)  # noqa: S311
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for function in (*kinds.values(), *kinds.values()):
        function()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in rng.sample(list(kinds), len(kinds)):
                function = kinds[name]
                wait()
                start = time.perf_counter()
                for _ in range(calls):
                    function()
                wait()
                times[name].append((time.perf_counter() - start) * 1e3)
    finally:
        gc.enable()
    return times


def ratios(stock: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Time of `stock` divided by that of `ours`, pair by pair; above 1 is faster."""
    times = alternated({"stock": stock, "ours": ours}, rounds)
    return {
        "stock_ms": round(statistics.median(times["stock"]), 3),
        "ours_ms": round(statistics.median(times["ours"]), 3),
        "faster": interval([a / b for a, b in zip(times["stock"], times["ours"], strict=True)]),
    }
