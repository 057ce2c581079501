"""Puts the tokens of all ranks in order, and takes a rank's tokens out; moves masks between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .facts import MaskForm
from .rank_group import RankGroup
from .shards import HeadShare, Shards

if TYPE_CHECKING:
    import torch


def own(tensor: torch.Tensor, shards: Shards, rank: int, dim: int = 2) -> torch.Tensor:
    """The tokens that only this rank has."""
    return tensor.narrow(dim, shards.before, shards.lengths[rank])


def in_order(parts: Sequence[torch.Tensor], mine: torch.Tensor, shards: Shards, dim: int = 2) -> torch.Tensor:
    """The whole sequence along `dim`.

    Args:
        parts: of each rank the tokens that only it has.
        mine: this rank's tensor, with replicated tokens at its ends.
    """
    import torch

    pieces = [mine.narrow(dim, 0, shards.before)] if shards.before else []
    pieces += [parts[rank].narrow(dim, span.local - shards.before, span.length) for rank, span in shards.in_order()]
    if shards.after:
        pieces.append(mine.narrow(dim, mine.shape[dim] - shards.after, shards.after))
    if not pieces:
        return mine.narrow(dim, 0, 0)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def of_rank(whole: torch.Tensor, shards: Shards, rank: int, dim: int = 2) -> torch.Tensor:
    """The tokens of a whole sequence that only `rank` has, in its order."""
    return taken(whole, tuple(slice(span.place, span.place + span.length) for span in shards.spans(rank)), dim)


def taken(tensor: torch.Tensor, parts: Sequence[slice], dim: int) -> torch.Tensor:
    """Some slices along `dim`, together; one slice is a view."""
    import torch

    if not parts:
        return tensor.narrow(dim, 0, 0)
    views = [tensor.narrow(dim, part.start, part.stop - part.start) for part in parts]
    return views[0] if len(views) == 1 else torch.cat(views, dim)


def _of_heads(mask: torch.Tensor, share: HeadShare | None) -> torch.Tensor:
    return mask if share is None or mask.shape[1] == 1 else mask.narrow(1, share.first, share.heads)


def with_all_keys(
    ranks: RankGroup, mask: torch.Tensor, form: MaskForm, keys: Shards, shares: Sequence[HeadShare] | None = None
) -> torch.Tensor:
    """The mask with the keys of all ranks as columns, from masks of each rank's own keys.

    `shares`: each rank gets its heads only.
    """
    mask = mask.expand(form.batch, form.heads, 1, -1)
    mine = own(mask, keys, ranks.rank, 3)
    sends = [[_of_heads(mine, None if shares is None else shares[rank])] for rank in range(ranks.size)]
    rows = _of_heads(mask, None if shares is None else shares[ranks.rank])
    found = ranks.exchange(sends, [[(*rows.shape[:3], length)] for length in keys.lengths])
    return in_order([tensors[0] for tensors in found], rows, keys, 3)


def with_all_rows(
    ranks: RankGroup, mask: torch.Tensor, form: MaskForm, queries: Shards, q_len: int, shares: Sequence[HeadShare]
) -> torch.Tensor:
    """The mask of this rank's heads with the rows of all ranks, from masks of each rank's own rows."""
    mask = mask.expand(form.batch, form.heads, q_len, form.columns)
    mine = own(mask, queries, ranks.rank)
    rows = _of_heads(mask, shares[ranks.rank])
    found = ranks.exchange(
        [[_of_heads(mine, share)] for share in shares],
        [[(*rows.shape[:2], length, form.columns)] for length in queries.lengths],
    )
    return in_order([tensors[0] for tensors in found], rows, queries)


def for_ulysses(
    ranks: RankGroup, mask: torch.Tensor, form: MaskForm, queries: Shards, keys: Shards, q_len: int,
    shares: Sequence[HeadShare],
) -> torch.Tensor:  # fmt: skip
    """The whole mask of this rank's heads."""
    if form.of_own_keys:
        return with_all_keys(ranks, mask, form, keys, shares)
    if form.of_own_rows:
        return with_all_rows(ranks, mask, form, queries, q_len, shares)
    return _of_heads(mask, shares[ranks.rank])


def for_ring(ranks: RankGroup, mask: torch.Tensor, form: MaskForm, keys: Shards) -> torch.Tensor:
    """The mask of this rank's rows, with the keys of all ranks."""
    return with_all_keys(ranks, mask, form, keys) if form.of_own_keys else mask
