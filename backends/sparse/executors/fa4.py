"""Computes a block map with FlashAttention 4's block sparsity (flash_attn/cute/block_sparsity.py), on Hopper and sm10x.

The kernel takes lists of whole key blocks for each query block. Its key blocks have 128 tokens, on Hopper 64 too;
blocks of keys must consist of whole ones, but for the last, as the kernel hides no key but those after it. Its query
blocks have 128 tokens, on sm10x 256; blocks of queries are filled up to them. Tokens are brought into the order of the
map: copies of query, key and value, and two of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from ...kernels.backend import Backend, Limits
from ...kernels.flash_attn_4 import FlashAttn4
from ...kernels.support.layout import GRID, Elements, on_device_of, to_bshd
from ...kernels.support.workspace import item_bytes, key_size, output_size, query_size, value_size
from ...values.limits import NO_MASK, Batch, HeadDim, HeadDimMultiple
from ...values.package import Symbols
from ...values.platform import Platform
from ...values.request import AttentionCall, AttentionRequest
from ..block_map import BlockMap
from ..blocks import Blocks
from ..executor import PackageExecutor, Run
from .fastvideo import MOST_FILLED, fills_in_much
from .flex import fill, filled_map, placed, result

if TYPE_CHECKING:
    import torch

COARSE, FINE = 128, 64
"""Tokens in the kernel's key blocks; the finer ones on Hopper only."""


class Declared(Backend):
    """Limits as in flash_attn/cute/interface.py, 4.0.0b33 to b36; b33 is the first with key blocks of 64 on Hopper.

    On sm80 to sm89 the kernel takes the lists and reads none of them (FlashAttentionForwardSm80 in flash_fwd.py): the
    call would be computed whole without an error. On sm12x an assertion stops. Heads of more than 128 channels have key
    blocks of other sizes.
    """

    id = "fa4"
    summary = "FlashAttention 4's block sparsity."
    kinds = ("cuda",)
    requires = ("flash-attn-4>=4.0.0b33",)
    packages = FlashAttn4.packages
    symbols = (
        Symbols("flash_attn.cute", ("flash_attn_func",)),
        Symbols("flash_attn.cute.block_sparsity", ("BlockSparseTensorsTorch",)),
    )
    limits = Limits(HeadDim(max=128), HeadDimMultiple(8), NO_MASK, Elements(), Batch(GRID))

    def capabilities(self, platform: Platform) -> tuple[tuple[int, int], ...]:
        return ((9, 0), (10, 0), (10, 3), (11, 0))


def key_block(keys: Blocks) -> int | None:
    """The size of the kernel's blocks of which all blocks of keys but the last consist; None: there is none."""
    return next((size for size in (COARSE, FINE) if all(tokens % size == 0 for tokens in keys.sizes[:-1])), None)


@lru_cache(maxsize=1)
def cards_differ() -> bool:
    """Whether this computer has cards of several generations."""
    import torch

    return len({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}) > 1


class Fa4(PackageExecutor):
    """flash_attn.cute.flash_attn_func with block_sparse_tensors."""

    id = "fa4"
    declared = Declared()
    probed_block = COARSE

    def call_reasons(self, call: AttentionCall, block_map: BlockMap) -> Sequence[str]:
        size = key_block(block_map.keys)
        if size is None or (size == FINE and not is_hopper(call.query.device)):
            least = f"{COARSE} tokens, on Hopper {FINE}"
            return (f"a block of keys that is not the last has no multiple of {least}",)
        if call.query.is_cuda and cards_differ():
            return ("the package chooses its kernel once, and this computer has cards of several generations",)
        queries = query_block(call.query.device)
        return fills_in_much(block_map.queries, queries) or super().call_reasons(call, block_map)

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Copies of query, key and value, and two of the output, filled up, and two lists of blocks."""
        copies = query_size(request) + key_size(request) + value_size(request) + 2 * output_size(request)
        blocks = -(-request.q_len // COARSE) * -(-request.kv_len // FINE)
        lists = 24 * blocks * request.batch * request.num_heads
        return round((copies * item_bytes(request) + lists) * MOST_FILLED)

    def load(self, platform: Platform) -> Run:
        import torch
        from flash_attn.cute import flash_attn_func
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        def run(call: AttentionCall, block_map: BlockMap) -> torch.Tensor:
            device, size = call.query.device, key_block(block_map.keys) or COARSE
            with on_device_of(call.query):
                queries, keys = fill(block_map.queries, device, query_block(device)), fill(block_map.keys, device, size)
                seen = filled_map(block_map, queries, keys, device)
                counts = seen.sum(-1, dtype=torch.int32)
                # In rising order: of keys after the last the kernel hides those in the block that a list ends with.
                order = torch.argsort(seen.logical_not().byte(), dim=-1, stable=True).int()
                lists = BlockSparseTensorsTorch(
                    mask_block_cnt=torch.zeros_like(counts), mask_block_idx=torch.zeros_like(order),
                    full_block_cnt=counts, full_block_idx=order, block_size=(queries.size, size),
                )  # fmt: skip
                key, value = call.key, call.value
                if keys.tokens is not None:  # places without a token are the last ones
                    tokens = keys.tokens[: block_map.keys.tokens]
                    key, value = key.index_select(2, tokens), value.index_select(2, tokens)
                output, _ = flash_attn_func(
                    to_bshd(placed(call.query, queries)), to_bshd(key), to_bshd(value),
                    softmax_scale=call.scale, pack_gqa=False, block_sparse_tensors=lists,
                )  # fmt: skip
                return result(to_bshd(output), queries, block_map.queries.tokens)

        return run


def is_hopper(device: torch.device) -> bool:
    """Whether the kernel for Hopper computes on a device."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def query_block(device: torch.device) -> int:
    """Tokens in the kernel's blocks of queries: two tiles at a time on sm10x."""
    return 128 if is_hopper(device) else 256
