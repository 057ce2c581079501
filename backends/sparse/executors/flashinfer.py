"""Computes a block map with FlashInfer's block-sparse wrappers (https://docs.flashinfer.ai/api/sparse.html).

Each head of each sample becomes a stretch of one long sequence with a single head, so heads need not share a map and
those of a group read the same keys. `BlockSparseAttentionWrapper` computes blocks of one size, with a block of keys as
a page; `VariableBlockSparseAttentionWrapper` any blocks, with a list of every single key. Tokens are brought into the
order of the map first: copies of query, key and value, and one of the output.

A plan is kept while its map lives, so static maps of calls that need at most `PLANS` plans are planned once. Planning
waits for the device.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from ...kernels.backend import Backend, Limits
from ...kernels.support.flashinfer import FLASHINFER
from ...kernels.support.layout import INT32_ELEMENTS, Elements, on_device_of
from ...kernels.support.ragged import WORKSPACE_BYTES, stream_of, workspace
from ...kernels.support.workspace import item_bytes, key_size, output_size, query_size, value_size
from ...values.limits import NO_MASK, HeadDimIn
from ...values.package import Symbols
from ...values.platform import Platform
from ...values.request import AttentionCall, AttentionRequest
from ..block_map import BlockMap, on_device
from ..blocks import Blocks
from ..executor import PackageExecutor, Run
from ..method import scale_of

if TYPE_CHECKING:
    import torch

PLANS = 8
"""Plans that a thread keeps; each holds 8 MiB on the device and 8 MiB of pinned memory, and its lists."""

MOST_ROWS = 32768
"""Query blocks of one plan: before 0.7 the package has room for the lengths of no more."""

MOST_LISTED = 2**26
"""Keys that one plan of the variable wrapper may list, if that of one head has fewer; about 40 bytes each."""

FEWEST_QUERIES = 4
"""Blocks with fewer queries of one head go to the package's decoding kernel, which takes one query of each."""


class Declared(Backend):
    """Limits as in flashinfer/sparse.py, 0.6.0 to 0.7.4; causal calls and masks are no calls with a map."""

    id = "flashinfer"
    summary = "FlashInfer's block-sparse attention."
    kinds = ("cuda",)
    min_capability = (8, 0)
    requires = ("flashinfer-python>=0.6",)
    packages = (FLASHINFER,)
    symbols = (Symbols("flashinfer", ("BlockSparseAttentionWrapper", "VariableBlockSparseAttentionWrapper")),)
    limits = Limits(HeadDimIn((64, 128, 256)), NO_MASK, Elements())


class Kind(NamedTuple):
    """What a wrapper is made for: it keeps the kernel that it chose at its first plan."""

    variable: bool
    dtype: torch.dtype
    head_dim: int
    device: torch.device
    stream: int


class Part(NamedTuple):
    """What a plan is of, beside its map: heads of all samples as (batch x num_heads,), and block sizes."""

    heads: range
    shares: int
    """Query heads for each key head."""
    of_queries: tuple[int, ...]
    of_keys: tuple[int, ...]
    scale: float


class Plan:
    """A wrapper with what it was planned for last."""

    def __init__(self, kind: Kind, wrapper: Any) -> None:
        self.kind, self.wrapper = kind, wrapper
        self.part: Part | None = None
        self.map: weakref.ref[torch.Tensor] | None = None

    def is_of(self, seen: torch.Tensor, part: Part) -> bool:
        return self.part == part and self.map is not None and self.map() is seen


class Plans(threading.local):
    """The plans of this thread, the one used last at the end."""

    def __init__(self) -> None:
        self.kept: list[Plan] = []

    def find(self, kind: Kind, seen: torch.Tensor, part: Part, make: Any) -> tuple[Plan, bool]:
        """The plan of a map, or one to be planned anew, of a map that is gone if there is one; and which of the two."""
        mine = [plan for plan in self.kept if plan.kind == kind]
        found = next((plan for plan in mine if plan.is_of(seen, part)), None)
        planned = found is not None
        if found is None:
            found = next((plan for plan in mine if plan.map is None or plan.map() is None), None)
        if found is None and len(self.kept) >= PLANS:
            found = mine[0] if mine else None
            if found is None:
                del self.kept[0]
        if found is None:
            found = Plan(kind, make())
        else:
            self.kept.remove(found)
        self.kept.append(found)
        return found, planned


def one_size(blocks: Blocks, fewest: int = 1) -> int | None:
    """The size that all blocks have, if it is at least `fewest`."""
    sizes = set(blocks.sizes)
    return blocks.sizes[0] if len(sizes) == 1 and blocks.sizes[0] >= fewest else None


def by_pages(block_map: BlockMap) -> bool:
    """Whether the wrapper for blocks of one size computes a map."""
    return bool(one_size(block_map.queries, FEWEST_QUERIES) and one_size(block_map.keys))


def in_order(tensor: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """(batch, heads, tokens, size) with the tokens in the order of the map, as (batch x heads x tokens, 1, size)."""
    if blocks.index is not None:
        tensor = tensor.index_select(2, on_device(blocks.index, tensor.device))
    return tensor.reshape(-1, 1, tensor.shape[3]).contiguous()


def parts(call: AttentionCall, block_map: BlockMap) -> list[range]:
    """Heads of all samples that one plan has, part after part."""
    heads, rows = call.query.shape[0] * call.query.shape[1], block_map.queries.count
    step = MOST_ROWS // rows
    if not by_pages(block_map):
        step = min(step, MOST_LISTED // (rows * block_map.keys.tokens))
    step = max(step, 1)
    return [range(start, min(start + step, heads)) for start in range(0, heads, step)]


class FlashInfer(PackageExecutor):
    """FlashInfer's wrappers for block-sparse attention."""

    id = "flashinfer"
    declared = Declared()

    def call_reasons(self, call: AttentionCall, block_map: BlockMap) -> Sequence[str]:
        rows, keys = block_map.queries.count, block_map.keys
        if rows > MOST_ROWS:
            return (f"{rows} query blocks > {MOST_ROWS}",)
        if not by_pages(block_map) and rows * keys.tokens > INT32_ELEMENTS:
            return (f"a list of {rows * keys.tokens} keys > {INT32_ELEMENTS}",)
        return super().call_reasons(call, block_map)

    def reads_back(self, block_map: BlockMap) -> bool:
        return True

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Copies of query, key and value, and two of the output, the package's workspaces, and the lists of a plan.

        Keys are copied for each query head where they are listed one by one. Blocks are taken to have 64 tokens.
        """
        keys = (key_size(request) + value_size(request)) * request.num_heads // (request.num_kv_heads or 1)
        copies = (query_size(request) + keys + 2 * output_size(request)) * item_bytes(request)
        rows, heads = ceil(request.q_len / 64), request.batch * request.num_heads
        listed = min(heads * rows * request.kv_len, max(MOST_LISTED, rows * request.kv_len))
        return copies + WORKSPACE_BYTES + PLANS * 8 * 2**20 + 40 * listed

    def load(self, platform: Platform) -> Run:
        from flashinfer import BlockSparseAttentionWrapper, VariableBlockSparseAttentionWrapper

        plans = Plans()

        def run(call: AttentionCall, block_map: BlockMap) -> torch.Tensor:
            import torch

            batch, num_heads, q_len, head_dim = call.query.shape
            shares = num_heads // call.key.shape[1]
            pages = by_pages(block_map)
            wrapper_class = BlockSparseAttentionWrapper if pages else VariableBlockSparseAttentionWrapper
            with on_device_of(call.query):
                query = in_order(call.query, block_map.queries)
                key, value = in_order(call.key, block_map.keys), in_order(call.value, block_map.keys)
                device, stream = query.device, stream_of(query)
                kind = Kind(not pages, query.dtype, head_dim, device, stream)
                outputs = []
                for heads in parts(call, block_map):
                    part = Part(heads, shares, block_map.queries.sizes, block_map.keys.sizes, scale_of(call))
                    plan, planned = plans.find(
                        kind, block_map.seen, part, lambda: wrapper_class(workspace(self.id, device, stream))
                    )
                    if not planned:
                        plan.part = plan.map = None  # not of this map, if planning fails
                        seen = rows_of(block_map, heads, num_heads, device)
                        if pages:
                            plan_pages(plan.wrapper, seen, part, kind, len(key))
                        else:
                            plan_lists(plan.wrapper, seen, part, kind)
                        plan.part, plan.map = part, weakref.ref(block_map.seen)
                    own = query[heads.start * q_len : heads.stop * q_len]
                    if pages:
                        outputs.append(plan.wrapper.run(own, key, value))
                    else:
                        outputs.append(_run_lists(plan.wrapper, own, key, value, part))
                output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
                return back(output.view(batch, num_heads, q_len, head_dim), block_map.queries)

        return run


def rows_of(block_map: BlockMap, heads: range, num_heads: int, device: torch.device) -> torch.Tensor:
    """The rows of a map for some heads of all samples, (heads, query blocks, key blocks).

    On the device even where the map is kept on the CPU: reading them from there is what makes a wrapper that is planned
    again wait until its last plan was copied.
    """
    import torch

    seen = on_device(block_map.seen, device)
    samples_of_map, heads_of_map = seen.shape[:2]
    at = torch.arange(heads.start, heads.stop, device=device)
    sample = at // num_heads if samples_of_map > 1 else torch.zeros_like(at)
    head = at % num_heads if heads_of_map > 1 else torch.zeros_like(at)
    return seen[sample, head]


def plan_pages(wrapper: Any, seen: torch.Tensor, part: Part, kind: Kind, keys: int) -> None:
    """Plan blocks of one size: pages of the `keys` of all samples and heads for each block of queries."""
    import torch

    counts = seen.sum(-1, dtype=torch.int32).view(-1)
    offsets = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    head, _, block = seen.nonzero(as_tuple=True)
    indices = ((head + part.heads.start) // part.shares * seen.shape[2] + block).int()
    wrapper.plan(
        offsets,
        indices,
        len(part.heads) * sum(part.of_queries),
        keys,
        part.of_queries[0],
        part.of_keys[0],
        1,
        1,
        kind.head_dim,
        sm_scale=part.scale,
        q_data_type=kind.dtype,
        o_data_type=kind.dtype,
    )


def plan_lists(wrapper: Any, seen: torch.Tensor, part: Part, kind: Kind) -> None:
    """Plan blocks of any size: a list of keys for each block of queries."""
    import torch

    of_queries, of_keys = (
        torch.tensor(sizes, dtype=torch.int32, device=kind.device).expand(len(part.heads), -1)
        for sizes in (part.of_queries, part.of_keys)
    )
    wrapper.plan(
        seen,
        of_queries,
        of_keys,
        len(part.heads),
        len(part.heads),
        kind.head_dim,
        sm_scale=part.scale,
        q_data_type=kind.dtype,
    )


def _run_lists(wrapper: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Part) -> torch.Tensor:
    import torch

    size, heads = query.shape[-1], part.heads
    key, value = (tensor.view(-1, sum(part.of_keys), size) for tensor in (key, value))
    if part.shares > 1:
        of_heads = torch.arange(heads.start, heads.stop, device=query.device) // part.shares
        key, value = key.index_select(0, of_heads), value.index_select(0, of_heads)
    else:
        key, value = key[heads.start : heads.stop], value[heads.start : heads.stop]
    output: torch.Tensor = wrapper.run(query.view(len(heads), -1, size), key, value)
    return output.reshape(-1, 1, size)


def back(output: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """(batch, heads, tokens, size) with the tokens in their own order."""
    if blocks.index is None:
        return output
    restored = output.new_empty(output.shape)
    return restored.index_copy_(2, on_device(blocks.index, output.device), output)
