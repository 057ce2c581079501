"""Computes a block map with SpargeAttention's block-sparse SageAttention: INT8 products, FP8 or FP16 values.

The kernel's blocks have 128 queries and 64 keys. Blocks of queries are filled up to them; blocks of keys must consist
of whole ones, but for the last, as the kernel hides no key but those after it. Tokens are brought into the order of
the map: copies of query, key and value, and two of the output. Arithmetic is lossy beside what the map leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...kernels.backend import Backend, Limits
from ...kernels.support.layout import Elements, on_device_of
from ...kernels.support.workspace import item_bytes, key_size, output_size, query_size, rounded_bytes, value_size
from ...values.limits import NO_MASK, HeadDimIn
from ...values.package import Package, Symbols
from ...values.platform import Platform
from ...values.request import AttentionCall, AttentionRequest
from ..block_map import BlockMap
from ..executor import PackageExecutor, Run
from .fastvideo import MOST_FILLED, fills_in_much
from .flex import fill, filled_map, placed, result

if TYPE_CHECKING:
    import torch

QUERIES, KEYS = 128, 64
"""Tokens in the kernel's blocks."""


class Declared(Backend):
    """Limits as in spas_sage_attn/core.py, 0.1.0 of December 2025.

    float32 comes back as float16 (`output_dtype` is read by nothing), so it is refused. `smooth_k=False` fails, so the
    default stays. It makes the tensor's card the current one and leaves it so, which is undone here. On Hopper its
    blocks have 64 queries and 128 keys, and no map of these methods has them.
    """

    id = "spas_sage"
    summary = "SpargeAttention's block-sparse SageAttention."
    arithmetic = "int8"
    kinds = ("cuda",)
    requires = ("spas-sage-attn>=0.1",)
    packages = (
        Package(
            "spas-sage-attn",
            "spas_sage_attn",
            "0.1.0",
            "https://github.com/thu-ml/SpargeAttn",
            how="build it from source: {page}",
            note="it is on no index",
            needs_triton=True,
        ),
    )
    symbols = (Symbols("spas_sage_attn", ("block_sparse_sage2_attn_cuda",)),)
    limits = Limits(HeadDimIn((64, 128)), NO_MASK, Elements())

    def capabilities(self, platform: Platform) -> tuple[tuple[int, int], ...]:
        return ((8, 0), (8, 6), (8, 7), (8, 9))


class SpasSage(PackageExecutor):
    """spas_sage_attn.block_sparse_sage2_attn_cuda."""

    id = "spas_sage"
    declared = Declared()

    def call_reasons(self, call: AttentionCall, block_map: BlockMap) -> Sequence[str]:
        if any(size % KEYS for size in block_map.keys.sizes[:-1]):
            return (f"a block of keys that is not the last has no multiple of {KEYS} tokens",)
        return fills_in_much(block_map.queries, QUERIES) or super().call_reasons(call, block_map)

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Copies of query, key, value and output, also of those in 8 bits and the values transposed, and the lists."""
        copies = query_size(request) + key_size(request) + 3 * value_size(request) + 2 * output_size(request)
        blocks = -(-request.q_len // KEYS) * -(-request.kv_len // KEYS)
        lists = 8 * blocks * request.batch * request.num_heads
        return round((copies * item_bytes(request) + rounded_bytes(request)) * MOST_FILLED) + lists

    def load(self, platform: Platform) -> Run:
        import torch
        from spas_sage_attn import block_sparse_sage2_attn_cuda

        def run(call: AttentionCall, block_map: BlockMap) -> torch.Tensor:
            device, (batch, num_heads) = call.query.device, call.query.shape[:2]
            with on_device_of(call.query):
                queries, keys = fill(block_map.queries, device, QUERIES), fill(block_map.keys, device, KEYS)
                seen = filled_map(block_map, queries, keys, device).expand(batch, num_heads, -1, -1)
                key, value = call.key, call.value
                if keys.tokens is not None:  # places without a token are the last ones
                    order = keys.tokens[: block_map.keys.tokens]
                    key, value = key.index_select(2, order), value.index_select(2, order)
                output = block_sparse_sage2_attn_cuda(
                    placed(call.query, queries), key, value, mask_id=seen.to(torch.int8).contiguous(), scale=call.scale
                )
                return result(output, queries, block_map.queries.tokens)

        return run
