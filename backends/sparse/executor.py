"""`Executor`: one way to compute a block map, where it runs and why not elsewhere; and the choice among them.

A file in `executors/` declares one, and `executors/__init__.py` lists them, best first. Each answers with reasons:
about the machine, about a kind of call, about one map. An empty list means yes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ..kernels.backend import Backend
from ..values.options import Option
from ..values.platform import Platform
from ..values.request import AttentionCall, AttentionRequest
from .block_map import BlockMap, Map

if TYPE_CHECKING:
    import torch

Run = Callable[[AttentionCall, BlockMap], "torch.Tensor"]
"""Computes a call, without a mask and not causal, over the pairs of a map; (batch, num_heads, q_len, v_head_dim)."""

AUTO = "auto"


class Executor:
    """One way to compute a block map. A subclass declares `id` and writes `load`."""

    id: ClassVar[str]
    by_name_only: ClassVar[bool] = False
    """`auto` does not take it, not even last: it runs where a person names it."""

    def unavailable_reasons(self, platform: Platform) -> Sequence[str]:
        """Why it cannot run on this machine at all."""
        return ()

    def unsupported_reasons(self, request: AttentionRequest, platform: Platform) -> Sequence[str]:
        """Why it cannot run calls of this kind: dtype, head size, lengths."""
        return ()

    def avoid_reasons(self, request: AttentionRequest, platform: Platform) -> Sequence[str]:
        """Why `auto` takes this one last for calls of this kind, although it could run them."""
        return ()

    def call_reasons(self, call: AttentionCall, block_map: BlockMap) -> Sequence[str]:
        """Why it cannot run one call with its map; asked at each call, so it reads no tensor."""
        return ()

    def avoid_map_reasons(self, block_map: BlockMap) -> Sequence[str]:
        """Why `auto` does not take it for a call with this map, although it could run it; asked at each call."""
        return ()

    def reads_back(self, block_map: BlockMap) -> bool:
        """Whether a call with this map, on another device than the CPU, waits to read how many blocks are kept."""
        return False

    def workspace_bytes(self, request: AttentionRequest, platform: Platform) -> int:
        """Bytes that one call takes at most beyond its tensors and its map."""
        return 0

    def load(self, platform: Platform) -> Run:
        """Import what it needs; called once for each loaded method.

        Raises:
            Exception: what a broken package raises; the next executor is taken, or the named one is refused.
        """
        raise NotImplementedError


class PackageExecutor(Executor):
    """An executor of an installed package. It runs where it is named: on no card was one measured.

    `declared` says where it runs, what its package is and which names it takes from it. No menu has it.
    """

    by_name_only = True
    declared: ClassVar[Backend]
    probed_block: ClassVar[int] = 64
    """Tokens in the blocks of the maps that a probe gives it."""

    def unavailable_reasons(self, platform: Platform) -> Sequence[str]:
        return self.declared.unavailable_reasons(platform)

    def unsupported_reasons(self, request: AttentionRequest, platform: Platform) -> Sequence[str]:
        return self.declared.unsupported_reasons(request, platform)

    def avoid_reasons(self, request: AttentionRequest, platform: Platform) -> Sequence[str]:
        return ("not measured on this card; it runs where it is named",)

    def call_reasons(self, call: AttentionCall, block_map: BlockMap) -> Sequence[str]:
        import torch

        if torch.is_grad_enabled() and any(one.requires_grad for one in (call.query, call.key, call.value)):
            return ("gradients are asked for",)
        return ("pooled terms of what is left out are not built for it",) if block_map.tail is not None else ()


class Selection(NamedTuple):
    """The executors for calls of one kind."""

    able: tuple[Executor, ...]
    """Those that can run them, best first; empty: none can."""
    reasons: dict[str, tuple[str, ...]]
    """Why each other one than the first of `able` is not taken, by id."""


@lru_cache(maxsize=1024)
def select(request: AttentionRequest, platform: Platform, named: str = AUTO) -> Selection:
    """Which executors run calls of this kind on this machine.

    Args:
        named: the only one that may run; `auto`: the first that can and has no reason to be avoided, then the others,
            without those that run by name only.
    """
    able: list[Executor] = []
    avoided: list[Executor] = []
    reasons: dict[str, tuple[str, ...]] = {}
    for executor in executors(named):
        if named not in (AUTO, executor.id):
            reasons[executor.id] = (f"{named} is named",)
            continue
        against = tuple(executor.unavailable_reasons(platform) or executor.unsupported_reasons(request, platform))
        if against:
            reasons[executor.id] = against
        elif named == AUTO and (against := tuple(executor.avoid_reasons(request, platform))):
            reasons[executor.id] = against
            if not executor.by_name_only:
                avoided.append(executor)
        else:
            if able:
                reasons[executor.id] = (f"{able[0].id} comes first",)
            able.append(executor)
    found = (*able, *avoided)
    if found:
        reasons.pop(found[0].id, None)
    return Selection(found, reasons)


def executors(named: str = AUTO) -> tuple[Executor, ...]:
    """All executors, in the order of `executors/__init__.py`, and the named one where it is for one method."""
    from .executors import EXECUTORS, FOR_ONE_METHOD

    return (*EXECUTORS, *(executor for executor in FOR_ONE_METHOD if executor.id == named))


def run_map(run: Run, call: AttentionCall, block_map: Map) -> torch.Tensor:
    """Compute a map; where heads have their own, those of a sample that share one together, as a copy of them."""
    if isinstance(block_map, BlockMap):
        return run(call, block_map)
    batch, heads, q_len, _ = call.query.shape
    shares = heads // call.key.shape[1]
    output = call.query.new_empty((batch, q_len, heads, call.value.shape[3])).transpose(1, 2)
    for sample in range(batch):
        together: dict[int, list[int]] = {}
        for head in range(heads):
            together.setdefault(id(block_map.of_head(head, sample)), []).append(head)
        for group in together.values():
            of_query: slice | list[int] = group
            of_key: slice | list[int] = [head // shares for head in group]
            if len(group) == 1:
                of_query, of_key = slice(group[0], group[0] + 1), slice(group[0] // shares, group[0] // shares + 1)
            one = slice(sample, sample + 1)
            part = call.changed(
                query=call.query[one, of_query], key=call.key[one, of_key], value=call.value[one, of_key],
                enable_gqa=False,
            )  # fmt: skip
            output[one, of_query] = run(part, block_map.of_head(group[0], sample))
    return output


EXECUTOR = Option(
    "executor", str, AUTO, "How the chosen blocks are computed; auto takes the best that runs here.",
    choices=(AUTO, "gather", "flex", "flashinfer", "fastvideo", "spas_sage", "fa4"),
)  # fmt: skip


def only(name: str) -> Option:
    """`EXECUTOR` of a method whose maps one executor computes (`SparseMethod.only_executor`)."""
    return replace(EXECUTOR, choices=(AUTO, name))
