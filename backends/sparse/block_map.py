"""`BlockMap`: which key blocks each query block of each head sees; `HeadMaps` where each head has its own blocks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import TYPE_CHECKING

from ..values.grid import TokenGrid
from .blocks import Blocks, cut, extended, with_others

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dense:
    """A method's answer for a call that is to be computed whole."""

    reason: str


@dataclass(frozen=True, eq=False)
class Tail:
    """What each query sees besides its key blocks, merged into its softmax: the same output for a whole query block."""

    output: torch.Tensor
    """(batch, num_heads, query blocks, v_head_dim), float32."""
    lse: torch.Tensor
    """(batch, num_heads, query blocks), float32, natural logarithm; -inf: nothing."""
    shift: torch.Tensor
    """(batch, num_heads, tokens), float32: what each query adds to its block's `lse`."""


@dataclass(frozen=True, eq=False)
class BlockMap:
    """Which key blocks each query block sees.

    `seen`: bool, (batch or 1, num_heads or 1, query blocks, key blocks). Each row has at least one block.
    `counts`: how many key blocks each query block sees where that is known without reading `seen`, one number for each
    query block, the same in all samples and heads; else None.
    """

    queries: Blocks
    keys: Blocks
    seen: torch.Tensor
    counts: tuple[int, ...] | None = None
    tail: Tail | None = None
    """No part of `share` and `mask`."""

    def share(self) -> torch.Tensor | float:
        """Share of query-key pairs that are computed, over samples and heads; a tensor on the device of `seen`.

        A number where `counts` tell it. Nothing waits for the device.
        """
        import torch

        pairs = self.queries.tokens * self.keys.tokens
        if self.counts is not None and len(set(self.keys.sizes)) == 1:
            rows = zip(self.counts, self.queries.sizes, strict=True)
            return self.keys.sizes[0] * sum(count * size for count, size in rows) / pairs
        samples, heads = self.seen.shape[:2]
        of_queries, of_keys = (
            torch.tensor(side.sizes, dtype=torch.float32, device=self.seen.device) for side in (self.queries, self.keys)
        )
        found = self.seen.sum((0, 1), dtype=torch.float32)  # on Apple GPUs there is no float64
        return (found / (samples * heads) @ of_keys / self.keys.tokens) @ of_queries / self.queries.tokens

    @property
    def pairs(self) -> float:
        """`share` as a number; it may wait for the device."""
        return float(self.share())

    def of_head(self, head: int, sample: int = 0) -> BlockMap:
        """The map of one head of one sample alone."""
        samples, heads = self.seen.shape[:2]
        sample, head = min(sample, samples - 1), min(head, heads - 1)
        return BlockMap(self.queries, self.keys, self.seen[sample : sample + 1, head : head + 1], self.counts)

    def mask(self) -> torch.Tensor:
        """The map as a mask of tokens, bool, (batch or 1, num_heads or 1, q_len, kv_len); for tests and pictures."""
        return self.seen[:, :, block_of_token(self.queries)][..., block_of_token(self.keys)]


@dataclass(frozen=True, eq=False)
class HeadMaps:
    """Which key blocks each query block sees, where the tokens of each head of each sample have another order.

    `maps`: for each sample those of its heads, each of one head. Heads that share a map have the same object.
    """

    maps: tuple[tuple[BlockMap, ...], ...]

    def share(self) -> torch.Tensor | float:
        """As `BlockMap.share`."""
        each = {id(one): one for heads in self.maps for one in heads}
        known = {of: one.share() for of, one in each.items()}
        shares = [known[id(one)] for heads in self.maps for one in heads]
        return sum(shares[1:], shares[0]) / len(shares)

    @property
    def pairs(self) -> float:
        """`share` as a number; it may wait for the device."""
        return float(self.share())

    def of_head(self, head: int, sample: int = 0) -> BlockMap:
        """The map of one head of one sample."""
        heads = self.maps[min(sample, len(self.maps) - 1)]
        return heads[min(head, len(heads) - 1)]

    def mask(self) -> torch.Tensor:
        """As `BlockMap.mask`."""
        import torch

        return torch.cat([torch.cat([one.mask() for one in heads], 1) for heads in self.maps])


Map = BlockMap | HeadMaps


@lru_cache(maxsize=1)
def _derived() -> MutableMapping[torch.Tensor, dict[Hashable, torch.Tensor]]:
    from torch.utils.weak import WeakTensorKeyDictionary

    found: MutableMapping[torch.Tensor, dict[Hashable, torch.Tensor]] = WeakTensorKeyDictionary()
    return found


def derived(kept: torch.Tensor, key: Hashable, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What `make` gives for a tensor that is kept for a grid; made once, and kept as long as the tensor."""
    import torch

    of_tensor = _derived().setdefault(kept, {})
    found = of_tensor.get(key)
    if found is None:
        with torch.inference_mode(False):  # for calls outside of inference mode too
            found = of_tensor[key] = make(kept)
    return found


def on_device(kept: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor that is kept for a grid, on a device."""
    return kept if kept.device == device else derived(kept, device, lambda tensor: tensor.to(device))


def block_of_token(blocks: Blocks) -> torch.Tensor:
    """The number of each token's block, (tokens,), on the CPU."""
    import torch

    numbers = torch.repeat_interleave(
        torch.arange(blocks.count, device="cpu"), torch.tensor(blocks.sizes, device="cpu")
    )
    if blocks.index is None:
        return numbers
    found = torch.empty_like(numbers)
    found[blocks.index.cpu()] = numbers
    return found


def with_other_tokens(on_grid: Map, grid: TokenGrid, kv_after: int, block: int) -> Map:
    """The map of a whole call: tokens beside the grid see everything, and everything sees them.

    Args:
        on_grid: of the tokens on the grid alone.
        kv_after: keys after the grid; queries after it are `grid.after`.
        block: the size of the blocks of the other tokens.
    """
    if isinstance(on_grid, HeadMaps):
        each = {id(one): one for heads in on_grid.maps for one in heads}
        found = {of: _with_others(one, grid, kv_after, block, extended) for of, one in each.items()}
        return HeadMaps(tuple(tuple(found[id(one)] for one in heads) for heads in on_grid.maps))
    return _with_others(on_grid, grid, kv_after, block, with_others)


def _with_others(
    on_grid: BlockMap, grid: TokenGrid, kv_after: int, block: int, extend: Callable[[Blocks, int, int, int], Blocks]
) -> BlockMap:
    """`extend`: `with_others` where the blocks are kept, `extended` where they are those of one call."""
    from torch.nn.functional import pad

    kv_before = grid.before - grid.hidden_before
    queries = extend(on_grid.queries, grid.before, grid.after, block)
    keys = extend(on_grid.keys, kv_before, kv_after, block)
    q_before, q_after, k_before, k_after = (
        len(cut(tokens, block)) for tokens in (grid.before, grid.after, kv_before, kv_after)
    )
    if not (q_before or q_after or k_before or k_after):
        return on_grid
    beside = k_before, k_after, q_before, q_after
    if on_grid.seen.is_cpu:  # it may be kept for its grid
        seen = derived(on_grid.seen, beside, lambda tensor: pad(tensor, beside, value=True))
    else:
        seen = pad(on_grid.seen, beside, value=True)
    counts = on_grid.counts
    if counts is not None:
        counts = (*[keys.count] * q_before, *(count + k_before + k_after for count in counts), *[keys.count] * q_after)
    tail = on_grid.tail
    if tail is not None:
        tail = Tail(
            pad(tail.output, (0, 0, q_before, q_after)), pad(tail.lse, (q_before, q_after), value=-inf),
            pad(tail.shift, (grid.before, grid.after)),
        )  # fmt: skip
    return BlockMap(queries, keys, seen, counts, tail)
