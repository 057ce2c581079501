"""Ulysses: every rank computes some heads over all tokens (DeepSpeed-Ulysses, arXiv:2309.14509).

One exchange before the call gives each rank all tokens of its heads, one after it gives back the rank's own tokens of
all heads. Numbers of heads and tokens need not be divisible by the number of ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..values.request import AttentionCall, LseCall
from .facts import MaskForm
from .rank_group import RankGroup
from .shards import HeadShare, Shards, head_shares
from .tensors import for_ulysses, in_order, of_rank, own, taken

if TYPE_CHECKING:
    import torch


class Ulysses:
    """One call: `call` is what this rank computes, None where it has no head or there is no query."""

    def __init__(
        self, ranks: RankGroup, call: AttentionCall, queries: Shards, keys: Shards, form: MaskForm | None, *, lse: bool
    ) -> None:
        """Collective: exchanges query, key, value and mask.

        Args:
            call: this rank's tokens, all heads.
        """
        self.ranks, self.given, self.queries, self.lse = ranks, call, queries, lse
        batch, num_heads, self.q_len, head_dim = call.query.shape
        kv_heads, v_head_dim = call.key.shape[1], call.value.shape[3]
        self.shares: list[HeadShare] = head_shares(num_heads, kv_heads, ranks.size)
        self.share = share = self.shares[ranks.rank]
        query, key, value = (
            own(tensor, of, ranks.rank) for tensor, of in ((call.query, queries), (call.key, keys), (call.value, keys))
        )
        sends = [
            [
                query.narrow(1, to.first, to.heads),
                key.narrow(1, to.kv_first, to.kv_heads),
                value.narrow(1, to.kv_first, to.kv_heads),
            ]
            for to in self.shares
        ]
        shapes = [
            [
                (batch, share.heads, q_len, head_dim),
                (batch, share.kv_heads, kv_len, head_dim),
                (batch, share.kv_heads, kv_len, v_head_dim),
            ]
            for q_len, kv_len in zip(queries.lengths, keys.lengths, strict=True)
        ]
        found = ranks.exchange(sends, shapes)
        query = in_order([of[0] for of in found], call.query.narrow(1, share.first, share.heads), queries)
        key, value = (
            in_order([of[at] for of in found], tensor.narrow(1, share.kv_first, share.kv_heads), keys)
            for at, tensor in ((1, call.key), (2, call.value))
        )
        if share.key_of is not None:
            index = query.new_tensor(share.key_of, dtype=_int64())
            key, value = key.index_select(1, index), value.index_select(1, index)
        mask = None
        if call.attn_mask is not None and form is not None:
            mask = for_ulysses(ranks, call.attn_mask, form, queries, keys, self.q_len, self.shares)
        made = (LseCall if lse else AttentionCall)(
            query, key, value, mask, call.is_causal, call.scale, query.shape[1] != key.shape[1]
        )
        self.call = made if share.heads and queries.total else None

    def empty(self) -> torch.Tensor:
        """The output of a rank that computes nothing."""
        given = self.given
        return given.query.new_zeros((len(given.query), self.share.heads, self.queries.total, given.value.shape[3]))

    def finish(self, output: torch.Tensor, lse: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Collective: this rank's tokens of all heads, from the output of its heads."""
        whole = self._back(output)
        if not self.lse:
            return whole, None
        sums = output.new_zeros(output.shape[:3], dtype=_float32()) if lse is None else lse
        return whole, self._back(sums[..., None])[..., 0]

    def _back(self, output: torch.Tensor) -> torch.Tensor:
        import torch

        ranks, queries = self.ranks, self.queries
        replicated = taken(
            output, [slice(span.place, span.place + span.length) for span in queries.replicated(ranks.rank)], 2
        )
        batch, width = len(output), output.shape[3]
        before, after, mine = queries.before, queries.after, queries.lengths[ranks.rank]
        found = ranks.exchange(
            [[of_rank(output, queries, rank), replicated] for rank in range(ranks.size)],
            [[(batch, of.heads, mine, width), (batch, of.heads, before + after, width)] for of in self.shares],
        )
        heads = torch.cat([of[0] for of in found], 1)
        if not before and not after:
            return heads
        ends = torch.cat([of[1] for of in found], 1)
        return torch.cat([ends[:, :, :before], heads, ends[:, :, before:]], 2)


def _int64() -> torch.dtype:
    import torch

    return torch.int64


def _float32() -> torch.dtype:
    import torch

    return torch.float32
