"""`Limits`: the requests that a kernel accepts, as rules that refuse with a reason and describe themselves.

A rule of a single kernel is defined in its file, as a frozen dataclass derived from `Rule`. The support table is
generated from `Limits.described`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from typing import ClassVar, TypeVar

from .reasons import Reason
from .request import AttentionRequest

HALF = ("float16", "bfloat16")
FLOATING = ("float16", "bfloat16", "float32", "float64")
ANY_MASK = ("none", "key_padding", "bool", "bias")

DTYPES, HEAD_DIM, MASKS, GROUPED, CAUSAL, SCALE, FURTHER = COLUMNS = (
    *("dtypes", "head_dim", "masks", "GQA", "causal", "scale"),
    "further limits",
)
"""The columns of the support table that rules fill."""

SHORT: Mapping[str, str] = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


def _sizes(request: AttentionRequest) -> tuple[int, int]:
    """The head sizes of keys and of values."""
    return request.head_dim, request.v_head_dim or request.head_dim


class Rule:
    """One requirement on a request. Subclasses are frozen dataclasses."""

    column: ClassVar[str] = FURTHER
    """Its column of the support table."""
    order: ClassVar[int] = 100
    """Its position in lists of reasons and in its column."""

    def reason(self, request: AttentionRequest) -> Reason | None:
        """Why `request` breaks this rule, with the value and the limit; None if it is satisfied."""
        raise NotImplementedError

    def describe(self) -> str:
        """Text for the support table; may be empty."""
        raise NotImplementedError


@dataclass(frozen=True)
class Dtypes(Rule):
    """Allowed dtypes of query, key and value."""

    names: tuple[str, ...] = HALF

    column = DTYPES
    order = 0

    def reason(self, request: AttentionRequest) -> Reason | None:
        return None if request.dtype in self.names else Reason("dtype", dtype=request.dtype, taken=self.names)

    def describe(self) -> str:
        return ", ".join(SHORT.get(dtype, dtype) for dtype in self.names)


@dataclass(frozen=True)
class HeadDim(Rule):
    """Bounds of head_dim; `max` None: unlimited."""

    max: int | None = None
    min: int = 1

    column = HEAD_DIM
    order = 11

    def reason(self, request: AttentionRequest) -> Reason | None:
        sizes = _sizes(request)
        if self.max is not None and max(sizes) > self.max:
            return Reason("head_dim.max", head_dim=max(sizes), max=self.max)
        if min(sizes) < self.min:
            return Reason("head_dim.min", head_dim=min(sizes), min=self.min)
        return None

    def describe(self) -> str:
        low = f"from {self.min}" if self.min > 1 else ""
        high = f"to {self.max}" if self.max else ""
        return f"{low} {high}".strip() or "any"


@dataclass(frozen=True)
class HeadDimIn(Rule):
    """Allowed head sizes of query and key."""

    sizes: tuple[int, ...]

    column = HEAD_DIM
    order = 10

    def reason(self, request: AttentionRequest) -> Reason | None:
        return (
            None
            if request.head_dim in self.sizes
            else Reason("head_dim.in", head_dim=request.head_dim, taken=self.sizes)
        )

    def describe(self) -> str:
        return ", ".join(map(str, self.sizes))


@dataclass(frozen=True)
class HeadDimMultiple(Rule):
    """Head sizes must be a multiple of `of`, in some dtypes or in all."""

    of: int
    dtypes: tuple[str, ...] = ()
    """Empty: all."""

    column = HEAD_DIM
    order = 12

    def reason(self, request: AttentionRequest) -> Reason | None:
        if self.dtypes and request.dtype not in self.dtypes:
            return None
        for size in _sizes(request):
            if size % self.of:
                if not self.dtypes:
                    return Reason("head_dim.multiple", head_dim=size, of=self.of)
                return Reason("head_dim.multiple.dtype", head_dim=size, of=self.of, dtype=request.dtype)
        return None

    def describe(self) -> str:
        where = f" in {' and '.join(SHORT[dtype] for dtype in self.dtypes)}" if self.dtypes else ""
        return f"multiples of {self.of}{where}"


@dataclass(frozen=True)
class ValueHeadDim(Rule):
    """Whether the head size of values may differ from that of keys."""

    may_differ: bool = False

    order = 20

    def reason(self, request: AttentionRequest) -> Reason | None:
        values = request.v_head_dim or request.head_dim
        if self.may_differ or values == request.head_dim:
            return None
        return Reason("head_dim.values", values=values, keys=request.head_dim)

    def describe(self) -> str:
        return "values of another head_dim too" if self.may_differ else ""


@dataclass(frozen=True)
class Masks(Rule):
    """Allowed kinds of masks (`request.MASK_KINDS`)."""

    kinds: tuple[str, ...] = ANY_MASK

    column = MASKS
    order = 30

    def reason(self, request: AttentionRequest) -> Reason | None:
        return None if request.mask in self.kinds else Reason("mask", mask=request.mask, taken=self.kinds)

    def describe(self) -> str:
        if set(self.kinds) == set(ANY_MASK):
            return "all"
        return ", ".join(mask for mask in self.kinds if mask != "none") or "no"


NO_MASK = Masks(("none",))


@dataclass(frozen=True)
class GroupedHeads(Rule):
    """Whether several query heads may share a key head."""

    taken: bool = True

    column = GROUPED
    order = 31

    def reason(self, request: AttentionRequest) -> Reason | None:
        taken = self.taken or not request.grouped
        return None if taken else Reason("grouped", num_heads=request.num_heads, num_kv_heads=request.num_kv_heads)

    def describe(self) -> str:
        return "yes" if self.taken else "no"


@dataclass(frozen=True)
class Causal(Rule):
    """`is_causal`: `no`, for q_len == kv_len (`equal`), or for `any` lengths, aligned top-left as in SDPA."""

    lengths: str = "equal"

    column = CAUSAL
    order = 32

    @property
    def taken(self) -> bool:
        return self.lengths != "no"

    def reason(self, request: AttentionRequest) -> Reason | None:
        if not request.is_causal or self.lengths == "any":
            return None
        if not self.taken:
            return Reason("causal")
        if request.q_len == request.kv_len:
            return None
        return Reason("causal.lengths", q_len=request.q_len, kv_len=request.kv_len)

    def describe(self) -> str:
        return f"{self.lengths} lengths" if self.taken else "no"


@dataclass(frozen=True)
class MaskWithCausal(Rule):
    """Whether a call may have a mask and `is_causal`."""

    taken: bool = False

    order = 33

    def reason(self, request: AttentionRequest) -> Reason | None:
        both = request.is_causal and request.mask != "none"
        return Reason("causal.mask") if both and not self.taken else None

    def describe(self) -> str:
        return "a mask and causal together" if self.taken else ""


@dataclass(frozen=True)
class Scale(Rule):
    """Whether the kernel has a scale argument; if not, only head_dim ** -0.5 is allowed."""

    taken: bool = True

    column = SCALE
    order = 34

    def reason(self, request: AttentionRequest) -> Reason | None:
        if self.taken or request.scale is None or isclose(request.scale, request.head_dim**-0.5, rel_tol=1e-6):
            return None
        return Reason("scale", scale=request.scale)

    def describe(self) -> str:
        return "yes" if self.taken else "no"


@dataclass(frozen=True)
class KeyLength(Rule):
    """Bounds of kv_len; `max` None: unlimited."""

    max: int | None = None
    min: int = 1

    order = 40

    def reason(self, request: AttentionRequest) -> Reason | None:
        if request.kv_len < self.min:
            return Reason("kv_len.min", kv_len=request.kv_len, min=self.min)
        if self.max is not None and request.kv_len > self.max:
            return Reason("kv_len.max", kv_len=request.kv_len, max=self.max)
        return None

    def describe(self) -> str:
        parts = [f"kv_len from {self.min}"] if self.min > 1 else []
        parts += [f"kv_len to {self.max}"] if self.max is not None else []
        return "; ".join(parts)


@dataclass(frozen=True)
class Batch(Rule):
    """Largest batch."""

    max: int

    order = 50

    def reason(self, request: AttentionRequest) -> Reason | None:
        return None if request.batch <= self.max else Reason("batch", batch=request.batch, max=self.max)

    def describe(self) -> str:
        return f"batch to {self.max}"


@dataclass(frozen=True)
class Heads(Rule):
    """Largest num_heads."""

    max: int

    order = 51

    def reason(self, request: AttentionRequest) -> Reason | None:
        return None if request.num_heads <= self.max else Reason("num_heads", num_heads=request.num_heads, max=self.max)

    def describe(self) -> str:
        return f"heads to {self.max}"


DEFAULT_RULES: tuple[Rule, ...] = (
    Dtypes(),
    ValueHeadDim(),
    Masks(),
    GroupedHeads(),
    Causal(),
    MaskWithCausal(),
    Scale(),
    KeyLength(),
)
"""Default rules, which other rules of the same class replace."""

Kind = TypeVar("Kind", bound=Rule)


@dataclass(frozen=True, init=False)
class Limits:
    """The rules of one kernel; missing ones are those of `DEFAULT_RULES`: `Limits(HeadDim(max=128), NO_MASK)`."""

    rules: tuple[Rule, ...]

    def __init__(self, *rules: Rule) -> None:
        kinds = {type(rule) for rule in rules}
        every = [*rules, *(rule for rule in DEFAULT_RULES if type(rule) not in kinds)]
        object.__setattr__(self, "rules", tuple(sorted(every, key=lambda rule: rule.order)))

    def reasons(self, request: AttentionRequest) -> list[Reason]:
        """The reasons against `request`; empty: accepted."""
        reasons = []
        for rule in self.rules:
            reason = rule.reason(request)
            if reason is not None:
                reasons.append(reason)
        return reasons

    def but(self, *rules: Rule) -> Limits:
        """A copy in which these rules replace those of the same class."""
        kinds = {type(rule) for rule in rules}
        return Limits(*(rule for rule in self.rules if type(rule) not in kinds), *rules)

    def without(self, *kinds: type[Rule]) -> Limits:
        """A copy with the rules of `DEFAULT_RULES` for these classes."""
        return Limits(*(rule for rule in self.rules if type(rule) not in kinds))

    def get(self, kind: type[Kind]) -> Kind | None:
        """The rule of a class; None without one."""
        return next((rule for rule in self.rules if isinstance(rule, kind)), None)

    def __getitem__(self, kind: type[Kind]) -> Kind:
        """The rule of a class in `DEFAULT_RULES`, which all limits have.

        Raises:
            KeyError: no rule of this class.
        """
        rule = self.get(kind)
        if rule is None:
            raise KeyError(kind.__name__)
        return rule

    def described(self) -> dict[str, str]:
        """Column of the support table -> text of its rules."""
        texts: dict[str, list[str]] = {column: [] for column in COLUMNS}
        listed = self.get(HeadDimIn) is not None  # the list replaces the bounds in the text; values keep them too
        for rule in self.rules:
            if not (listed and isinstance(rule, HeadDim)):
                texts[rule.column] += filter(None, [rule.describe()])
        if not texts[HEAD_DIM]:
            texts[HEAD_DIM] = [HeadDim().describe()]
        return {column: ("; " if column == FURTHER else ", ").join(described) for column, described in texts.items()}
