"""Measures what a group can do, for `parallel="auto"`: once for each group, on all ranks at the same time.

It costs eight exchanges of each of three sizes, the same ways that calls take, and a few calls of attention and copies:
each rank sends 38 MB on a CPU and 604 MB on a card. The run's log has the seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING

from ..cards.cost import Points
from .rank_group import RankGroup
from .strategy import Link

if TYPE_CHECKING:
    import torch

log = logging.getLogger("attention_backends")

SIZES_ON_CPU = (1 << 12, 1 << 19, 1 << 22)
SIZES = (1 << 12, 1 << 23, 1 << 26)
"""Bytes that a rank sends in one exchange."""
REPEATS = 3
"""The fastest of so many counts."""


def measured(ranks: RankGroup, like: torch.Tensor) -> Link:
    """The link of a group, the same numbers on every rank; collective.

    Args:
        like: a tensor on the device of the calls, in their dtype.
    """
    import torch

    start = perf_counter()
    on_cpu = like.device.type == "cpu"
    sizes = SIZES_ON_CPU if on_cpu else SIZES
    heads, tokens, head_dim = (4, 512, 64) if on_cpu else (16, 4096, 128)
    query = like.new_zeros((1, heads, tokens, head_dim))
    copied_from = like.new_zeros(sizes[-1] // like.element_size())
    attended = _fastest(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query))
    copied = _fastest(copied_from.clone)
    exchanged = [_fastest(lambda size=size: _exchange(ranks, like, size)) for size in sizes]  # type: ignore[misc]
    passed_on = [_fastest(lambda size=size: _to_next(ranks, like, size)) for size in sizes]  # type: ignore[misc]
    mine = [
        int(4 * heads * tokens * tokens * head_dim / attended), int(2 * copied_from.nbytes / copied),
        *(int(1e9 * seconds) for seconds in (*exchanged, *passed_on)),
    ]  # fmt: skip
    flops, copies, *nanoseconds = zip(*ranks.numbers(mine), strict=True)
    slowest = [max(of) / 1e9 for of in nanoseconds]
    link = Link(
        Points(list(zip(sizes, slowest[: len(sizes)], strict=True))),
        Points(list(zip(sizes, slowest[len(sizes) :], strict=True))),
        float(max(min(flops), 1)),
        float(max(min(copies), 1)),
    )
    log.info(
        "group of %d ranks measured in %.2f s: %.3g GB/s in an exchange, %.3g GB/s to the next rank", ranks.size,
        perf_counter() - start, link.exchange.bytes_per_second / 1e9, link.to_next.bytes_per_second / 1e9,
    )  # fmt: skip
    return link


def _exchange(ranks: RankGroup, like: torch.Tensor, size: int) -> torch.Tensor:
    """Send `size` bytes to the other ranks together, and receive as many."""
    count = max(size // like.element_size() // (ranks.size - 1), 1)
    sent, counts = like.new_zeros(count), [0 if rank == ranks.rank else count for rank in range(ranks.size)]
    return ranks.exchange([[sent[:each]] for each in counts], [[(each,)] for each in counts])[ranks.rank - 1][0]


def _to_next(ranks: RankGroup, like: torch.Tensor, size: int) -> torch.Tensor:
    """Send `size` bytes to the next rank, and receive as many from the one before, as ring does."""
    count = max(size // like.element_size(), 1)
    sent, after, before = like.new_zeros(count), (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
    sends = [[sent if rank == after else sent[:0]] for rank in range(ranks.size)]
    return ranks.exchange(sends, [[(count if rank == before else 0,)] for rank in range(ranks.size)])[before][0]


def _fastest(work: Callable[[], torch.Tensor]) -> float:
    """Seconds, with the device's work; the first run is not counted."""
    best = inf
    for repeat in range(REPEATS + 1):
        start = perf_counter()
        work().flatten()[:1].tolist()  # waits for the device
        if repeat:
            best = min(best, perf_counter() - start)
    return best
