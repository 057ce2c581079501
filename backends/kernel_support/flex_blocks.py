"""FlexAttention's lists of blocks, made from a boolean mask or a causal one.

torch's create_block_mask builds all q_len * kv_len values first. Here a mask is read once where it only repeats (stride
0), and a causal mask is not built at all. No shape depends on a value, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries and keys per block, FlexAttention's own default."""


def masked_blocks(mask: torch.Tensor) -> BlockMask:
    """The blocks of a boolean mask (batch, num_heads, q_len, kv_len); what it only repeats (stride 0) is read once."""
    import torch
    from torch.nn.functional import pad

    q_len, kv_len = mask.shape[2:]
    visible = mask.to(torch.bool)

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return visible[b, h, q, k]

    once = visible[tuple(slice(0, 1 if stride == 0 else None) for stride in visible.stride()[:3])].view(torch.uint8)
    repeats = once.shape[2] == 1
    once = pad(once, (0, -kv_len % BLOCK, 0, 0 if repeats else -q_len % BLOCK))
    batch, heads, _, keys = once.shape
    # Queries first, as bytes: on the CPU a hundred times as fast as `any` along the keys.
    rows = once.reshape(batch, heads, -1, 1 if repeats else BLOCK, keys)
    some, every = (found.view(batch, heads, -1, keys // BLOCK, BLOCK) for found in (rows.amax(3), rows.amin(3)))
    some, every = some.amax(-1) > 0, every.amin(-1) > 0
    if repeats:
        some, every = (tensor.expand(-1, -1, -(-q_len // BLOCK), -1) for tensor in (some, every))
    return block_mask(some, every, mask_mod, q_len, kv_len)


def causal_blocks(q_len: int, kv_len: int, device: torch.device) -> BlockMask:
    """The blocks of a causal mask, aligned to the top left as in SDPA."""
    import torch

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q >= k

    first_q = torch.arange(0, q_len, BLOCK, device=device)[:, None]
    first_k = torch.arange(0, kv_len, BLOCK, device=device)[None, :]
    some = first_k <= (first_q + BLOCK - 1).clamp(max=q_len - 1)
    every = (first_k + BLOCK - 1 <= first_q) & (first_k + BLOCK <= kv_len)
    return block_mask(some[None, None], every[None, None], mask_mod, q_len, kv_len)


def block_mask(
    some: torch.Tensor, every: torch.Tensor, mask_mod: Callable[..., torch.Tensor], q_len: int, kv_len: int
) -> BlockMask:
    """FlexAttention's BlockMask from what blocks (batch or 1, num_heads or 1, query blocks, key blocks) have.

    `some`: a visible key; `every`: nothing hidden. An unfilled last block of queries is never whole, as in torch's
    own create_block_mask, which would build all q_len * kv_len values first.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    if q_len % BLOCK:
        last = torch.arange(every.shape[2], device=every.device) == every.shape[2] - 1
        every = every & ~last[:, None]
    lengths: dict[str, Any] = {"seq_lengths": (q_len, kv_len)} if _takes_lengths() else {}
    made: BlockMask = BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, **lengths
    )
    return made


@cache
def _takes_lengths() -> bool:
    """Whether from_kv_blocks takes the lengths themselves; where it does not, it counts whole blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    return "seq_lengths" in signature(BlockMask.from_kv_blocks).parameters


def _listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks are chosen in each row, and all indices with the chosen ones first."""
    import torch

    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()
