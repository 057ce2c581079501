"""Resolves several configurations, highest first, to settings for all roles and to a `Choice` for one.

Layers are the nodes on a model, then the environment; or the `with` blocks around a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..kernels import BACKENDS
from . import CATEGORY_PARENT, PLATFORM_ROUTE, Advice, AttentionConfig, AttentionSpec
from .names import AUTO, AUTOTUNE

if TYPE_CHECKING:
    from .recorded import Recorded


def joint_note(layers: tuple[AttentionConfig, ...], role: str, category: str) -> str | None:
    """The note where an entry for `self` from text does not cover joint attention, which other systems separate."""
    for layer in layers:
        spec = layer.per_role.get("self")
        if layer.of_role(role, category) is not None:
            return None
        if spec is not None and layer.parent_of(category) is None and CATEGORY_PARENT.get(category) == "self":
            return (
                f"{layer.source}.per_role['self'] ({spec.backend}) does not cover role {role!r}: {category} is a "
                f"role of its own in the systems that configurations come from; joint_is_self: true makes self "
                f"cover it, per_role.{category} names its backend"
            )
        if not layer.default.is_auto:
            return None
    return None


class Settings(NamedTuple):
    """Settings for every role of a run."""

    accuracy: str
    strict: bool
    guard: str


DEFAULT_SETTINGS = Settings(accuracy="exact", strict=False, guard="watch")


def settings_of(layers: tuple[AttentionConfig, ...]) -> Settings:
    """Each setting from the highest configuration that sets it, else from `DEFAULT_SETTINGS`."""

    def highest(name: str) -> object:
        values = (getattr(layer, name) for layer in layers)
        return next((value for value in values if value is not None), getattr(DEFAULT_SETTINGS, name))

    return Settings(*map(highest, Settings._fields))  # type: ignore[arg-type]  # checked where each was read


def cards_of(layers: tuple[AttentionConfig, ...]) -> tuple[str, ...]:
    """The devices over which heads are divided; empty: one device."""
    return next((layer.cards for layer in layers if layer.cards is not None), ())


def record_of(layers: tuple[AttentionConfig, ...]) -> Recorded | None:
    """The record to repeat; None without one."""
    return next((layer.record for layer in layers if layer.record is not None), None)


def default_of(layers: tuple[AttentionConfig, ...]) -> str | None:
    """The default backend; None: the platform's priorities decide."""
    return next((layer.default.backend for layer in layers if not layer.default.is_auto), None)


def advisories_of(layers: tuple[AttentionConfig, ...]) -> tuple[Advice, ...]:
    """Advisories that were switched on and apply with the resolved default."""
    if not any(layer.recommended for layer in layers):
        return ()
    asked, accuracy = default_of(layers), settings_of(layers).accuracy
    return tuple(advisory for layer in layers for advisory in layer.recommended if advisory.applies_to(asked, accuracy))


@dataclass(frozen=True)
class Choice:
    """What was asked for one role: a canonical id, or None where the platform's priorities decide."""

    asked: str | None
    source: str
    extra: Mapping[str, object] = field(default_factory=dict)
    accuracy: str | None = None
    """The least exact class allowed for it; None: the run's."""
    from_default: bool = field(default=False, compare=False)
    """Whether it is a default: no role entry and no schedule window applied."""
    for_all_roles: bool = field(default=False, compare=False)
    """Whether nothing named the role: a default, or a schedule window without one."""
    record: Recorded | None = None
    """If set, overrides the fields above for every call found in it (`observe/replay/replay.py`)."""

    @property
    def no_backend_named(self) -> bool:
        """Whether no backend or accuracy was named, so that a checkpoint's preference applies."""
        return self.asked in (None, AUTOTUNE) and self.accuracy is None


def resolve(
    layers: tuple[AttentionConfig, ...],
    role: str,
    category: str,
    scheduled: Callable[[AttentionConfig], tuple[AttentionSpec, str] | None] | None = None,
) -> Choice:
    """The choice of the highest configuration with an entry for the role, a schedule window or a default.

    `scheduled` returns the (spec, source) of a configuration's active schedule window, which beats its roles.
    """
    record = None
    for layer in layers:
        entry = (scheduled(layer) if scheduled is not None else None) or layer.of_role(role, category)
        if entry is not None:
            spec, source = entry
            return Choice(spec.backend, source, spec.extra, record=record)
        record, spec = record or layer.record, layer.default
        if spec.backend != AUTO:
            source = f"{layer.source}.default"
            return Choice(spec.backend, source, spec.extra, from_default=True, for_all_roles=True, record=record)
    return Choice(None, PLATFORM_ROUTE, from_default=True, record=record)


def _specs(layers: tuple[AttentionConfig, ...]) -> Iterator[AttentionSpec]:
    for layer in layers:
        yield layer.default
        yield from layer.per_role.values()
        yield from (entry.spec for entry in layer.schedule)


def asks_for_autotune(layers: tuple[AttentionConfig, ...]) -> bool:
    """Whether any entry is `autotune`."""
    return any(spec.backend == AUTOTUNE for spec in _specs(layers))


def named_backends(layers: tuple[AttentionConfig, ...]) -> Iterator[str]:
    """The backends of all entries, `auto` and `autotune` among them."""
    return (spec.backend for spec in _specs(layers))


def names_backends(layers: tuple[AttentionConfig, ...]) -> bool:
    """Whether any entry names a backend, other than `auto` and `autotune`."""
    return any(spec.backend not in (AUTO, AUTOTUNE) for spec in _specs(layers))


def asks_for_sparse(layers: tuple[AttentionConfig, ...]) -> bool:
    """Whether a sparse backend may run: one is named, or in a record, or any is allowed."""
    record = record_of(layers)
    named = {*named_backends(layers), *(record.backends() if record is not None else ())}
    return settings_of(layers).accuracy == "sparse" or any(name in BACKENDS and BACKENDS[name].sparse for name in named)
