"""What a person asked for: a backend per role, what accuracy is allowed, and what to do when it cannot run.

`parse_config` (in `text.py`) reads every accepted text form into these types. Here is what they mean, and how one
configuration finds its entry for a role, always with the source as text; several at once are in `layers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..kernels import BACKENDS
from ..values.errors import ConfigError
from ..values.options import problems
from ..values.tolerance import ACCURACY
from .foreign_options import FOREIGN_OPTIONS, foreign_problems
from .names import AUTO, canonical

if TYPE_CHECKING:
    from .advice import Advice
    from .recorded import Recorded
    from .schedule import ScheduleEntry

GUARD_MODES = ("off", "watch", "enforce")
PLATFORM_ROUTE = "platform route"
"""The source of a choice that nobody made."""
RECOMMENDED = "recommended for "
"""How the source of a choice begins that a precaution made."""

LONGEST_ROLE = 200
"""Characters of a role's name; the longest of ours has 30."""

CATEGORY_PARENT: Mapping[str, str] = MappingProxyType({"joint": "self"})
"""Joint attention over text and picture falls in category `self` where nothing is said about `joint`.

Not where `AttentionConfig.joint_is_self` is false, as in text: the systems whose configurations are pasted have
`joint` as a role of its own.
"""


def frozen(options: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Options as a hashable key."""
    return tuple(sorted((name, repr(value)) for name, value in options.items())) if options else ()


@dataclass(frozen=True)
class AttentionSpec:
    """One backend with its options. The name is any accepted spelling and is stored as the canonical id."""

    backend: str = AUTO
    extra: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.backend, str):
            raise ConfigError(f"backend must be a name, not {type(self.backend).__name__}: {self.backend!r}")
        object.__setattr__(self, "backend", canonical(self.backend))
        if not isinstance(self.extra, Mapping):
            raise ConfigError(f"extra must be a mapping, not {type(self.extra).__name__}: {self.extra!r}")
        object.__setattr__(self, "extra", MappingProxyType(deepcopy(dict(self.extra))))
        if self.extra:
            self._check_extra()

    def _check_extra(self) -> None:
        backend = BACKENDS.get(self.backend)
        if backend is None:
            raise ConfigError(f"extra: {self.backend} takes no options, it chooses; name a backend to set its options")
        declared = {option.name for option in backend.options}
        foreign = [name for name in self.extra if name in FOREIGN_OPTIONS and name not in declared]
        wrong = problems(backend.options, {name: self.extra[name] for name in self.extra if name not in foreign})
        # A planned backend falls back, and so do its options.
        wrong += foreign_problems(foreign) if backend.built else []
        if wrong:
            raise ConfigError(f"extra of {self.backend}: {'; '.join(wrong)}")
        conflicts = backend.option_conflicts(self.extra)
        if conflicts:
            raise ConfigError(f"extra of {self.backend}: {'; '.join(conflicts)}")

    def __hash__(self) -> int:
        return hash((self.backend, frozen(self.extra)))

    @property
    def is_auto(self) -> bool:
        """True when this entry says nothing: the next source decides."""
        return self.backend == AUTO


@dataclass(frozen=True)
class AttentionConfig:
    """Default and per-role specs. A role is a dotted string such as `self`, `cross` or `ltx2.audio_to_video`.

    A setting that is None was not said here: the next configuration's counts, and at the end `DEFAULT_SETTINGS`.
    """

    default: AttentionSpec = field(default_factory=AttentionSpec)
    per_role: Mapping[str, AttentionSpec] = field(default_factory=dict)
    """Entries that say `auto` say nothing, and are left out."""
    accuracy: str | None = None
    """The least exact class that `auto` may pick: one of `tolerance.ACCURACY`, each including those before it."""
    strict: bool | None = None
    guard: str | None = None
    source: str = "config"
    """Where this came from, for messages: a node, a file, an environment variable."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the person should know about how it was read: names that mean something else here, parts without effect."""
    schedule: tuple[ScheduleEntry, ...] = ()
    """Windows of the run with a backend of their own, above the default and the roles; a later one wins."""
    recommended: tuple[Advice, ...] = ()
    """What is recommended for this model family and was switched on: above every default, below all else."""
    joint_is_self: bool = True
    """The entry for `self` covers `joint` too. Text says so itself where it means that (`mapping.py`)."""
    record: Recorded | None = None
    """A run to repeat: below the roles and the schedule, above what is recommended and the default."""

    def __post_init__(self) -> None:
        if self.accuracy is not None and self.accuracy not in ACCURACY:
            raise ConfigError(f"accuracy {self.accuracy!r} is not one of {', '.join(ACCURACY)}")
        if self.guard is not None and self.guard not in GUARD_MODES:
            raise ConfigError(f"guard {self.guard!r} is not one of {', '.join(GUARD_MODES)}")
        if self.strict is not None and not isinstance(self.strict, bool):
            raise ConfigError(f"strict must be true or false, not {self.strict!r}")
        if not isinstance(self.joint_is_self, bool):
            raise ConfigError(f"joint_is_self must be true or false, not {self.joint_is_self!r}")
        said = {role: spec for role, spec in self.per_role.items() if not spec.is_auto}
        object.__setattr__(self, "per_role", MappingProxyType(said))
        object.__setattr__(self, "schedule", tuple(entry for entry in self.schedule if not entry.spec.is_auto))
        if not self.names_self:
            object.__setattr__(self, "joint_is_self", True)  # it says nothing then

    def __hash__(self) -> int:
        per_role = tuple(sorted(self.per_role.items(), key=lambda item: item[0]))
        settings = (self.accuracy, self.strict, self.guard)
        return hash((self.default, per_role, settings, self.source, self.schedule, self.recommended, self.record))

    @property
    def names_self(self) -> bool:
        """True when an entry is for `self`, so that `joint_is_self` matters."""
        return "self" in self.per_role or any(entry.role == "self" for entry in self.schedule)

    def parent_of(self, category: str) -> str | None:
        """The category that counts where nothing is said about `category`."""
        parent = CATEGORY_PARENT.get(category)
        return None if parent == "self" and not self.joint_is_self else parent

    def of_role(self, role: str, category: str) -> tuple[AttentionSpec, str] | None:
        """The entry for a role, or for what it falls back to, and its source as text; None where neither has one."""
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
