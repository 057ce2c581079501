"""Several configurations at once, highest first: what they come to, for all roles and for one.

Such layers are what the nodes on a model say, then what the environment says; or the `with` blocks around a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from . import CATEGORY_PARENT, PLATFORM_ROUTE, AttentionConfig, AttentionSpec
from .names import AUTO, AUTOTUNE

if TYPE_CHECKING:
    from .advice import Advice
    from .recorded import Recorded


def joint_note(layers: tuple[AttentionConfig, ...], role: str, category: str) -> str | None:
    """What to say where an entry for `self` would have decided for joint attention, had it not come from text."""
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
    """What holds for every role of a run."""

    accuracy: str
    strict: bool
    guard: str


DEFAULT_SETTINGS = Settings(accuracy="exact", strict=False, guard="watch")


def settings_of(layers: tuple[AttentionConfig, ...]) -> Settings:
    """Each setting as the highest configuration that says anything about it has it."""

    def said(name: str) -> object:
        values = (getattr(layer, name) for layer in layers)
        return next((value for value in values if value is not None), getattr(DEFAULT_SETTINGS, name))

    return Settings(*map(said, Settings._fields))  # type: ignore[arg-type]  # checked where each was read


def record_of(layers: tuple[AttentionConfig, ...]) -> Recorded | None:
    """The run to repeat; None where no configuration has one."""
    return next((layer.record for layer in layers if layer.record is not None), None)


def default_of(layers: tuple[AttentionConfig, ...]) -> str | None:
    """The backend that holds where nothing is said of a role; None where the platform's route decides."""
    return next((layer.default.backend for layer in layers if not layer.default.is_auto), None)


def advisories_of(layers: tuple[AttentionConfig, ...]) -> tuple[Advice, ...]:
    """What was switched on of what is recommended, and matters with the default that holds."""
    if not any(layer.recommended for layer in layers):
        return ()
    asked, accuracy = default_of(layers), settings_of(layers).accuracy
    return tuple(one for layer in layers for one in layer.recommended if one.applies_to(asked, accuracy))


@dataclass(frozen=True)
class Choice:
    """What was asked for one role: a canonical id, or None where the platform's route decides."""

    asked: str | None
    source: str
    extra: Mapping[str, object] = field(default_factory=dict)
    accuracy: str | None = None
    """The least exact class that the route may take for it; None for what holds for the whole run."""
    from_default: bool = field(default=False, compare=False)
    """True where nothing was said of the role, nor of this place in the run."""
    record: Recorded | None = None
    """Decides instead of all this for calls that it knows (`Session.recorded`): more than the role tells them apart."""

    @property
    def nobody_named_a_backend(self) -> bool:
        """True where nobody named a backend or an accuracy, so that a checkpoint's own preference counts."""
        return self.asked in (None, AUTOTUNE) and self.accuracy is None


def resolve(
    layers: tuple[AttentionConfig, ...],
    role: str,
    category: str,
    scheduled: Callable[[AttentionConfig], tuple[AttentionSpec, str] | None] | None = None,
) -> Choice:
    """Ask each configuration in turn, highest first; the first that says anything about the role decides.

    `scheduled` gives what the schedule of a configuration says at this place of the run, which stands above its roles.
    """
    record = None
    for layer in layers:
        found = (scheduled(layer) if scheduled is not None else None) or layer.of_role(role, category)
        if found is not None:
            spec, source = found
            return Choice(spec.backend, source, spec.extra, record=record)
        record, spec = record or layer.record, layer.default
        if spec.backend != AUTO:
            return Choice(spec.backend, f"{layer.source}.default", spec.extra, from_default=True, record=record)
    return Choice(None, PLATFORM_ROUTE, from_default=True, record=record)


def _specs(layers: tuple[AttentionConfig, ...]) -> Iterator[AttentionSpec]:
    for layer in layers:
        yield layer.default
        yield from layer.per_role.values()
        yield from (entry.spec for entry in layer.schedule)


def asks_for_autotune(layers: tuple[AttentionConfig, ...]) -> bool:
    """Whether anything says `autotune`."""
    return any(spec.backend == AUTOTUNE for spec in _specs(layers))


def names_backends(layers: tuple[AttentionConfig, ...]) -> bool:
    """Whether anything names a backend, and not only a way to choose."""
    return any(spec.backend not in (AUTO, AUTOTUNE) for spec in _specs(layers))
