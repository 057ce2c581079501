"""Diffusers' context parallel attention (`enable_parallelism`), computed by the groups of this library.

Diffusers' hooks divide the tokens of a model over the processes, and its attention modules pass `parallel_config` with
each call that needs the tokens of all. Such a call runs by Ulysses or ring as that configuration says, on its process
group, with the backend that all processes agree on (`backends/parallel/`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...backends.config import AttentionConfig
from ...backends.config.layers import record_of
from ...backends.config.schedule import is_scheduled
from ...backends.engine.call_checks import check, differing
from ...backends.parallel.group_call import RING, ULYSSES, GroupOptions, Prepared, run
from ...backends.parallel.group_session import GroupSession
from ...backends.parallel.rank_group import rank_group
from ...backends.values.request import AttentionCall

if TYPE_CHECKING:
    from .model_calls import ModelCall
    from .runs import DeviceSession


class InGroup(NamedTuple):
    """How the calls of a model are divided."""

    group: Any
    """A ProcessGroup; None: this process has all tokens."""
    strategy: str


def read(parallel_config: Any) -> InGroup | str:
    """What a `ParallelConfig` of Diffusers says about attention, or why it is not honoured here."""
    context = getattr(parallel_config, "context_parallel_config", None)
    if context is None:
        return InGroup(None, ULYSSES)
    if context.ring_degree > 1 and context.ulysses_degree > 1:
        return "Ulysses and ring together (ring_degree and ulysses_degree above 1)"
    by_ring = context.ring_degree > 1
    mesh = context._ring_mesh if by_ring else context._ulysses_mesh
    if mesh is None:
        return "its configuration was not set up by enable_parallelism"
    return InGroup(mesh.get_group(), RING if by_ring else ULYSSES)


def unfit(layers: tuple[AttentionConfig, ...]) -> str:
    """Why these configurations do not apply to calls in a group; empty where they do."""
    if is_scheduled(layers):
        return "a schedule, by steps or by blocks, does not apply to context parallel attention"
    return "a record is not repeated in context parallel attention" if record_of(layers) is not None else ""


def of_call(
    model_call: ModelCall, parallel_config: Any, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
) -> InGroup | str:  # fmt: skip
    """How one call runs, or why Diffusers' own function runs it: the same on every process."""
    how = read(parallel_config)
    if isinstance(how, str) or how.group is None:
        return how
    if text := unfit(model_call.run.layers):
        return text
    if mask is not None:
        return "a mask in context parallel attention"
    if any(tensor.ndim != 4 for tensor in tensors):
        return "tensors without four dimensions"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "the call needs a gradient"
    return differing(*tensors, None) or how


def attention(
    model_call: ModelCall, how: InGroup, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    is_causal: bool, scale: float | None, enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """Run one call with the tokens of all processes; each makes it.

    Args:
        query, key, value: of this process, (batch, length, heads, head_dim).

    Returns:
        The output for this process' queries, (batch, length, heads, v_head_dim).

    Raises:
        CheckError, NoBackendError: on every process; the group goes on.
        GroupError: another process failed.
    """
    module, ordinal = model_call.module, model_call.ordinal
    assert module is not None  # noqa: S101  # a call is routed while a module runs
    model_call.ordinal = ordinal + 1
    ranks = rank_group(how.group)

    def prepare() -> Prepared:
        q_len, kv_len = query.shape[1], key.shape[1]
        role = module.role(ordinal, q_len, kv_len)
        model_call.run.run_report.categories[role.name] = role.category
        call = AttentionCall(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None, is_causal, scale, enable_gqa
        )
        check(call, only_shapes=True, any_kv_len=True)
        options = GroupOptions(how.strategy, role=role.name, category=role.category)
        own = model_call.run.session(query.device)
        own.ranks = ranks
        return Prepared(_session(own, query.device), call, options)

    output, _ = run(ranks, prepare)
    return output.transpose(1, 2)


def _session(own: DeviceSession, device: torch.device) -> GroupSession:
    """Plans such calls, with the guard, the recorder and the clock of the other calls of the run."""
    if own.in_group is None:
        session = own.in_group = GroupSession(own.router, own.layers, own.run_report, checks=False, device=device)
        session.device_clock = own.device_clock
        session.register(*(observer for observer in own.observers if observer is not own.tuner))
    return own.in_group


def any_process(session: DeviceSession, value: bool) -> bool:
    """Whether a value is true in some process that computes calls of this one; each of them asks when this one does."""
    if session.ranks is None:
        return value
    with session.ranks.call():
        return any(row[0] for row in session.ranks.numbers([value]))
