"""`TuningKey`: facts of a call with lengths in buckets.

The key of autotune's store (`observe/autotune/store.py`) and of recorded runs (`observe/replay/record.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from ..values.request import AttentionRequest


class TuningKey(NamedTuple):
    """Facts of a call that its time depends on; lengths are rounded up by `bucket`."""

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
    """A length rounded up to 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20 and so on.

    From 4 on each is at most a quarter above the one before, so that calls of one bucket take similar times.
    """
    step = 1 << max(0, (length - 1).bit_length() - 3)
    return -(-length // step) * step


def key_of(role: str, request: AttentionRequest) -> TuningKey:
    """The key of a call of this role, with the request's defaults filled in."""
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
