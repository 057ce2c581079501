"""The configuration: a backend per role, the allowed accuracy, strictness, schedule and guard.

`parse_config` (`text.py`) reads every accepted text form into these types. A configuration finds its entry for a role,
with the source as text; `layers.py` resolves several configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from ..kernels import BACKENDS
from ..values.errors import ConfigError
from ..values.options import problems
from ..values.tolerance import ACCURACY
from .card_names import card_names
from .foreign_options import FOREIGN_OPTIONS, foreign_problems
from .names import AUTO, canonical, options_of

if TYPE_CHECKING:
    from .recorded import Recorded
    from .schedule import ScheduleEntry

GUARD_MODES = ("off", "watch", "enforce")
PLATFORM_ROUTE = "platform route"
"""The source of a choice that no configuration made."""
RECOMMENDED = "recommended for "
"""Prefix of the source of a choice that an advisory made."""

LONGEST_ROLE = 200
"""Characters of a role's name; the longest known one has 30."""

CATEGORY_PARENT: Mapping[str, str] = MappingProxyType({"joint": "self"})
"""Category -> the category whose entry it uses if it has none: joint attention over text and picture uses `self`.

Not if `AttentionConfig.joint_is_self` is false, as for text: in the systems that configurations come from, `joint` is a
separate role.
"""


def frozen(options: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Options as a hashable key."""
    return tuple(sorted((name, repr(value)) for name, value in options.items())) if options else ()


@dataclass(frozen=True)
class AttentionSpec:
    """One backend with its options. `backend` accepts every spelling and is stored as the canonical id.

    Options that the spelling includes (KJNodes' `sageattn_qk_int8_pv_fp8_cuda++`) are added; `extra` has precedence.

    Raises:
        UnknownBackendError: no backend has the name.
        ConfigError: an option is unknown or its value is wrong.
    """

    backend: str = AUTO
    extra: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.backend, str):
            raise ConfigError(f"backend must be a name, not {type(self.backend).__name__}: {self.backend!r}")
        if not isinstance(self.extra, Mapping):
            raise ConfigError(f"extra must be a mapping, not {type(self.extra).__name__}: {self.extra!r}")
        extra = {**options_of(self.backend), **deepcopy(dict(self.extra))}
        object.__setattr__(self, "backend", canonical(self.backend))
        object.__setattr__(self, "extra", MappingProxyType(extra))
        if self.extra:
            self._check_extra()

    def _check_extra(self) -> None:
        backend = BACKENDS.get(self.backend)
        if backend is None:
            raise ConfigError(f"extra: {self.backend} takes no options, it chooses; name a backend to set its options")
        declared = {option.name for option in backend.options}
        foreign = [name for name in self.extra if name in FOREIGN_OPTIONS and name not in declared]
        wrong = problems(backend.options, {name: self.extra[name] for name in self.extra if name not in foreign})
        wrong += foreign_problems(foreign)
        if wrong:
            raise ConfigError(f"extra of {self.backend}: {'; '.join(wrong)}")
        conflicts = backend.option_conflicts(self.extra)
        if conflicts:
            raise ConfigError(f"extra of {self.backend}: {'; '.join(conflicts)}")

    def __hash__(self) -> int:
        return hash((self.backend, frozen(self.extra)))

    @property
    def is_auto(self) -> bool:
        """Whether the backend is `auto`: the next configuration decides."""
        return self.backend == AUTO


class Advice(Protocol):
    """Calls of a model family that an exact kernel runs, if a person switched that on."""

    @property
    def where(self) -> ScheduleEntry:
        """The calls, as a schedule entry."""

    @property
    def source_of_choice(self) -> str:
        """The source of the choice in a run report."""

    def applies_to(self, asked: str | None, accuracy: str) -> bool:
        """Whether it applies with the default backend `asked` (None: the platform's priorities) and this `accuracy`."""


@dataclass(frozen=True)
class AttentionConfig:
    """Default and per-role specs. A role is a dotted string such as `self`, `cross` or `ltx2.audio_to_video`.

    A setting that is None is unset: the next configuration's applies, and at the end `DEFAULT_SETTINGS`.
    """

    default: AttentionSpec = field(default_factory=AttentionSpec)
    per_role: Mapping[str, AttentionSpec] = field(default_factory=dict)
    """Role -> spec; entries for `auto` are dropped."""
    accuracy: str | None = None
    """The least exact class that `auto` may pick, one of `tolerance.ACCURACY`; it includes those before it."""
    strict: bool | None = None
    guard: str | None = None
    source: str = "config"
    """Origin for messages: a node, a file, an environment variable."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Notes of the reader: names that mean something else here, parts without effect."""
    schedule: tuple[ScheduleEntry, ...] = ()
    """Windows of the run with another backend, above the roles and the default; a later one wins."""
    recommended: tuple[Advice, ...] = ()
    """Advisories for this model family that were switched on: above every default, below all else."""
    joint_is_self: bool = True
    """Whether the entry for `self` covers `joint` too; false by default for text (`mapping.py`)."""
    record: Recorded | None = None
    """A run to repeat: below roles and schedule, above advisories and default."""
    cards: tuple[str, ...] | None = None
    """The devices over which heads are divided, or `("all",)`; accepts what `card_names` reads. None: unset."""

    def __post_init__(self) -> None:
        if self.accuracy is not None and self.accuracy not in ACCURACY:
            raise ConfigError(f"accuracy {self.accuracy!r} is not one of {', '.join(ACCURACY)}")
        if self.guard is not None and self.guard not in GUARD_MODES:
            raise ConfigError(f"guard {self.guard!r} is not one of {', '.join(GUARD_MODES)}")
        if self.strict is not None and not isinstance(self.strict, bool):
            raise ConfigError(f"strict must be true or false, not {self.strict!r}")
        if not isinstance(self.joint_is_self, bool):
            raise ConfigError(f"joint_is_self must be true or false, not {self.joint_is_self!r}")
        if self.cards is not None:
            object.__setattr__(self, "cards", card_names(self.cards))
        said = {role: spec for role, spec in self.per_role.items() if not spec.is_auto}
        object.__setattr__(self, "per_role", MappingProxyType(said))
        object.__setattr__(self, "schedule", tuple(entry for entry in self.schedule if not entry.spec.is_auto))
        if not self.names_self:
            object.__setattr__(
                self, "joint_is_self", True
            )  # irrelevant without an entry for self; normalise for equality

    def __hash__(self) -> int:
        per_role = tuple(sorted(self.per_role.items(), key=lambda item: item[0]))
        settings = (self.accuracy, self.strict, self.guard, self.cards)
        return hash((self.default, per_role, settings, self.source, self.schedule, self.recommended, self.record))

    @property
    def names_self(self) -> bool:
        """Whether an entry is for `self`, so that `joint_is_self` matters."""
        return "self" in self.per_role or any(entry.role == "self" for entry in self.schedule)

    def parent_of(self, category: str) -> str | None:
        """The category whose entry is used where `category` has none."""
        parent = CATEGORY_PARENT.get(category)
        return None if parent == "self" and not self.joint_is_self else parent

    def of_role(self, role: str, category: str) -> tuple[AttentionSpec, str] | None:
        """(spec, source) of the role, else of its category, else of the category's parent; None without any."""
        if not self.per_role:
            return None
        if role in self.per_role:
            return self.per_role[role], f"{self.source}.per_role[{role!r}]"
        parent: str | None = category
        while parent:
            if parent in self.per_role:
                return self.per_role[parent], f"{self.source}.per_role[{parent!r}] (category of {role!r})"
            parent = self.parent_of(parent)
        return None
