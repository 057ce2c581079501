"""`sdpa_math`: PyTorch's unfused attention, pinned alone; it builds the whole score matrix."""

from __future__ import annotations

from ..backend import FLOATING, Limits
from ..platform import KINDS
from ..sdpa import PinnedSDPA


class SDPAMath(PinnedSDPA):
    """Slow and hungry for memory (q_len x kv_len per head); half types are computed in float32."""

    id = "sdpa_math"
    summary = (
        "PyTorch's plain matrix form, pinned. Slow and memory-hungry; for finding out whether a fused kernel errs."
    )
    kinds = KINDS
    pin = "MATH"
    limits = Limits(dtypes=FLOATING, causal_cross=True, mixed_head_dims=True)
