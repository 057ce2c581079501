"""Varlen calls: packed sequences of different lengths in one call.

A mask that leaves samples different keys, or blocks of queries their own ones, becomes several calls without a mask
(`engine/mask_reader.py`). A backend with a varlen kernel runs them as one. Layout THD: (tokens of all sequences, heads,
head_dim), with the offset of each sequence: `cu_seqlens` of the libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from ...values.faults import check_output_is
from ...values.mask_plan import MaskPlan
from ...values.request import AttentionCall, SplitCall
from ..backend import Kernel
from .ragged import offsets_of, to_bhsd, to_thd

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class VarlenCall:
    """The argument of a varlen kernel. Every sequence has queries and keys; there is no mask."""

    query: torch.Tensor
    """(q_tokens, num_heads, head_dim), float16 or bfloat16, the last dimension contiguous."""
    key: torch.Tensor
    """(kv_tokens, num_kv_heads, head_dim)."""
    value: torch.Tensor
    """(kv_tokens, num_kv_heads, v_head_dim)."""
    q_lengths: tuple[int, ...]
    """Queries of each sequence; they add up to q_tokens."""
    kv_lengths: tuple[int, ...]
    scale: float | None = None

    @property
    def q_offsets(self) -> torch.Tensor:
        """Where each sequence's queries begin, and the end of the last: (sequences + 1,), int32, on the device."""
        return offsets_of(self.q_lengths, self.query.device)

    def changed(self, *, query: torch.Tensor, scale: float) -> VarlenCall:
        """A copy with another query and scale."""
        return replace(self, query=query, scale=scale)

    @property
    def kv_offsets(self) -> torch.Tensor:
        """The same for keys and values."""
        return offsets_of(self.kv_lengths, self.query.device)


VarlenKernel = Callable[[VarlenCall], "torch.Tensor"]
"""Computes each sequence separately; returns (q_tokens, num_heads, v_head_dim)."""


class _Sequence(NamedTuple):
    """One sequence: a sample, the span of its queries, and its keys as a `mask_plan.SubCall` has them."""

    sample: int
    first: int
    last: int
    keys: torch.Tensor | slice


def pack(call: AttentionCall, plan: MaskPlan) -> VarlenCall:
    """The calls of all parts of `plan` as one; parts without a visible key are left out."""
    import torch

    sequences = _sequences(call, plan)
    if _covers(call, sequences):
        query = to_thd(call.query)  # a view where the model made it (batch, length, heads)
    else:
        query = torch.cat([call.query[one.sample, :, one.first : one.last].transpose(0, 1) for one in sequences])
    keys, values = ([_taken(tensor[one.sample], one.keys) for one in sequences] for tensor in (call.key, call.value))
    return VarlenCall(
        query,
        torch.cat([part.transpose(0, 1) for part in keys]),
        torch.cat([part.transpose(0, 1) for part in values]),
        tuple(one.last - one.first for one in sequences),
        tuple(part.shape[1] for part in keys),
        call.scale,
    )


def _taken(tensor: torch.Tensor, keys: torch.Tensor | slice) -> torch.Tensor:
    """(heads, kv_len, head_dim) of one sample, the keys that it sees; a view where they lie together."""
    return tensor[:, keys] if isinstance(keys, slice) else tensor.index_select(1, keys)


def unpack(output: torch.Tensor, call: AttentionCall, plan: MaskPlan) -> torch.Tensor:
    """The output of a varlen call as (batch, num_heads, q_len, v_head_dim); zeros for what had no keys."""
    batch, heads, q_len, _ = call.query.shape
    sequences = _sequences(call, plan)
    if _covers(call, sequences):
        return to_bhsd(output, batch)
    whole: torch.Tensor = output.new_zeros(batch, q_len, heads, output.shape[-1])
    begin = 0
    for one in sequences:
        end = begin + one.last - one.first
        whole[one.sample, one.first : one.last] = output[begin:end]
        begin = end
    return whole.transpose(1, 2)


def as_kernel(kernel: VarlenKernel) -> Kernel:
    """A kernel for a `SplitCall`, from a varlen kernel."""

    def run(call: AttentionCall) -> torch.Tensor:
        if not isinstance(call, SplitCall):
            raise TypeError(f"the plan of a varlen call was given {type(call).__name__}, without a mask plan")
        packed = pack(call, call.mask_plan)
        output = kernel(packed)
        shape = (*packed.query.shape[:2], packed.value.shape[2])
        check_output_is(output, shape, packed.query.dtype, packed.query.get_device())
        return unpack(output, call, call.mask_plan)

    return run


def _sequences(call: AttentionCall, plan: MaskPlan) -> list[_Sequence]:
    """In the order of the tokens: sample by sample, row by row."""
    batch, q_len = call.query.shape[0], call.query.shape[2]
    found = [
        _Sequence(sample, *part.rows.indices(q_len)[:2], part.keys)
        for part in plan.sub_calls
        if part.keys is not None
        for sample in range(batch)[part.samples]
    ]
    return sorted(found, key=lambda one: one[:2])


def _covers(call: AttentionCall, sequences: Sequence[_Sequence]) -> bool:
    """Whether every query of the call is in a sequence."""
    return sum(one.last - one.first for one in sequences) == call.query.shape[0] * call.query.shape[2]


def packs(plan: MaskPlan) -> bool:
    """Whether the parts of a mask can be one varlen call: several of them, none with a mask left."""
    some = [part for part in plan.sub_calls if part.keys is not None]
    return plan.strategy in ("per sample", "per block") and all(
        part.mask is None and not part.is_causal for part in some
    )
