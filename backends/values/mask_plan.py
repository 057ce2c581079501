"""How the calls with one mask run: in parts, each with the keys that it sees and what is left of the mask.

`mask_plan.inspect` makes such a plan from a mask's values; here is what it means for a call. Under
torch.inference_mode a tensor has no version, so a plan is good for one model call and no longer; who keeps it must keep
the mask too. No kernel gets a call without keys.
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
"""The treatment of a mask that says nothing."""
PASSED_ON = "passed on"
"""The treatment of a mask that is left as it is."""
AS_BOOLEANS = "as booleans"
"""How a mask of numbers that only hides is honoured where a kernel takes booleans alone."""
ALL = slice(None)


class SubCall(NamedTuple):
    """A call that computes a part of the output: `samples` and `rows` of it, with these keys and this mask."""

    samples: slice
    rows: slice
    keys: torch.Tensor | slice | None
    """A slice of the keys, indices of those to gather, or None where no key is visible and the output is zero."""
    mask: torch.Tensor | None = None
    """What is left of the mask, four-dimensional, already cut to the part."""
    is_causal: bool = False
    memo: dict[object, object] | None = None
    """What kernels make of `mask`, for as long as the plan lives."""


@dataclass(frozen=True)
class MaskPlan:
    """How the calls with one mask run."""

    strategy: str
    """For reports: `none`, `nothing hidden`, `trimmed`, `gathered`, `per sample`, `causal`, `per block`,
    `passed on`; with `as booleans` after it, or alone, from `booleans`."""
    sub_calls: tuple[SubCall, ...]
    facts: tuple[object, ...] = field(default=())
    """Equal for masks whose calls have the same shapes: what a decision may be kept under."""
    pattern: str = ""
    """What the mask is, where that is more than the treatment says: `sliding window`, `causal, bottom right`."""

    only_hides: bool = False
    """What is left of the mask is numbers that say no more than booleans could; none of its rows is without keys but
    by -inf."""

    @cached_property
    def booleans(self) -> MaskPlan:
        """The same plan with booleans for such numbers; made when first asked for, and kept with the plan."""
        if not self.only_hides:
            raise ValueError(f"the plan {self.strategy!r} has a mask that does more than hide, or none")
        parts = tuple(
            part if part.mask is None else part._replace(mask=visible_keys(part.mask), memo={})
            for part in self.sub_calls
        )
        before = "" if self.strategy == PASSED_ON else f"{self.strategy}, "
        return MaskPlan(before + AS_BOOLEANS, parts, (AS_BOOLEANS, *self.facts), self.pattern)

    def calls(self, call: AttentionCall) -> list[AttentionCall | None]:
        """The call of each part; None for a part whose output is zero. Views, except for gathered keys."""
        return [None if part.keys is None else call_of(part, call) for part in self.sub_calls]

    def empty_output(self, call: AttentionCall) -> torch.Tensor | None:
        """Zeros that the outputs of the sub-calls are written into; None where the only one gives the whole output."""
        if len(self.sub_calls) == 1 and self.sub_calls[0].keys is not None:
            return None
        batch, heads, q_len, _ = call.query.shape
        whole: torch.Tensor = call.query.new_zeros(batch, q_len, heads, call.value.shape[3])
        return whole.transpose(1, 2)  # as models want it


def write_part(output: torch.Tensor, part: SubCall, whole: torch.Tensor | None) -> torch.Tensor:
    """The whole output with that of one sub-call in it; `whole` is from `MaskPlan.empty_output`."""
    if whole is None:
        return output
    whole[part.samples, :, part.rows] = output
    return whole


def call_of(part: SubCall, call: AttentionCall) -> AttentionCall:
    """The call of a part that sees keys. Views of the whole call's tensors, except for gathered keys.

    Whatever the whole call asks for holds for its part. Its tensors are the part's to give up only where nothing else
    needs them, so whoever knows that sets `owned`.

    Raises:
        ValueError: the part has no keys, and there is nothing to compute; or the whole call is causal, which counts
            its own rows and keys and cannot be had from a part of them.
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
    """The plan that changes nothing; for masks that are not inspected too."""
    return plan_of(PASSED_ON if mask is not None else "none", [SubCall(ALL, ALL, ALL, mask)], pattern, only_hides)


def plan_of(strategy: str, parts: list[SubCall], pattern: str = "", only_hides: bool = False) -> MaskPlan:
    """A plan of these parts, with its facts."""
    facts = tuple(
        (
            part.samples.start,
            (part.rows.start, part.rows.stop),
            _count(part.keys),
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
