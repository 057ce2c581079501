"""`MaskPlan`: the sub-calls of calls with one mask, each with its visible keys and remaining mask.

`engine/mask_reader.inspect` makes a plan from a mask's values. A cached plan is valid for one model call, since tensors
have no version under torch.inference_mode, and only while the mask is alive. No kernel gets a call without keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from .masks import for_kernels, mask_kind, visible_keys
from .request import AttentionCall

if TYPE_CHECKING:
    import torch

NOTHING_HIDDEN = "nothing hidden"
"""Strategy of a mask that hides nothing: it is dropped."""
PASSED_ON = "passed on"
"""Strategy of a mask that the kernel gets unchanged."""
AS_BOOLEANS = "as booleans"
"""Strategy: a float mask that only hides, converted to bool for kernels that take boolean masks only."""
ALL = slice(None)


class SubCall(NamedTuple):
    """Computes the rows `rows` of the samples `samples` of the output, with these keys and this mask."""

    samples: slice
    rows: slice
    keys: torch.Tensor | slice | None
    """A slice, indices to gather, or None: no key is visible and the output is zero."""
    mask: torch.Tensor | None = None
    """The remaining mask, four-dimensional, cut to the sub-call."""
    is_causal: bool = False
    memo: dict[object, object] | None = None
    """Cache of kernels for values derived from `mask`; lives as long as the plan."""
    runs: tuple[tuple[int, int], ...] | None = None
    """Of indices to gather: the runs of consecutive keys, first and one past the last, if there are at most two."""


@dataclass(frozen=True)
class MaskPlan:
    """The sub-calls of calls with one mask."""

    strategy: str
    """For reports: `none`, `nothing hidden`, `trimmed`, `gathered`, `per sample`, `causal`, `per block`,
    `passed on`; with `as booleans` after it, or alone, from `booleans`."""
    sub_calls: tuple[SubCall, ...]
    facts: tuple[object, ...] = field(default=())
    """Hashable key: equal for masks whose sub-calls have equal shapes."""
    pattern: str = ""
    """Name of a recognised pattern, such as `sliding window` or `causal, bottom right`; else empty."""

    only_hides: bool = False
    """The remaining mask is a float mask that only hides keys; its rows without keys are all -inf."""

    @cached_property
    def booleans(self) -> MaskPlan:
        """The same plan with boolean masks; made once."""
        if not self.only_hides:
            raise ValueError(f"the plan {self.strategy!r} has a mask that does more than hide, or none")
        parts = tuple(
            part if part.mask is None else part._replace(mask=visible_keys(part.mask), memo={})
            for part in self.sub_calls
        )
        before = "" if self.strategy == PASSED_ON else f"{self.strategy}, "
        return MaskPlan(before + AS_BOOLEANS, parts, (AS_BOOLEANS, *self.facts), self.pattern)

    def calls(self, call: AttentionCall) -> list[AttentionCall | None]:
        """The call of each sub-call; None where the output is zero. Tensors are views, except gathered keys."""
        return [None if part.keys is None else call_of(part, call) for part in self.sub_calls]

    def empty_output(self, call: AttentionCall) -> torch.Tensor | None:
        """Zeros for the outputs of the sub-calls, (batch, num_heads, q_len, v_head_dim); None for a single sub-call."""
        if len(self.sub_calls) == 1 and self.sub_calls[0].keys is not None:
            return None
        batch, heads, q_len, _ = call.query.shape
        whole: torch.Tensor = call.query.new_zeros(batch, q_len, heads, call.value.shape[3])
        return whole.transpose(1, 2)  # BSHD in memory, as models reshape it


def write_part(output: torch.Tensor, part: SubCall, whole: torch.Tensor | None) -> torch.Tensor:
    """Write the output of one sub-call into `whole` (`MaskPlan.empty_output`), and return it."""
    if whole is None:
        return output
    whole[part.samples, :, part.rows] = output
    return whole


def call_of(part: SubCall, call: AttentionCall) -> AttentionCall:
    """The call of one sub-call with keys: views of the whole call's tensors, except gathered keys.

    `owned` is False: the caller sets it where no later sub-call needs the tensors.

    Raises:
        ValueError: the sub-call has no keys; or the whole call is causal, which depends on positions in the whole.
    """
    if part.keys is None:
        raise ValueError("this part sees no key")
    if call.is_causal:
        raise ValueError("a causal call is not split")
    query, key, value = call.query, call.key, call.value
    if part.samples != ALL:
        query, key, value = query[part.samples], key[part.samples], value[part.samples]
    if part.rows != ALL:
        query = query[:, :, part.rows]
    if isinstance(part.keys, slice):
        if part.keys != ALL:
            key, value = key[:, :, part.keys], value[:, :, part.keys]
    else:
        key, value = key.index_select(2, part.keys), value.index_select(2, part.keys)
    mask = part.mask if part.mask is None else for_kernels(part.mask, query.dtype)
    return call.changed(
        query=query,
        key=key,
        value=value,
        attn_mask=mask,
        is_causal=part.is_causal,
        memo=part.memo,
        owned=False,
    )


def passed_on(mask: torch.Tensor | None, pattern: str = "", *, only_hides: bool = False) -> MaskPlan:
    """The plan that passes the mask on unchanged."""
    return plan_of(PASSED_ON if mask is not None else "none", [SubCall(ALL, ALL, ALL, mask)], pattern, only_hides)


def plan_of(strategy: str, parts: list[SubCall], pattern: str = "", only_hides: bool = False) -> MaskPlan:
    """A plan of these sub-calls, with its facts."""
    facts = tuple(
        (
            part.samples.start,
            (part.rows.start, part.rows.stop),
            _count(part.keys),
            part.runs,
            None if part.mask is None else (mask_kind(part.mask), part.mask.shape, part.mask.dtype),
            part.is_causal,
        )
        for part in parts
    )
    remembering = tuple(part if part.mask is None else part._replace(memo={}) for part in parts)
    return MaskPlan(strategy, remembering, (strategy, pattern, only_hides, *facts), pattern, only_hides)


def _count(keys: torch.Tensor | slice | None) -> object:
    if keys is None:
        return 0
    return (keys.start, keys.stop) if isinstance(keys, slice) else len(keys)
