"""Computes a block map with the package fastvideo-kernel: its ThunderKittens kernel on Hopper, else its Triton kernel.

Blocks of the map are filled up to whole ones of 64 tokens, and the kernel gets the number that counts in each. Tokens
are brought into the order of the map: copies of query, key and value, and two of the output; keys of grouped heads are
copied for each query head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...kernels.backend import Backend, Limits
from ...kernels.support.layout import Elements, on_device_of
from ...kernels.support.workspace import item_bytes, output_size, query_size
from ...values.limits import NO_MASK, Dtypes, HeadDimIn, Scale
from ...values.package import Package, Symbols
from ...values.platform import Platform
from ...values.request import AttentionCall, AttentionRequest
from ..block_map import BlockMap
from ..blocks import Blocks
from ..executor import PackageExecutor, Run
from .flex import fill, filled_length, filled_map, placed, result

if TYPE_CHECKING:
    import torch

BLOCK = 64
"""Tokens in a block of the kernel."""

MOST_FILLED = 4
"""Most tokens after blocks are filled up, as a multiple of those that a side of the map has."""


class Declared(Backend):
    """Limits as in fastvideo_kernel/block_sparse_attn.py, 0.3.0 to 0.3.5; 0.3.0 first exports the function.

    The Triton kernel rounds weights to bfloat16 and takes no other dtype. The scale is head_dim ** -0.5. The kernel is
    chosen by the computer's first card (`torch.cuda.get_device_capability(0)`), so a card of another generation is
    refused. Importing the package fails without a card.
    """

    id = "fastvideo"
    summary = "FastVideo's block-sparse attention."
    kinds = ("cuda",)
    min_capability = (8, 0)
    requires = ("fastvideo-kernel>=0.3",)
    packages = (
        Package(
            "fastvideo-kernel",
            "fastvideo_kernel",
            "0.3.5",
            "https://github.com/hao-ai-lab/FastVideo/tree/main/fastvideo-kernel",
            note="its wheels pin torch",
            systems=("linux",),
            needs_triton=True,
        ),
    )
    symbols = (Symbols("fastvideo_kernel", ("block_sparse_attn",)),)
    limits = Limits(Dtypes(("bfloat16",)), HeadDimIn((64, 128)), NO_MASK, Scale(taken=False), Elements())


def first_card_differs(device: torch.device) -> bool:
    """Whether the kernel would be chosen for another generation than that of `device`."""
    import torch

    capability = torch.cuda.get_device_capability
    return device.type == "cuda" and bool(device.index) and capability(0) != capability(device)


def fills_in_much(blocks: Blocks, size: int) -> Sequence[str]:
    """Why blocks are not filled up to whole ones of `size`."""
    length = filled_length(blocks, size)
    if length > MOST_FILLED * blocks.tokens:
        return (f"blocks of {blocks.tokens} tokens would be filled up to {length}",)
    return ()


class FastVideo(PackageExecutor):
    """fastvideo_kernel.block_sparse_attn."""

    id = "fastvideo"
    declared = Declared()

    def call_reasons(self, call: AttentionCall, block_map: BlockMap) -> Sequence[str]:
        queries, keys = (filled_length(side, BLOCK) for side in (block_map.queries, block_map.keys))
        if much := fills_in_much(block_map.queries, BLOCK) or fills_in_much(block_map.keys, BLOCK):
            return much
        if queries != keys:
            return (f"{queries} places of queries and {keys} of keys; the kernel for Hopper takes equally many",)
        if first_card_differs(call.query.device):
            return ("the package chooses its kernel by the first card, which is of another generation",)
        return super().call_reasons(call, block_map)

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Copies of query, key and value, and two of the output, filled up, and the lists of blocks."""
        keys = 2 * request.batch * request.num_heads * request.kv_len * request.head_dim
        copies = query_size(request) + keys + 2 * output_size(request)
        blocks = -(-request.q_len // BLOCK) * -(-request.kv_len // BLOCK)
        return round(copies * item_bytes(request) * MOST_FILLED) + 10 * blocks * request.batch * request.num_heads

    def load(self, platform: Platform) -> Run:
        from fastvideo_kernel import block_sparse_attn

        def run(call: AttentionCall, block_map: BlockMap) -> torch.Tensor:
            device, (batch, num_heads) = call.query.device, call.query.shape[:2]
            with on_device_of(call.query):
                queries, keys = fill(block_map.queries, device, BLOCK), fill(block_map.keys, device, BLOCK)
                shares = num_heads // call.key.shape[1]
                key, value = (
                    placed(tensor if shares == 1 else tensor.repeat_interleave(shares, 1), keys)
                    for tensor in (call.key, call.value)
                )
                seen = filled_map(block_map, queries, keys, device).expand(batch, num_heads, -1, -1)
                output, _ = block_sparse_attn(
                    placed(call.query, queries), key, value, seen.contiguous(), live_sizes(block_map, device)
                )
                return result(output, queries, block_map.queries.tokens)

        return run


def live_sizes(block_map: BlockMap, device: torch.device) -> torch.Tensor:
    """How many tokens each block of keys has once it is filled up, int32."""
    import torch

    keys = fill(block_map.keys, device, BLOCK)
    if keys.live is None:
        return torch.full((keys.length // BLOCK,), BLOCK, dtype=torch.int32, device=device)
    return keys.live.view(-1, BLOCK).sum(1, dtype=torch.int32)
