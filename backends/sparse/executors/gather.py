"""Computes a block map with torch alone: keys of a query block are gathered, and SDPA runs on them without a mask.

Query blocks that see equally many keys run together, a few at a time, so that what is gathered stays in a bounded
scratch buffer. Tokens are read through the order of the map, so nothing is permuted in memory. The result is exact: the
attention of each query over the keys of its blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from ...kernels.backend import LseKernel
from ...kernels.support.merge import merge
from ...kernels.support.workspace import item_bytes
from ...kernels.torch_sdpa import with_lse
from ...values.platform import Platform
from ...values.request import AttentionCall, AttentionRequest
from ..block_map import BlockMap, Tail, block_of_token, on_device
from ..blocks import Blocks
from ..executor import Executor, Run

if TYPE_CHECKING:
    import torch

BUDGET = 16 * 2**20
"""Bytes of gathered keys and values at a time, if more than one query block fits."""

BUDGET_ON_CPU = 9 * 2**18
"""The same on a CPU, where what is gathered should stay in its caches: 2.25 MiB was fastest of 1.5 to 16."""

MOST_ROWS = 16
"""Query blocks at a time on the CPU: more gain nothing there and leave its caches."""

MOST_ROWS_ELSEWHERE = 4096
"""The same on other devices, where a call of a kernel costs more."""


def workspace_bytes(request: AttentionRequest, item: int, on_cpu: bool) -> int:
    """Bytes of one call beyond its tensors: gathered keys and values of one chunk of query blocks, and indices."""
    row = _row_bytes(request.kv_len, request.head_dim, request.v_head_dim or request.head_dim, item)
    return max(BUDGET_ON_CPU if on_cpu else BUDGET, row)


def _row_bytes(keys: int, head_dim: int, v_head_dim: int, item: int) -> int:
    return keys * ((head_dim + v_head_dim) * item + 8)


@dataclass(frozen=True)
class _Side:
    """One side of a map as tensors: token numbers block after block, where blocks start, and their sizes."""

    index: torch.Tensor | None
    starts: torch.Tensor
    sizes: torch.Tensor
    most: int
    """The size of the largest block."""
    uniform: bool
    """Whether all blocks have that size."""


_sides: MutableMapping[Blocks, dict[torch.device, _Side]] = WeakKeyDictionary()
"""What blocks become on each device, as long as they live."""


def _side(blocks: Blocks, device: torch.device) -> _Side:
    import torch

    of_devices = _sides.setdefault(blocks, {})
    found = of_devices.get(device)
    if found is None:
        with torch.inference_mode(False):  # for calls outside of inference mode too
            index = None if blocks.index is None else blocks.index.to(device)
            starts, sizes = (torch.tensor(numbers, device=device) for numbers in (blocks.starts, blocks.sizes))
        found = of_devices[device] = _Side(index, starts, sizes, max(blocks.sizes), len(set(blocks.sizes)) == 1)
    return found


class _Group(NamedTuple):
    """Query blocks that see equally many blocks and keys, and have equally many queries."""

    rows: torch.Tensor
    """Numbers of (sample, head, query block), (rows,)."""
    blocks: int
    keys: int
    queries: int


def _groups(block_map: BlockMap) -> list[_Group]:
    """Every row of the map once. Reads the map from its device only where its counts are not known."""
    import torch

    sizes = torch.tensor(block_map.keys.sizes, device="cpu")
    of_queries = torch.tensor(block_map.queries.sizes, device="cpu")
    samples, heads, rows, _ = block_map.seen.shape
    if block_map.counts is not None and len(set(block_map.keys.sizes)) == 1:  # as in `Gather.reads_back`
        counts = torch.tensor(block_map.counts, device="cpu").expand(samples, heads, rows)
        keys = counts * block_map.keys.sizes[0]
    else:
        seen = block_map.seen.cpu()
        counts = seen.sum(-1)
        # In float32 a product of matrices, exact below 2**24.
        keys = (seen.float() @ sizes.float()[:, None]).squeeze(-1).long()
    kinds = torch.stack((counts, keys, of_queries.expand_as(counts)), -1).reshape(-1, 3)
    found, which = torch.unique(kinds, dim=0, return_inverse=True)
    return [_Group((which == at).nonzero().view(-1), *kind) for at, kind in enumerate(found.tolist())]


def _tokens(side: _Side, blocks: torch.Tensor, total: int, *, sort: bool = False) -> torch.Tensor:
    """Token numbers of some blocks, (rows, total), in the order of the map; `blocks` is (rows, blocks).

    `sort`: places without a token are sorted out, which waits for no device; else they are left out, faster on a CPU.
    """
    import torch

    within = torch.arange(side.most, device=blocks.device)
    tokens = (side.starts[blocks][..., None] + within).flatten(1)
    if not side.uniform:
        live = (within < side.sizes[blocks][..., None]).flatten(1)
        if int(live.shape[1]) != total and sort:
            first = torch.argsort(live.logical_not().byte(), dim=-1, stable=True)[:, :total]
            tokens = tokens.gather(1, first)
        elif int(live.shape[1]) != total:
            tokens = tokens[live].view(-1, total)
    return tokens if side.index is None else side.index[tokens]


Buffers = dict[tuple[str, "torch.dtype"], "torch.Tensor"]
"""Scratch buffers by name and dtype."""

_free = threading.local()
"""The buffers of this thread, by whether they were made under inference mode, where torch lets no other write to them.

Reused by its calls: new memory costs a CPU as much as filling it. A call takes them away while it runs, so that a call
within it makes others.
"""


@contextmanager
def _buffers(call: AttentionCall) -> Iterator[Buffers | None]:
    """Buffers for one call; None where a gradient needs what was gathered, or where the device keeps freed memory."""
    import torch

    tensors = call.query, call.key, call.value
    if call.query.device.type != "cpu" or (torch.is_grad_enabled() and any(each.requires_grad for each in tensors)):
        yield None
        return
    mode = f"inference {torch.is_inference_mode_enabled()}"
    taken: Buffers = _free.__dict__.pop(mode, {})
    try:
        yield taken
    finally:
        _free.__dict__[mode] = taken


def gather(call: AttentionCall, block_map: BlockMap, attend: LseKernel | None = None) -> torch.Tensor:
    """Attention of each query over the keys that its block sees.

    Args:
        call: without a mask, not causal; query (batch, num_heads, q_len, head_dim), key and value (batch, num_kv_heads,
            kv_len, ...), with the tokens of `block_map`.
        attend: computes attention with its LSE, which a map with a tail needs.

    Returns:
        (batch, num_heads, q_len, v_head_dim), a view of (batch, q_len, num_heads, v_head_dim).
    """
    import torch

    query, value = call.query, call.value
    batch, heads, q_len, _ = query.shape
    output = query.new_empty((batch, q_len, heads, value.shape[3])).transpose(1, 2)
    queries, keys = _side(block_map.queries, query.device), _side(block_map.keys, query.device)
    chosen = torch.argsort(on_device(block_map.seen, query.device).logical_not().byte(), dim=-1, stable=True)
    tail, with_tail = block_map.tail, None
    if tail is not None:
        if attend is None:
            raise TypeError("a map with a tail needs a kernel that gives the LSE")
        with_tail = _WithLse(attend, query.new_empty((batch, heads, q_len), dtype=torch.float32))
    with _buffers(call) as buffers:
        for group in _groups(block_map):
            if query.device.type == "cpu":
                _by_head(call, block_map, group, queries, keys, chosen, output, with_tail, buffers)
            else:
                _all_heads(call, block_map, group, queries, keys, chosen, output, with_tail)
    if tail is not None and with_tail is not None:
        _merge_tail(tail, block_map.queries, output, with_tail.lse)
    return output


class _WithLse(NamedTuple):
    """How the rows of a map with a tail are computed."""

    attend: LseKernel
    lse: torch.Tensor
    """(batch, num_heads, q_len), float32: where their LSE goes."""


def _merge_tail(tail: Tail, queries: Blocks, output: torch.Tensor, lse: torch.Tensor) -> None:
    """Merge a tail into the output, one head after the other: what is in float32 meanwhile is of one head."""
    block = block_of_token(queries).to(output.device)
    for sample in range(len(output)):
        for head in range(output.shape[1]):
            of_tail = tail.output[sample, head].index_select(0, block)
            its_lse = tail.lse[sample, head].index_select(0, block) + tail.shift[sample, head]
            part = output[sample : sample + 1, head : head + 1], lse[sample : sample + 1, head : head + 1]
            part[0].copy_(merge((part, (of_tail[None, None], its_lse[None, None])))[0])


def _chunks(group: _Group, call: AttentionCall, budget: int, most: int) -> Iterator[torch.Tensor]:
    import torch

    row = _row_bytes(group.keys, call.query.shape[3], call.value.shape[3], call.query.element_size())
    yield from torch.split(group.rows, min(max(budget // row, 1), most))


def _by_head(
    call: AttentionCall, block_map: BlockMap, group: _Group, queries: _Side, keys: _Side, chosen: torch.Tensor,
    output: torch.Tensor, with_tail: _WithLse | None, buffers: Buffers | None,
) -> None:  # fmt: skip
    """The rows of a group, one head after the other: `index_select` is the fastest way to gather on a CPU."""
    from torch.nn.functional import scaled_dot_product_attention

    batch, heads = call.query.shape[:2]
    shares = heads // call.key.shape[1]
    samples_of_map, heads_of_map, count, _ = block_map.seen.shape
    place = group.rows // count
    for at in range(samples_of_map * heads_of_map):
        rows = group.rows[place == at] % count
        if not len(rows):
            continue
        of_head = chosen[at // heads_of_map, at % heads_of_map]
        for chunk in _chunks(group._replace(rows=rows), call, BUDGET_ON_CPU, MOST_ROWS):
            q_tokens = _tokens(queries, chunk[:, None], group.queries).view(-1)
            k_tokens = _tokens(keys, of_head[chunk, : group.blocks], group.keys).view(-1)
            for sample in range(batch) if samples_of_map == 1 else (at // heads_of_map,):
                for head in range(heads) if heads_of_map == 1 else (at % heads_of_map,):
                    query = call.query[sample, head].index_select(0, q_tokens)
                    key = _select("key", call.key[sample, head // shares], k_tokens, buffers)
                    value = _select("value", call.value[sample, head // shares], k_tokens, buffers)
                    given = (
                        query.view(1, len(chunk), group.queries, -1),
                        key.view(1, len(chunk), group.keys, -1),
                        value.view(1, len(chunk), group.keys, -1),
                    )
                    if with_tail is None:
                        part = scaled_dot_product_attention(*given, scale=call.scale)
                    else:
                        part, lse = with_tail.attend(_part(call, *given))
                        with_tail.lse[sample, head].index_copy_(0, q_tokens, lse.reshape(-1).float())
                    output[sample, head].index_copy_(0, q_tokens, part.reshape(len(q_tokens), -1))


def _part(call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> AttentionCall:
    return call.changed(query=query, key=key, value=value, enable_gqa=False)


def _select(name: str, rows: torch.Tensor, tokens: torch.Tensor, buffers: Buffers | None) -> torch.Tensor:
    import torch

    size = len(tokens) * rows.shape[1]
    if buffers is None or size * rows.element_size() > BUDGET:
        return rows.index_select(0, tokens)
    buffer = buffers.get((name, rows.dtype))
    if buffer is None or buffer.numel() < size:
        buffer = buffers[name, rows.dtype] = torch.empty(size, dtype=rows.dtype, device="cpu")
    return torch.index_select(rows.detach(), 0, tokens, out=buffer[:size].view(len(tokens), -1))


def _all_heads(
    call: AttentionCall, block_map: BlockMap, group: _Group, queries: _Side, keys: _Side, chosen: torch.Tensor,
    output: torch.Tensor, with_tail: _WithLse | None,
) -> None:  # fmt: skip
    """The rows of a group across heads and samples, for devices where each launched kernel costs time."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    device = call.query.device
    batch, heads = call.query.shape[:2]
    shares = heads // call.key.shape[1]
    samples_of_map, heads_of_map, count, _ = block_map.seen.shape
    rows = group.rows.to(device)
    sample, head, row = rows // (heads_of_map * count), rows // count % heads_of_map, rows % count
    if samples_of_map == 1 and batch > 1:  # the same map in each sample
        sample = torch.arange(batch, device=device).repeat_interleave(len(rows))
        head, row = head.repeat(batch), row.repeat(batch)
    if heads_of_map == 1 and heads > 1:
        sample, row = sample.repeat_interleave(heads), row.repeat_interleave(heads)
        head = torch.arange(heads, device=device).repeat(len(row) // heads)
    numbers = torch.arange(len(row), device="cpu")
    for chunk in _chunks(group._replace(rows=numbers), call, BUDGET, MOST_ROWS_ELSEWHERE):
        part = slice(int(chunk[0]), int(chunk[-1]) + 1)
        b, h, i = sample[part, None], head[part, None], row[part]
        in_map = chosen[b[:, 0] if samples_of_map > 1 else 0, h[:, 0] if heads_of_map > 1 else 0, i, : group.blocks]
        q_tokens = _tokens(queries, i[:, None], group.queries, sort=True)
        k_tokens = _tokens(keys, in_map, group.keys, sort=True)
        given = (
            call.query[b, h, q_tokens][None],
            call.key[b, h // shares, k_tokens][None],
            call.value[b, h // shares, k_tokens][None],
        )
        if with_tail is None:
            result = scaled_dot_product_attention(*given, scale=call.scale)
        else:
            result, lse = with_tail.attend(_part(call, *given))
            with_tail.lse[b, h, q_tokens] = lse[0].float()
        output[b, h, q_tokens] = result[0]


class Gather(Executor):
    """Gathered keys and SDPA, on any device and for any map."""

    id = "gather"

    def reads_back(self, block_map: BlockMap) -> bool:
        return not block_map.seen.is_cpu and (block_map.counts is None or len(set(block_map.keys.sizes)) > 1)

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        return workspace_bytes(request, item_bytes(request), platform.kind == "cpu")

    def call_reasons(self, call: AttentionCall, block_map: BlockMap) -> Sequence[str]:
        import torch

        tensors = call.query, call.key, call.value
        if block_map.tail is not None and torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
            return ("gradients are asked for",)
        return ()

    def load(self, platform: Platform) -> Run:
        return partial(gather, attend=with_lse(platform))
