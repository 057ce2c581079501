"""Reads a mapping as an `AttentionConfig`: our entries, and those of other systems (`docs/systems.md`).

Every text form becomes a mapping first (`text.py`, `flags.py`). `components.py` reads SGLang's map,
`foreign_entries.py` translates entries that have another form here. The caller's mapping is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..kernels import BACKENDS
from ..values.bounded import nearest, shortened
from ..values.errors import ConfigError
from ..values.fields import Fields
from ..values.plain_data import load_json
from . import LONGEST_ROLE, AttentionConfig, AttentionSpec
from .components import component_entries
from .flags import COMMAND_FLAGS, COMPONENT_FLAG, COMPONENT_NAME, CONFIG_FLAGS, elsewhere_problem, notes_on
from .foreign_entries import translated
from .foreign_options import BESIDE_BACKEND, FOREIGN_OPTIONS, foreign_problems
from .names import UnknownBackendError, canonical, options_of
from .schedule import ScheduleEntry
from .schedule_forms import FOREIGN_SCHEDULE, foreign_schedule, schedule_of
from .systems import entries as entries_of_systems
from .systems import line_of

SETTINGS = ("accuracy", "strict", "guard", "joint_is_self", "cards")
FIELDS = ("default", "backend", "per_role", "schedule", *SETTINGS)
SPEC_FIELDS = ("backend", "extra")
SHORTHANDS = {"backend": "", **entries_of_systems()}
"""Names of the entry for the default backend, and the system of each."""
MOST_BESIDES = 200
"""Most other entries of another system's configuration; vLLM's has about eighty."""
OPTION_FIELDS = ("attention_backend_config", "attn_config")
"""Entries with the options of the named backend, in SGLang and Smart-Diffusion."""


@dataclass
class Reading:
    """State of reading one configuration: its source, its notes."""

    source: str
    component: str = "transformer"
    options_text: Callable[[str, str], dict[str, Any]] | None = None
    """Parses options given as text."""
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        text = shortened(text)
        if text and text not in self.notes:
            self.notes.append(text)


def from_mapping(value: Mapping[Any, Any], reading: Reading) -> AttentionConfig:
    """Read a mapping.

    Raises:
        ConfigError: an entry is not understood.
        UnknownBackendError: a backend's name is unknown or refused.
    """
    source = reading.source
    keys = [str(key).replace("-", "_") for key in value]
    system = "vllm_omni" if any(name in keys for name in CONFIG_FLAGS) else ""
    entries = _entries(value, source)
    entries = translated(entries, source, lambda name, at, of: spec_of(name, at, reading, of), reading.note)
    known = (*FIELDS, *SHORTHANDS, *OPTION_FIELDS, COMPONENT_FLAG, FOREIGN_SCHEDULE)
    unknown = [name for name in entries if name not in known]
    besides = _besides(keys, unknown)
    if besides:
        for note in notes_on(besides):
            reading.note(note)
    if not besides and (problem := elsewhere_problem(unknown)):
        raise ConfigError(f"{source}: {problem}")
    Fields(dict.fromkeys(name for name in unknown if name not in besides), source, ConfigError).only(FIELDS)
    default = _default(entries, reading, system)
    per_role = _roles(Fields(entries.get("per_role") or {}, f"{source}.per_role", ConfigError).data, reading, system)
    if entries.get(COMPONENT_FLAG) is not None:
        default = _with_components(entries, default, per_role, reading)
    for name in OPTION_FIELDS:
        if entries.get(name):
            default = _with_options(name, entries[name], default, per_role, reading)
    schedule = _schedule(entries, reading, system)
    settings = {name: entries[name] for name in SETTINGS if entries.get(name) is not None}
    settings.setdefault("joint_is_self", False)  # a separate role in the systems that configurations come from
    if settings.get("guard") is False:
        settings["guard"] = "off"  # YAML reads a bare `off` as false
    try:
        return AttentionConfig(
            default, per_role, source=source, notes=tuple(reading.notes), schedule=schedule, **settings
        )
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{source}: {error}") from error


def spec_of(value: object, where: str, reading: Reading, system: str = "") -> AttentionSpec:
    """One backend with its options: a name, a mapping, or an AttentionSpec.

    Raises:
        ConfigError, UnknownBackendError: as `from_mapping`, prefixed with `where`.
    """
    if value is None:
        return AttentionSpec()
    if isinstance(value, AttentionSpec):
        return value
    if isinstance(value, str):
        value = {"backend": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a backend's name or a mapping, not {type(value).__name__}: {value!r}")
    Fields({name: value[name] for name in value if name not in BESIDE_BACKEND}, where, ConfigError).only(SPEC_FIELDS)
    name, extra = value.get("backend", "auto"), value.get("extra")
    beside = {option: value[option] for option in BESIDE_BACKEND if value.get(option) is not None}
    if beside and isinstance(extra or {}, Mapping):
        twice = [option for option in beside if option in (extra or {})]
        if twice:
            raise ConfigError(f"{where}: {', '.join(twice)} stands both beside backend and under extra; give one")
        extra = {**(extra or {}), **beside}
    name = "auto" if name is None else name
    try:
        if isinstance(name, str) and isinstance(extra or {}, Mapping):
            extra = {**options_of(name, system), **(extra or {})}
        spec = AttentionSpec(canonical(name, system) if isinstance(name, str) else name, {} if extra is None else extra)
    except UnknownBackendError as error:
        raise type(error)(f"{where}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    reading.note(line_of(name, system) if value.get("backend") is not None else "")
    return spec


def _besides(keys: list[str], unknown: list[str]) -> list[str]:
    """The unknown entries that belong to another system's configuration and are ignored."""
    if not set(keys) & set(COMMAND_FLAGS) or set(keys) & set(FIELDS):
        return []
    if len(unknown) > MOST_BESIDES:
        return []
    near = [name for name in unknown if "att" in name.lower() or nearest(name, FIELDS, cutoff=0.75)]
    return [name for name in unknown if name in keys and name not in near]


def _entries(value: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """Entries by name, with `-` read as `_` and the wrappers of other systems flattened."""
    entries: dict[str, Any] = {}
    for key, entry in value.items():
        name = str(key).replace("-", "_")
        inner: Mapping[Any, Any] = {name: entry}
        if name in (*CONFIG_FLAGS, "args", "infer"):  # the last two: Smart-Diffusion's args.infer.attn_type
            inner = _entries(_mapping(entry, f"{source}.{name}"), f"{source}.{name}")
        elif COMPONENT_NAME.fullmatch(name.partition(".")[0]):
            inner = {COMPONENT_FLAG: {name: entry}}
        _join(entries, inner, source)
    return entries


def _mapping(value: object, where: str) -> Mapping[Any, Any]:
    if isinstance(value, str):
        value = load_json(value, where)
    return Fields(value, where, ConfigError).data


def _join(entries: dict[str, Any], more: Mapping[Any, Any], where: str) -> None:
    """Merge `more` into `entries`, mapping by mapping.

    Raises:
        ConfigError: both have the same entry.
    """
    for key, entry in more.items():
        if key not in entries:
            entries[key] = entry
        elif isinstance(entry, Mapping) and isinstance(entries[key], Mapping):
            entries[key] = dict(entries[key])
            _join(entries[key], entry, f"{where}.{key}")
        else:
            raise ConfigError(f"{where}: {key!r} conflicts with an earlier entry")


def _default(entries: Mapping[str, Any], reading: Reading, system: str) -> AttentionSpec:
    """The default backend, from the only entry that may give it."""
    given = [name for name in SHORTHANDS if entries.get(name) is not None]
    given += ["default"] if entries.get("default") is not None else []
    specs = {}
    for name in given:
        where = f"{reading.source}.{name if SHORTHANDS.get(name) else 'default'}"
        specs[name] = spec_of(entries[name], where, reading, SHORTHANDS.get(name) or system)
    said = [name for name, spec in specs.items() if not spec.is_auto]
    if len(said) > 1:
        raise ConfigError(
            f"{reading.source}: {said[0]!r} is short for 'default.backend'; give one of them, not both "
            f"({', '.join(said)})"
        )
    return specs[said[0]] if said else AttentionSpec()


def _roles(value: Mapping[Any, Any], reading: Reading, system: str, prefix: str = "") -> dict[str, AttentionSpec]:
    """Specs by dotted role; nested mappings (`ltx2: {audio_self: ...}`) are flattened."""
    roles: dict[str, AttentionSpec] = {}
    for key, entry in value.items():
        if not isinstance(key, str) or not key.strip():
            raise ConfigError(f"{reading.source}.per_role[{f'{prefix}{key}'!r}]: a role must be text, not {key!r}")
        role = f"{prefix}{key}"
        if len(role) > LONGEST_ROLE:
            raise ConfigError(f"{reading.source}.per_role[{role!r}]: a role of {len(role)} characters > {LONGEST_ROLE}")
        where = f"{reading.source}.per_role[{role!r}]"
        if isinstance(entry, Mapping) and not set(entry) & {*SPEC_FIELDS, *BESIDE_BACKEND}:
            if not entry:
                raise ConfigError(f"{where}: empty entry")
            specs = _roles(entry, reading, system, f"{role}.")
        else:
            specs = {role: spec_of(entry, where, reading, system)}
        twice = [name for name in specs if name in roles]
        if twice:
            raise ConfigError(f"{reading.source}.per_role[{twice[0]!r}]: given twice")
        roles.update(specs)
    return roles


def _schedule(entries: Mapping[str, Any], reading: Reading, system: str) -> tuple[ScheduleEntry, ...]:
    """The schedule, in our form or vLLM-Omni's."""
    if entries.get(FOREIGN_SCHEDULE) is None:
        where = f"{reading.source}.schedule"
        return schedule_of(entries.get("schedule") or [], where, lambda value, at: spec_of(value, at, reading, system))
    where = f"{reading.source}.{FOREIGN_SCHEDULE}"
    if entries.get("schedule"):
        raise ConfigError(f"{reading.source}: both 'schedule' and {FOREIGN_SCHEDULE!r}; give one of them")

    def profile(value: Mapping[Any, Any], at: str) -> AttentionConfig:
        return from_mapping(value, replace(reading, source=at))  # which has the same notes

    windows, notes = foreign_schedule(entries[FOREIGN_SCHEDULE], where, profile)
    for note in notes:
        reading.note(note)
    return windows


def _with_components(
    entries: Mapping[str, Any], default: AttentionSpec, per_role: dict[str, AttentionSpec], reading: Reading
) -> AttentionSpec:
    """Apply SGLang's component map: roles of a component beat the component, which beats the global backend."""

    def read(value: object, name: str) -> AttentionSpec:
        return spec_of(value, f"{reading.source}.{COMPONENT_FLAG}.{name}", reading, "sglang")

    value = entries[COMPONENT_FLAG]
    if isinstance(value, str):
        text = reading.options_text
        value = text(value, f"{reading.source}.{COMPONENT_FLAG}") if text else {}
        value = {**value.pop(COMPONENT_FLAG, {}), **value}
    own, roles, notes = component_entries(value, reading.component, read, f"{reading.source}.{COMPONENT_FLAG}")
    for note in notes:
        reading.note(note)
    for role, spec in roles.items():
        if per_role.get(role, spec) != spec:
            raise ConfigError(
                f"{reading.source}: role {role!r} is given twice, under per_role and under {COMPONENT_FLAG}"
            )
        per_role[role] = spec
    if own.is_auto:
        return default
    if entries.get("default") is not None and not default.is_auto:
        raise ConfigError(f"{reading.source}: 'default' and {COMPONENT_FLAG}.{reading.component}; give one of them")
    return own


def _with_options(
    name: str, value: Any, default: AttentionSpec, per_role: dict[str, AttentionSpec], reading: Reading
) -> AttentionSpec:
    """Give separate options to every named backend that declares them, else to the default, which refuses them."""
    where = f"{reading.source}.{name}"
    if isinstance(value, str):
        value = reading.options_text(value, where) if reading.options_text else {}
    value = Fields(value, where, ConfigError).data
    names = set(value)

    def takes(spec: AttentionSpec) -> bool:
        backend = BACKENDS.get(spec.backend)
        return backend is not None and names <= {option.name for option in backend.options}

    def given(spec: AttentionSpec) -> AttentionSpec:
        return spec_of({"backend": spec.backend, "extra": {**spec.extra, **value}}, where, reading)

    foreign = [option for option in value if option in FOREIGN_OPTIONS]
    if default.is_auto and foreign and not any(takes(spec) for spec in per_role.values()):
        raise ConfigError(f"{where}: {'; '.join(foreign_problems(foreign))}")
    takers = [role for role, spec in per_role.items() if takes(spec)]
    for role in takers:
        per_role[role] = given(per_role[role])
    if default.is_auto and not takers:
        raise ConfigError(f"{where}: options of no backend; name the backend too, or put them under its extra")
    return given(default) if takes(default) or not takers else default
