"""Which attention calls count as the same for a measured choice: their facts, with lengths in buckets.

The key of what was measured (`observe/autotune/store.py`) and of what a run recorded (`observe/replay/record.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from ..values.request import AttentionRequest


class TuningKey(NamedTuple):
    """Facts of a call that its time depends on. Lengths are the upper ends of their buckets, see `bucket`."""

    role: str
    dtype: str
    batch: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    mask: str
    is_causal: bool
    exact_only: bool


def bucket(length: int) -> int:
    """The upper end of a length's bucket: the next of 4, 5, 6, 7, 8, 10, 12, 14, 16, 20 and so on; 1 to 3 as they are.

    Each is at most a quarter above the one before, so that the calls of one bucket differ little in time.
    """
    step = 1 << max(0, (length - 1).bit_length() - 3)
    return -(-length // step) * step


def key_of(role: str, request: AttentionRequest) -> TuningKey:
    """The key of a call of this role; defaults of the request are written out."""
    return TuningKey(
        role,
        request.dtype,
        request.batch,
        request.num_heads,
        request.num_kv_heads or request.num_heads,
        bucket(request.q_len),
        bucket(request.kv_len),
        request.head_dim,
        request.v_head_dim or request.head_dim,
        request.mask,
        request.is_causal,
        request.exact_only,
    )
