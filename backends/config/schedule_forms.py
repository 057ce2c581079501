"""Reads schedules from plain data: our list of entries, and vLLM-Omni's profiles with step ranges or sigma windows.

Ours is a list of mappings such as `{"backend": "torch_sdpa", "steps": "0-3,last 2"}`. vLLM-Omni's
`diffusion_attention_schedule` names whole configurations and gives each a half-open range of steps (`end` null is the
end) or a window of sigmas; https://docs.vllm.ai/projects/vllm-omni (attention schedules).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..values.errors import ConfigError
from ..values.fields import Fields
from ..values.plain_data import load_json
from . import CATEGORY_PARENT, AttentionConfig, AttentionSpec
from .schedule import ScheduleEntry

FOREIGN_SCHEDULE = "diffusion_attention_schedule"
"""vLLM-Omni's name, as a flag or an entry of a stage."""
MOST_ENTRIES = 256
"""Most entries of a schedule; each is evaluated in every model call."""
ENTRY_FIELDS = ("backend", "extra", "steps", "percent", "sigmas", "blocks", "role", "masked")

ReadSpec = Callable[[object, str], AttentionSpec]
ReadConfig = Callable[[Mapping[Any, Any], str], AttentionConfig]


def schedule_of(value: object, where: str, read: ReadSpec) -> tuple[ScheduleEntry, ...]:
    """Our form: one entry, a list of entries, or a mapping numbered from 0, as dotted flags give it.

    Raises:
        ConfigError, UnknownBackendError: an entry is not understood; the message says which.
    """
    listed = _listed(value, where)
    _check_count(len(listed), where)
    return tuple(_entry(entry, f"{where}[{number}]", read) for number, entry in enumerate(listed))


def _check_count(count: int, where: str) -> None:
    if count > MOST_ENTRIES:
        raise ConfigError(f"{where}: {count} entries > {MOST_ENTRIES}: join windows, as in 0-3,last 2")


def _listed(value: object, where: str) -> list[object]:
    if isinstance(value, str):
        value = load_json(value, where)
    if isinstance(value, Mapping):
        if not value or set(map(str, value)) & set(ENTRY_FIELDS):
            return [value] if value else []
        numbered = {str(key): entry for key, entry in value.items()}
        if set(numbered) != {str(number) for number in range(len(numbered))}:
            said = ", ".join(numbered)
            raise ConfigError(f"{where}: expected entries numbered from 0, or {', '.join(ENTRY_FIELDS)}; not {said}")
        return [numbered[str(number)] for number in range(len(numbered))]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: expected a list of entries, not {type(value).__name__}: {value!r}")
    return list(value)


def _entry(value: object, where: str, read: ReadSpec) -> ScheduleEntry:
    if isinstance(value, ScheduleEntry):
        return value
    if isinstance(value, Mapping) and "profile" in value:
        raise ConfigError(f"{where}: a window of vLLM-Omni's; it belongs under {FOREIGN_SCHEDULE}, beside its profiles")
    fields = Fields(value, where, ConfigError).only(ENTRY_FIELDS)
    given = {name: entry for name, entry in fields.data.items() if entry is not None}
    if "backend" not in given:
        raise fields.wrong("", "no backend; name the one that holds there")
    spec = read({name: given.pop(name) for name in ("backend", "extra") if name in given}, where)
    return _made(where, spec, given)


def _made(where: str, spec: AttentionSpec, windows: Mapping[str, Any]) -> ScheduleEntry:
    try:
        return ScheduleEntry(spec, **windows)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def entry_to_dict(entry: ScheduleEntry) -> dict[str, Any]:
    """An entry as plain data; reading it gives an equal entry."""
    extra = {"extra": dict(entry.spec.extra)} if entry.spec.extra else {}
    return {"backend": entry.spec.backend, **extra, **entry.windows()}


def foreign_schedule(value: object, where: str, read: ReadConfig) -> tuple[tuple[ScheduleEntry, ...], list[str]]:
    """(entries, notes) of vLLM-Omni's form.

    Raises:
        ConfigError, UnknownBackendError: it is malformed, or has what a schedule here cannot do.
    """
    value = load_json(value, where) if isinstance(value, str) else value
    fields = Fields(value, where, ConfigError).only(("profiles", "default", "sigma"))
    profiles = {}
    for name, profile in Fields(fields.data.get("profiles") or {}, f"{where}.profiles", ConfigError).data.items():
        path = f"{where}.profiles.{name}"
        profiles[str(name)] = read(Fields(profile, path, ConfigError).data, path)
        _check_profile(profiles[str(name)], path)
    ranges, sigmas = fields.data.get("default") or [], fields.data.get("sigma") or []
    if ranges and sigmas:
        raise fields.wrong("", "both default (steps) and sigma; give one of them")
    entries: list[ScheduleEntry] = []
    notes: list[str] = []
    for field, given in (("default", ranges), ("sigma", sigmas)):
        for number, window in enumerate(_listed_windows(given, f"{where}.{field}")):
            path = f"{where}.{field}[{number}]"
            ends, read_window = (("start", "end"), _steps) if field == "default" else (("low", "high"), _sigmas)
            window_fields = Fields(window, path, ConfigError).only((*ends, "profile"))
            profile = str(window_fields.data.get("profile"))
            if profile not in profiles:
                known = ", ".join(profiles) or "none"
                raise window_fields.wrong("", f"profile {profile!r} is not one of those given: {known}")
            windows_of = read_window(window_fields)
            _check_count(len(entries) + len(profiles[profile].per_role), where)
            entries += (_made(path, spec, {**windows_of, "role": role}) for role, spec in _by_role(profiles[profile]))
            if profiles[profile].default.is_auto:
                note = f"{where}.profiles.{profile}: roles that it does not name stay as they are outside its windows"
                notes += [note] if note not in notes else []
    return tuple(entries), notes


def _by_role(config: AttentionConfig) -> Iterator[tuple[str, AttentionSpec]]:
    """(role, spec), the default first and specific roles last, since the last one wins."""
    if not config.default.is_auto:
        yield "", config.default
    order = {"self": 0, "cross": 0, **dict.fromkeys(CATEGORY_PARENT, 1)}
    yield from sorted(config.per_role.items(), key=lambda item: order.get(item[0], 2))


def _check_profile(config: AttentionConfig, where: str) -> None:
    for name in ("accuracy", "strict", "guard"):
        if getattr(config, name) is not None:
            raise ConfigError(f"{where}: {name} holds for a whole run; give it outside the profiles")
    if config.schedule:
        raise ConfigError(f"{where}: a profile has no schedule of its own")


def _steps(window: Fields) -> dict[str, str]:
    start, end = window.whole("start", 0, 0), window.data.get("end")
    if end is not None and window.whole("end", 0) <= start:
        raise window.wrong("", f"steps {start} to {end}: expected an end after the start")
    return {"steps": f"{start}-{'' if end is None else end - 1}"}


def _sigmas(window: Fields) -> dict[str, str]:
    low, high = window.number("low", 0), window.number("high", 0)
    if not 0 <= low <= high <= 1:
        raise window.wrong("", f"sigmas {low} to {high}: expected 0 <= low <= high <= 1")
    return {"sigmas": f"{window.data['high']}-{window.data['low']}"}


def _listed_windows(value: object, where: str) -> list[object]:
    value = load_json(value, where) if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: expected a list of windows, not {type(value).__name__}")
    return list(value)
