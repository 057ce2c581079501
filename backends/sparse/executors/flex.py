"""Computes a block map with PyTorch's FlexAttention, compiled once for each kind of call and never run uncompiled.

FlexAttention wants blocks of one size. Each block of the map is filled up to whole blocks of 64 or 128 tokens, and a
mask hides what was filled in; where nothing is filled in, no mask runs at all. Tokens that the map has in another order
are brought into it: copies of query, key and value, and one of the output (`Flex.workspace_bytes`).

On a CPU `gather` is faster: at a quarter kept 2.7 to 3.2 times as fast as dense attention, this 2.1 to 2.3 times (fp32,
4096 tokens, one thread); on cards neither was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from ...kernels.flex_attn import FlexAttn, Variants, check_cpu
from ...kernels.support.flex_blocks import block_mask
from ...kernels.support.layout import indexable, on_device_of
from ...kernels.support.workspace import item_bytes, key_size, output_size, query_size, value_size
from ...values.platform import Platform
from ...values.request import AttentionCall, AttentionRequest
from ..block_map import BlockMap, on_device
from ..blocks import Blocks
from ..executor import Executor, Run

if TYPE_CHECKING:
    import torch

    from ...kernels.flex_attn import Arguments

SIZES = (128, 64)
"""Sizes of FlexAttention's blocks; the first one unless the other fills in a tenth less."""

MOST_FILLED = 2.0
"""Most tokens after blocks are filled up, as a multiple of those that the map has, unless this one is named."""

FLEX_ATTN = FlexAttn()
"""The dense backend of the same kernel, which knows where it runs."""


class Filled(NamedTuple):
    """One side of a map in whole blocks of `size` places."""

    size: int
    length: int
    """Places, a multiple of `size`."""
    tokens: torch.Tensor | None
    """(length,): the token at each place; a place without one has the last token of its block. None: in order."""
    places: torch.Tensor | None
    """(tokens,): the place of each token; None: in order."""
    live: torch.Tensor | None
    """(length,), bool: places with a token; None: all."""
    parts: torch.Tensor | None
    """How many of these blocks each block of the map is; None: one."""
    full: torch.Tensor | None
    """(length / size,), bool: blocks whose places all have a token; None: all."""


def size_of(blocks: Blocks) -> int:
    """The size of FlexAttention's blocks that fills in least."""
    coarse, fine = (sum(-(-tokens // size) * size for tokens in blocks.sizes) for size in SIZES)
    return SIZES[1] if fine < 0.9 * coarse else SIZES[0]


@lru_cache(maxsize=64)
def filled_length(blocks: Blocks, size: int | None = None) -> int:
    size = size or size_of(blocks)
    return sum(-(-tokens // size) * size for tokens in blocks.sizes)


@lru_cache(maxsize=64)
def fill(blocks: Blocks, device: torch.device, size: int | None = None) -> Filled:
    """Blocks filled up to whole ones of `size`, or of the size that fills in least; on `device`."""
    import torch

    size, length = size or size_of(blocks), filled_length(blocks, size)
    in_order = blocks.index is None and all(tokens % size == 0 for tokens in blocks.sizes[:-1])
    with torch.inference_mode(False):  # kept for calls outside of inference mode too
        sizes = torch.tensor(blocks.sizes, device="cpu")
        parts = -(-sizes // size)
        of_place = torch.repeat_interleave(torch.arange(blocks.count, device="cpu"), parts * size)
        within = torch.arange(length, device="cpu") - ((parts.cumsum(0) - parts) * size)[of_place]
        live = within < sizes[of_place]
        # The last token of the same block: what a query does not see must not reach it, not even as NaN.
        at = (sizes.cumsum(0) - sizes)[of_place] + torch.minimum(within, sizes[of_place] - 1)
        index = at if blocks.index is None else blocks.index[at]
        places = torch.empty(blocks.tokens, dtype=torch.int64, device="cpu")
        places[index[live]] = live.nonzero().view(-1)
        found = [
            None if in_order else index,
            None if in_order else places,
            None if length == blocks.tokens else live,
            None if int(parts.max()) == 1 else parts,
            None if length == blocks.tokens else live.view(-1, size).all(1),
        ]
        return Filled(size, length, *(None if one is None else one.to(device) for one in found))


def arguments(call: AttentionCall, block_map: BlockMap) -> Arguments:
    """The arguments of `flex_attn.attend` for a call, with tokens in the order of the map and blocks filled up."""
    from torch.nn.attention.flex_attention import noop_mask

    device = call.query.device
    queries, keys = fill(block_map.queries, device), fill(block_map.keys, device)
    query, key, value = placed(call.query, queries), placed(call.key, keys), placed(call.value, keys)
    seen = filled_map(block_map, queries, keys, device)
    every, mask_mod = seen, noop_mask
    if keys.full is not None and keys.live is not None:
        every, mask_mod = seen & keys.full, _hides(keys.live)
    blocks = block_mask(
        seen, every, mask_mod, queries.length, keys.length, size=(queries.size, keys.size), backward=False
    )
    return query, key, value, None, blocks, call.scale


def filled_map(block_map: BlockMap, queries: Filled, keys: Filled, device: torch.device) -> torch.Tensor:
    """`BlockMap.seen` of the blocks that were filled up; on `device`."""
    seen = on_device(block_map.seen, device)
    for axis, side in ((2, queries), (3, keys)):
        if side.parts is not None:
            seen = seen.repeat_interleave(side.parts, axis, output_size=side.length // side.size)
    return seen


def placed(tensor: torch.Tensor, side: Filled) -> torch.Tensor:
    """(batch, heads, tokens, size) with a token at each place."""
    from torch.nn.functional import pad

    if side.tokens is not None:
        return tensor.index_select(2, side.tokens)
    missing = side.length - tensor.shape[2]
    return pad(tensor, (0, 0, 0, missing)) if missing else indexable(tensor)


def _hides(live: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A mask_mod that hides keys without a token."""

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return live[k]

    return mask_mod


def result(output: torch.Tensor, queries: Filled, tokens: int) -> torch.Tensor:
    """The output of the call's tokens, in their own order, from that of all places."""
    if queries.places is not None:
        return output.index_select(2, queries.places)
    return output[:, :, :tokens]


class Flex(Executor):
    """FlexAttention over lists of blocks."""

    id = "flex"

    def unavailable_reasons(self, platform: Platform) -> Sequence[str]:
        return FLEX_ATTN.unavailable_reasons(platform)

    def unsupported_reasons(self, request: AttentionRequest, platform: Platform) -> Sequence[str]:
        return FLEX_ATTN.limits_on(platform).reasons(request)

    def avoid_reasons(self, request: AttentionRequest, platform: Platform) -> Sequence[str]:
        return ("on a CPU gather is faster",) if platform.kind == "cpu" else ()

    def call_reasons(self, call: AttentionCall, block_map: BlockMap) -> Sequence[str]:
        import torch

        if torch.is_grad_enabled() and any(one.requires_grad for one in (call.query, call.key, call.value)):
            return ("gradients are asked for",)
        return ()

    def avoid_map_reasons(self, block_map: BlockMap) -> Sequence[str]:
        for side in (block_map.queries, block_map.keys):
            if filled_length(side) > MOST_FILLED * side.tokens:
                return (f"blocks of {side.tokens} tokens would be filled up to {filled_length(side)}",)
        return ()

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Copies of query, key and value, and two of the output, filled up, and the lists of blocks of 64."""
        copies = query_size(request) + key_size(request) + value_size(request) + 2 * output_size(request)
        blocks = -(-request.q_len // SIZES[1]) * -(-request.kv_len // SIZES[1])
        return round(copies * item_bytes(request) * MOST_FILLED) + 26 * blocks * request.batch * request.num_heads

    def load(self, platform: Platform) -> Run:
        check_cpu(platform)
        variants = _variants()

        def run(call: AttentionCall, block_map: BlockMap) -> torch.Tensor:
            with on_device_of(call.query):
                given = arguments(call, block_map)
                queries = fill(block_map.queries, call.query.device)
                return result(variants.of(given)(*given), queries, block_map.queries.tokens)

        return run


@lru_cache(maxsize=1)
def _variants() -> Variants:
    """What is compiled, for all methods and options."""
    return Variants()
