"""FlexAttention's block lists, from a boolean mask or a causal one.

torch's create_block_mask builds all q_len * kv_len values first. Here a mask is read once where it only repeats (stride
0), and a causal mask is not built at all. No shape depends on a value, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

from ...values.masks import stored_once

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries and keys per block, FlexAttention's own default."""

FINE = 1024
"""Lengths up to this are padded to whole blocks."""

STEPS = 8
"""Lengths above it are padded to one of this many lengths between two powers of 2: at most 1/8 more."""


def bucket(length: int) -> int:
    """The padded length: whole blocks, and few different ones, as each is compiled separately."""
    step = BLOCK if length <= FINE else 2 ** (length - 1).bit_length() // (2 * STEPS)
    return max(-(-length // step), 1) * step


def filled(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A mask or bias (batch, num_heads, q_len, kv_len) with zeros up to `rows` and `columns`.

    What it only repeats (stride 0) stays repeated; where nothing is missing it is the tensor itself.
    """
    import torch
    from torch.nn.functional import pad

    if tensor.shape[2:] == (rows, columns):
        return tensor
    once = stored_once(tensor)
    is_bool = once.dtype == torch.bool
    missing = 0 if once.shape[2] == 1 and tensor.stride(2) == 0 else rows - tensor.shape[2]
    once = pad(once.view(torch.uint8) if is_bool else once, (0, columns - tensor.shape[3], 0, missing))
    return (once.view(torch.bool) if is_bool else once).expand(*tensor.shape[:2], rows, columns)


def masked_blocks(mask: torch.Tensor, q_len: int) -> BlockMask:
    """The blocks of a boolean mask (batch, num_heads, rows, keys) of whole blocks, of which `q_len` rows matter.

    What it only repeats (stride 0) is read once.
    """
    rows, keys = mask.shape[2:]

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return mask[b, h, q, k]

    import torch

    once = stored_once(mask).view(torch.uint8)
    repeats = once.shape[2] == 1
    batch, heads = once.shape[:2]
    # Queries first, as bytes: on the CPU a hundred times as fast as `any` along the keys.
    by_rows = once.reshape(batch, heads, -1, 1 if repeats else BLOCK, keys)
    some, every = (found.view(batch, heads, -1, keys // BLOCK, BLOCK) for found in (by_rows.amax(3), by_rows.amin(3)))
    some, every = some.amax(-1) > 0, every.amin(-1) > 0
    if repeats:
        some, every = (tensor.expand(-1, -1, rows // BLOCK, -1) for tensor in (some, every))
    needed = torch.arange(0, rows, BLOCK, device=mask.device)[:, None] < q_len
    return block_mask(some & needed, every & needed, mask_mod, rows, keys)


def seen_keys(kv_len: int, keys: int, device: torch.device) -> torch.Tensor:
    """Which of `keys` are among the first `kv_len`, (keys,). A tensor, as the compiler takes a number as a constant."""
    import torch

    return torch.arange(keys, device=device) < kv_len


def causal_blocks(q_len: int, kv_len: int, device: torch.device) -> BlockMask:
    """The blocks of a causal mask, aligned to the top left as in SDPA, for lengths padded to their buckets."""
    import torch

    rows, keys = bucket(q_len), bucket(kv_len)
    if keys == kv_len:

        def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return q >= k
    else:
        seen = seen_keys(kv_len, keys, device)

        def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return (q >= k) & seen[k]

    first_q = torch.arange(0, rows, BLOCK, device=device)[:, None]
    first_k = torch.arange(0, keys, BLOCK, device=device)[None, :]
    some = (first_k <= (first_q + BLOCK - 1).clamp(max=q_len - 1)) & (first_k < kv_len) & (first_q < q_len)
    every = (first_k + BLOCK - 1 <= first_q) & (first_k + BLOCK <= kv_len) & (first_q < q_len)
    return block_mask(some[None, None], every[None, None], mask_mod, rows, keys)


def block_mask(
    some: torch.Tensor,
    every: torch.Tensor,
    mask_mod: Callable[..., torch.Tensor],
    rows: int,
    keys: int,
    *,
    size: tuple[int, int] = (BLOCK, BLOCK),
    backward: bool = True,
) -> BlockMask:
    """FlexAttention's BlockMask from what blocks (batch or 1, num_heads or 1, query blocks, key blocks) have.

    `some`: a visible key; `every`: nothing hidden; the same tensor where no block is in part hidden. torch's own
    create_block_mask would build all rows * keys values first.

    Args:
        size: queries and keys of a block.
        backward: with the lists that only gradients need, where torch can leave them out.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    takes = _arguments()
    further: dict[str, Any] = {}
    if "seq_lengths" in takes:  # where it is missing, torch counts whole blocks
        further["seq_lengths"] = (rows, keys)
    if "compute_q_blocks" in takes and not backward:
        further["compute_q_blocks"] = False
    count, listed = _listed(every)
    # New tensors: one tensor as both lists cannot be compiled for a CPU (torch 2.13).
    part = (torch.zeros_like(count), torch.zeros_like(listed)) if some is every else _listed(some & ~every)
    made: BlockMask = BlockMask.from_kv_blocks(*part, count, listed, BLOCK_SIZE=size, mask_mod=mask_mod, **further)
    return made


@cache
def _arguments() -> frozenset[str]:
    """What from_kv_blocks takes in this version of torch."""
    from torch.nn.attention.flex_attention import BlockMask

    return frozenset(signature(BlockMask.from_kv_blocks).parameters)


def _listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks are chosen in each row, and all indices with the chosen ones first."""
    import torch

    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()
