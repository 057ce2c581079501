"""Ring: every rank computes its own queries; keys and values go around (Ring Attention, arXiv:2310.01889).

The results over the keys of each rank are merged by their log-sum-exp (`kernels/support/merge.py`), in float32,
or float64 for a call in float64. The next block travels while one is computed. Replicated queries are computed by each
rank over its own keys only, and merged in the order of the ranks, so that they are the same to the bit on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from ..kernels.support.merge import merge
from ..values.masks import mask_kind
from ..values.request import AttentionCall, AttentionRequest, LseCall
from .facts import MaskForm
from .rank_group import RankGroup
from .shards import Piece, Shards, joined, pieces
from .tensors import for_ring, own, taken

if TYPE_CHECKING:
    import torch

Attend = Callable[[LseCall, AttentionRequest], "torch.Tensor | None"]
"""Runs one kernel call and leaves its log-sum-exp in the call; None where a kernel has failed."""


class Ring:
    """One call; `requests` are the kinds of its kernel calls on this rank."""

    def __init__(
        self, ranks: RankGroup, call: AttentionCall, queries: Shards, keys: Shards, form: MaskForm | None
    ) -> None:
        """Collective where masks have each rank's own keys only."""
        self.ranks, self.call, self.queries, self.keys = ranks, call, queries, keys
        self.mask: torch.Tensor | None = None
        if call.attn_mask is not None and form is not None:
            self.mask = for_ring(ranks, call.attn_mask, form, keys)

    def _pieces(self, source: int) -> Iterator[Piece]:
        """The kernel calls over the keys of one rank; of this rank's own with the replicated ones."""
        rank, causal = self.ranks.rank, self.call.is_causal
        mine, replicated = self.queries.spans(rank), self.queries.replicated(rank)
        if source != rank:
            # A block that has come around has no replicated keys before its own.
            block = tuple(span._replace(local=span.local - self.keys.before) for span in self.keys.spans(source))
            yield from pieces(mine, block, causal)
            return
        block = self.keys.spans(rank)
        whole = tuple(sorted((*self.keys.replicated(rank), *block)))
        if rank == 0:
            yield from pieces(tuple(sorted((*mine, *replicated))), whole, causal)
            return
        yield from pieces(mine, whole, causal)
        yield from pieces(replicated, block, causal)

    @cached_property
    def steps(self) -> list[list[Piece]]:
        """The kernel calls by the rank whose keys they are over, own keys first."""
        size, rank = self.ranks.size, self.ranks.rank
        return [
            [
                piece._replace(rows=joined(piece.rows), keys=joined(piece.keys), places=joined(piece.places))
                for piece in self._pieces((rank - step) % size)
            ]
            for step in range(size)
        ]

    @property
    def requests(self) -> list[AttentionRequest]:
        return list(dict.fromkeys(self._request(piece) for step in self.steps for piece in step))

    def _mask(self, piece: Piece) -> torch.Tensor | None:
        mask = self.mask
        if mask is None:
            return None
        if mask.shape[2] != 1:
            mask = taken(mask, piece.rows, 2)
        return mask if mask.shape[3] == 1 else taken(mask, piece.places, 3)

    def _request(self, piece: Piece) -> AttentionRequest:
        call, mask = self.call, self._mask(piece)
        return AttentionRequest(
            len(call.query), call.query.shape[1], piece.q_len, piece.kv_len, call.query.shape[3],
            str(call.query.dtype).removeprefix("torch."), call.key.shape[1], call.value.shape[3],
            mask="none" if mask is None else mask_kind(mask), is_causal=piece.is_causal, scale=call.scale, lse=True,
        )  # fmt: skip

    def run(self, attend: Attend) -> tuple[torch.Tensor, torch.Tensor]:
        """Collective: this rank's output, in the query's dtype, and its log-sum-exp."""
        import torch

        ranks, call, keys = self.ranks, self.call, self.keys
        wide = torch.float64 if call.query.dtype == torch.float64 else torch.float32
        output = call.query.new_zeros((*call.query.shape[:3], call.value.shape[3]), dtype=wide)
        lse = output.new_full(output.shape[:3], float("-inf"))
        key, value = call.key, call.value
        block = [own(tensor, keys, ranks.rank) for tensor in (key, value)]
        after, before = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
        for step, of_step in enumerate(self.steps):
            arriving = None
            if step + 1 < ranks.size:
                coming = keys.lengths[(ranks.rank - step - 1) % ranks.size]
                shapes = [(*key.shape[:2], coming, tensor.shape[3]) for tensor in (key, value)]
                nothing = [tensor[:0] for tensor in block]
                arriving = ranks.begin_exchange(
                    [block if rank == after else nothing for rank in range(ranks.size)],
                    [shapes if rank == before else [(0,), (0,)] for rank in range(ranks.size)],
                )
            for piece in of_step:
                self._compute(piece, (key, value), output, lse, attend)
            if arriving is not None:
                key, value = block = arriving()[before]
        self._merge_replicated(output, lse)
        return output.to(call.query.dtype), lse.float()

    def _compute(
        self, piece: Piece, block: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor, lse: torch.Tensor,
        attend: Attend,
    ) -> None:  # fmt: skip
        """Compute one piece, and merge it into its rows of `output` and `lse`."""
        call = self.call
        key, value = (taken(tensor, piece.keys, 2) for tensor in block)
        part_call = LseCall(
            taken(call.query, piece.rows, 2), key, value, self._mask(piece), piece.is_causal, call.scale,
            call.query.shape[1] != key.shape[1],
        )  # fmt: skip
        part = attend(part_call, self._request(piece))
        if part is None:
            return
        before = taken(output, piece.rows, 2), taken(lse, piece.rows, 2)
        made, sums = merge([before, (part, part_call.lse)])
        start = 0
        for rows in piece.rows:
            count = rows.stop - rows.start
            output[:, :, rows], lse[:, :, rows] = made[:, :, start : start + count], sums[:, :, start : start + count]
            start += count

    def _merge_replicated(self, output: torch.Tensor, lse: torch.Tensor) -> None:
        """Collective: merge what each rank computed of the replicated queries, in place."""
        spans = self.queries.replicated(self.ranks.rank)
        if not spans:
            return
        rows = [slice(span.local, span.local + span.length) for span in spans]
        mine = [taken(output, rows, 2), taken(lse, rows, 2).to(output.dtype)]
        found = self.ranks.exchange([mine] * self.ranks.size, [[tuple(one.shape) for one in mine]] * self.ranks.size)
        made, sums = merge([(of[0], of[1]) for of in found])
        start = 0
        for part in rows:
            count = part.stop - part.start
            output[:, :, part], lse[:, :, part] = made[:, :, start : start + count], sums[:, :, start : start + count]
            start += count
