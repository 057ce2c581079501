"""How far a kernel may be off, by its arithmetic: the one table for tests, probes, the guard, autotune and benchmarks.

A kernel declares its arithmetic (`Backend.arithmetic`), and whether it skips work (`Backend.sparse`). The id of a
backend does not matter: an FP4 error is judged the same under any id. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

ACCURACY = ("exact", "quantized", "sparse")
"""`exact`: differs from SDPA by rounding only. `quantized`: INT8, FP8, FP4 arithmetic. `sparse`: skips work."""

WHOLE_CALL = 0.75
"""All heads together may be off by this share of what the worst one may: they differ less from call to call. The worst
of 100 calls of random numbers with outlier channels: INT8 scores 0.049, FP8 values and weights on top 0.055, both
against 0.075 (benchmarks/results/guard-sight-cpu.json)."""


class Tolerance(NamedTuple):
    """The errors up to which an output is good, relative to attention from the definition."""

    relative_l2: float
    """Of each head of a call: the error's size over the size of the result."""
    row_error: float
    """Of one query row: its error over the typical size of a row of its head. An empty row has 1."""

    @property
    def call_l2(self) -> float:
        """Of all heads of a call together."""
        return WHOLE_CALL * self.relative_l2


TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        "fp32": Tolerance(0.05, 0.2),
        "half": Tolerance(0.05, 0.2),
        "int8": Tolerance(0.1, 0.4),
        "fp8": Tolerance(0.1, 0.4),
        "fp4": Tolerance(0.4, 0.9),
    }
)
"""By arithmetic, exact ones first.

`fp32`: never less than float32, whatever the inputs. `half`: the inputs' own type, with sums in float32, as every fused
kernel computes. `int8`: INT8 scores, values in a half type or INT8. `fp8`: FP8 values and weights, scores INT8 or FP8.
`fp4`: FP4 scores, values and weights.

The numbers: a few times what such arithmetic errs by, emulated in PyTorch, and under what a broken kernel does. Worst
head and worst row of 480 calls of the embedded model (benchmarks/results/guard-budget-cpu.json): every step in bfloat16
0.018 and 0.059, INT8 scores 0.031 and 0.12, FP8 values and weights on top 0.060 and 0.23. FP4 on normal random numbers,
12 calls of different sizes in bfloat16: heads 0.18 to 0.21, rows up to 0.72, the probe's own calls 0.20; twice the
error of a head, and a row less than an empty one. On the embedded model FP4 makes 1.3, and its pictures show it: over
the limit, as it should be. What an error means for a picture is in docs/guard.md.
"""

SPARSE = Tolerance(0.3, 1.2)
"""The least that a kernel which skips work is allowed: set by pictures alone (docs/guard.md). On random numbers, where
everything that is skipped matters, none of it can be judged."""

EARNED: Mapping[str, float] = MappingProxyType({"fp32": 3.0, "half": 3.0, "int8": 2.0, "fp8": 2.0, "fp4": 2.0})
"""Where the same arithmetic can be done beside a kernel, step by step on the very tensors of its call: how many times
that error the kernel may make. Order of sums and rounding between steps differ; FlashAttention's own tests allow 2."""

EXACT = ("fp32", "half")
"""What differs from attention by rounding only."""


def tolerance(arithmetic: str, *, sparse: bool = False) -> Tolerance:
    """The limits of one kind of kernel; of a sparse one the larger of two: its arithmetic's, and those of skipping."""
    found = TOLERANCES[arithmetic]
    return Tolerance(*map(max, found, SPARSE)) if sparse else found


def accuracy(arithmetic: str, *, sparse: bool = False) -> str:
    """The accuracy class that a person allows (`ACCURACY`)."""
    if sparse:
        return "sparse"
    return "exact" if arithmetic in EXACT else "quantized"
