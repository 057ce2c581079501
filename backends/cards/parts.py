"""Which heads each device computes: arithmetic without torch, and the slices of a call.

Key heads are divided, each with all query heads that share it; a group is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..values.request import AttentionCall, AttentionRequest

if TYPE_CHECKING:
    import torch


class Part(NamedTuple):
    """The heads of one device: half-open ranges."""

    heads: slice
    kv_heads: slice

    @property
    def num_heads(self) -> int:
        return int(self.heads.stop - self.heads.start)


def groups_of(request: AttentionRequest) -> int:
    """How many parts a call can have: its key heads."""
    return request.num_kv_heads or request.num_heads


def parts_of(counts: Sequence[int], request: AttentionRequest) -> list[Part | None]:
    """Consecutive heads for each device; None for a device without any.

    Args:
        counts: groups for each device, the home device first; their sum is `groups_of(request)`.
    """
    size, first, parts = request.num_heads // groups_of(request), 0, list[Part | None]()
    for count in counts:
        end = first + count
        parts.append(Part(slice(first * size, end * size), slice(first, end)) if count else None)
        first = end
    return parts


def request_of(part: Part, request: AttentionRequest) -> AttentionRequest:
    """The request of a part of a call."""
    kv_heads = part.kv_heads.stop - part.kv_heads.start
    return request._replace(num_heads=part.num_heads, num_kv_heads=kv_heads if request.num_kv_heads else 0)


def call_of(part: Part, call: AttentionCall) -> AttentionCall:
    """A part of a call, as views. A mask for each head is sliced, others stay whole.

    What a kernel remembers of the whole mask is not handed on.
    """
    return call.changed(
        query=call.query[:, part.heads], key=call.key[:, part.kv_heads], value=call.value[:, part.kv_heads],
        attn_mask=mask_of(part, call.attn_mask), memo=None, owned=False,
    )  # fmt: skip


def mask_of(part: Part, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask of a part; `mask` is (batch, num_heads, q_len, kv_len), each of them 1 to broadcast."""
    return mask if mask is None or mask.shape[1] == 1 else mask[:, part.heads]
