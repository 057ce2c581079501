"""Measures what a group can do, for `parallel="auto"`: once for each group, on all ranks at the same time."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING

from .rank_group import RankGroup
from .strategy import Link

if TYPE_CHECKING:
    import torch

REPEATS = 3
"""The fastest of so many counts."""


def measured(ranks: RankGroup, like: torch.Tensor) -> Link:
    """The link of a group, the same numbers on every rank; collective.

    Args:
        like: a tensor on the device of the calls, in their dtype.
    """
    import torch

    on_cpu = like.device.type == "cpu"
    count = 1 << (18 if on_cpu else 22)
    sent = like.new_zeros(count)
    heads, tokens, head_dim = (4, 512, 64) if on_cpu else (16, 4096, 128)
    query = like.new_zeros((1, heads, tokens, head_dim))
    exchange = _fastest(lambda: ranks.exchange([[sent]] * ranks.size, [[(count,)]] * ranks.size)[-1][0])
    small = _fastest(lambda: ranks.exchange([[sent[:8]]] * ranks.size, [[(8,)]] * ranks.size)[-1][0])
    attended = _fastest(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query))
    copied = _fastest(sent.clone)
    bytes_sent = count * like.element_size() * (ranks.size - 1)
    mine = [
        int(bytes_sent / max(exchange - small, 1e-9)), int(1e9 * small),
        int(4 * heads * tokens * tokens * head_dim / attended), int(2 * count * like.element_size() / copied),
    ]  # fmt: skip
    of_ranks = list(zip(*ranks.numbers(mine), strict=True))
    speed, latency, flops, copies = of_ranks
    return Link(float(max(min(speed), 1)), max(latency) / 1e9, float(max(min(flops), 1)), float(max(min(copies), 1)))


def _fastest(work: Callable[[], torch.Tensor]) -> float:
    """Seconds, with the device's work; the first run is not counted."""
    best = inf
    for repeat in range(REPEATS + 1):
        start = perf_counter()
        work().flatten()[:1].tolist()  # waits for the device
        if repeat:
            best = min(best, perf_counter() - start)
    return best
