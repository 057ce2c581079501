"""Error budgets by arithmetic: one table for tests, probes, the guard, autotune and benchmarks.

A kernel declares `Backend.arithmetic` and `Backend.sparse`; its budget follows from these, not from its id.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

ACCURACY = ("exact", "quantized", "sparse")
"""`exact`: differs from SDPA by rounding only. `quantized`: INT8, FP8, FP4 arithmetic. `sparse`: skips work."""

WHOLE_CALL = 0.75
"""Budget of all heads together, as a share of the worst head's: it varies less from call to call. The worst of 100
calls of random numbers with outlier channels: INT8 scores 0.049, FP8 values and weights on top 0.055, both
against 0.075 (benchmarks/results/guard-sight-cpu.json)."""


class Tolerance(NamedTuple):
    """Largest accepted errors of an output, relative to exact attention."""

    relative_l2: float
    """Of each head: ||error|| / ||exact||."""
    row_error: float
    """Of one query row: ||error|| over the root mean square norm of its head's rows. A row of zeros has about 1."""

    @property
    def call_l2(self) -> float:
        """Of all heads together: ||error|| / ||exact||."""
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
"""Minimum budget of sparse kernels, set by pictures (docs/guard.md): on random numbers every skipped key matters."""

EARNED: Mapping[str, float] = MappingProxyType({"fp32": 3.0, "half": 3.0, "int8": 2.0, "fp8": 2.0, "fp4": 2.0})
"""Factor of the error that an emulation of the same arithmetic makes on the same tensors: what a kernel may err by in
tests. Order of sums and rounding differ; FlashAttention's own tests allow 2."""

EXACT = ("fp32", "half")
"""Arithmetic of class `exact`: rounding only."""


def tolerance(arithmetic: str, *, sparse: bool = False) -> Tolerance:
    """The budget of an arithmetic; of a sparse kernel the larger one of it and `SPARSE`."""
    found = TOLERANCES[arithmetic]
    return Tolerance(*map(max, found, SPARSE)) if sparse else found


def accuracy(arithmetic: str, *, sparse: bool = False) -> str:
    """The accuracy class, one of `ACCURACY`."""
    if sparse:
        return "sparse"
    return "exact" if arithmetic in EXACT else "quantized"
