"""Computes a block map key block after key block: the queries that see one are gathered, and results merged by LSE.

For maps whose query blocks have one token each: there every query would gather its own keys otherwise. The result is
exact. It is merged in fp32, or in fp64 for a call in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from ...kernels.support.merge import merge
from ...kernels.support.workspace import item_bytes
from ...kernels.torch_sdpa import with_lse
from ...values.platform import Platform
from ...values.request import AttentionCall, AttentionRequest
from ..block_map import BlockMap, block_of_token, on_device
from ..executor import Executor, Run

if TYPE_CHECKING:
    import torch

MOST_COPIES = 8
"""Of one head's output in fp32: the running result, the rows of a part, and what merging them makes."""


class Merge(Executor):
    """Parts over one key block each, on any device and for any map."""

    id = "merge"

    def reads_back(self, block_map: BlockMap) -> bool:
        return True

    def call_reasons(self, call: AttentionCall, block_map: BlockMap) -> Sequence[str]:
        import torch

        if torch.is_grad_enabled() and any(one.requires_grad for one in (call.query, call.key, call.value)):
            return ("gradients are asked for",)
        return ()

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Of one head; the list of its pairs of a query and a key block is a part of choosing."""
        v_head_dim = request.v_head_dim or request.head_dim
        rows = request.q_len * (4 * MOST_COPIES * v_head_dim + item_bytes(request) * request.head_dim)
        return rows + request.kv_len * item_bytes(request) * (request.head_dim + v_head_dim)

    def load(self, platform: Platform) -> Run:
        attend = with_lse(platform)

        def run(call: AttentionCall, block_map: BlockMap) -> torch.Tensor:
            import torch

            batch, heads, q_len, _ = call.query.shape
            shares, device = heads // call.key.shape[1], call.query.device
            wide = torch.float64 if call.query.dtype == torch.float64 else torch.float32
            output = call.query.new_empty((batch, q_len, heads, call.value.shape[3])).transpose(1, 2)
            row_of = None if set(block_map.queries.sizes) == {1} else block_of_token(block_map.queries).to(device)
            index = block_map.keys.index
            keys = torch.arange(block_map.keys.tokens, device=device) if index is None else on_device(index, device)
            blocks = torch.split(keys, list(block_map.keys.sizes))
            samples_of_map, heads_of_map = block_map.seen.shape[:2]
            for sample, head in product(range(batch), range(heads)):
                seen = block_map.seen[min(sample, samples_of_map - 1), min(head, heads_of_map - 1)].to(device)
                if row_of is not None:
                    seen = seen.index_select(0, row_of)
                query, key, value = (
                    tensor[sample, at] for tensor, at in
                    ((call.query, head), (call.key, head // shares), (call.value, head // shares))
                )  # fmt: skip
                done = output.new_zeros((1, 1, q_len, value.shape[1]), dtype=wide)
                lse = output.new_full((1, 1, q_len), float("-inf"), dtype=wide)
                queries = seen.mT.nonzero()[:, 1]
                for rows, columns in zip(torch.split(queries, seen.sum(0).tolist()), blocks, strict=True):
                    if not len(rows):
                        continue
                    part, its_lse = attend(call.changed(
                        query=query.index_select(0, rows)[None, None], key=key.index_select(0, columns)[None, None],
                        value=value.index_select(0, columns)[None, None], enable_gqa=False,
                    ))  # fmt: skip
                    before = done.index_select(2, rows), lse.index_select(2, rows)
                    joined, joined_lse = merge((before, (part, its_lse)))
                    done.index_copy_(2, rows, joined)
                    lse.index_copy_(2, rows, joined_lse)
                output[sample, head] = done[0, 0]
            return output

        return run
