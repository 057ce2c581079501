"""What the ranks exchange before a call: lengths, the form of the mask, and a digest of what must be equal.

Without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from ..engine.call_checks import CheckError
from .shards import Shards

NO_MASK = (-1, -1, -1, -1)
Shape4 = tuple[int, int, int, int]


class Header(NamedTuple):
    """Numbers of one rank about its call."""

    call: int
    """Number of the call in the group."""
    digest: int
    """Of the facts that must be equal on all ranks."""
    q_len: int
    kv_len: int
    mask: Shape4
    """Shape of its mask; `NO_MASK` without one."""
    refused: bool = False
    """The call is invalid there."""
    no_ring: bool = False
    """`auto` may not take ring: the backend that was asked for gives no log-sum-exp."""
    is_new: bool = False
    """It is the first call of a session there: what was agreed on before does not count."""

    def numbers(self) -> list[int]:
        return [self.call, self.digest, self.q_len, self.kv_len, *self.mask, self.refused, self.no_ring, self.is_new]


def header(numbers: Sequence[int]) -> Header:
    """Of what `Header.numbers` gives."""
    call, digest, q_len, kv_len, b, h, q, k, refused, no_ring, is_new = numbers
    return Header(call, digest, q_len, kv_len, (b, h, q, k), bool(refused), bool(no_ring), bool(is_new))


def digest(facts: Mapping[str, object]) -> int:
    """63 bits of a hash of the facts."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") >> 1


def differing_facts(of_ranks: Sequence[Mapping[str, Any]]) -> str:
    """What differs between ranks: `scale: rank 0 has 0.1, rank 1 has 0.2`."""
    lines = []
    for name in sorted(set().union(*of_ranks)):
        values = [facts.get(name) for facts in of_ranks]
        if any(value != values[0] for value in values):
            lines.append(f"{name}: " + ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values)))
    return "; ".join(lines)


class MaskForm(NamedTuple):
    """How the masks of the ranks are parts of one mask (batch or 1, num_heads or 1, q_len or 1, kv_len or 1)."""

    batch: int
    heads: int
    of_own_keys: bool
    """Each mask has the columns of its rank's keys, and one row."""
    of_own_rows: bool
    """Each mask has the rows of its rank's queries; False: one row, the same on every rank."""
    columns: int


def mask_form(headers: Sequence[Header], keys: Shards, batch: int, num_heads: int) -> MaskForm | None:
    """The form of the masks; None without masks.

    Raises:
        CheckError: some rank has a mask and another one none, or a shape does not fit.
    """
    shapes = [one.mask for one in headers]
    if all(shape == NO_MASK for shape in shapes):
        return None
    texts = [f"rank {rank}: {'none' if shape == NO_MASK else shape}" for rank, shape in enumerate(shapes)]
    given = f"attn_mask of {', '.join(texts)}"
    if NO_MASK in shapes:
        raise CheckError(f"{given}; every rank gives one, or none does")
    one_row = all(shape[2] == 1 for shape in shapes)
    own_keys = (
        one_row
        and all(shape[3] == of.kv_len for shape, of in zip(shapes, headers, strict=True))
        and any(shape[3] != keys.total for shape in shapes)
    )
    for rank, (shape, of) in enumerate(zip(shapes, headers, strict=True)):
        fit = zip(shape, ((1, batch), (1, num_heads), (1, of.q_len)), strict=False)
        if any(size not in sizes for size, sizes in fit) or not (own_keys or shape[3] in (1, keys.total)):
            raise CheckError(
                f"{given}; that of rank {rank} must be broadcastable to ({batch}, {num_heads}, {of.q_len}, "
                f"{keys.total}): its own rows, and the keys of all ranks; or have one row and, on every rank, its own "
                f"keys ({of.kv_len})"
            )
    return MaskForm(
        max(shape[0] for shape in shapes),
        max(shape[1] for shape in shapes),
        own_keys,
        not own_keys and (not one_row or any(of.q_len == 1 for of in headers)),
        keys.total if own_keys else max(shape[3] for shape in shapes),
    )
