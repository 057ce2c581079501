"""Prints an `AttentionConfig` as plain data, JSON, YAML or flags; `parse_config` reads each back to an equal one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..values.plain_data import dump_yaml
from . import AttentionConfig, AttentionSpec
from .card_names import OFF
from .foreign_options import BESIDE_BACKEND
from .mapping import SPEC_FIELDS
from .schedule_forms import entry_to_dict
from .tokens import scalar

_PLAIN_ROLE = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
_PLAIN_VALUE = re.compile(r"[\w.+/:-]+", re.ASCII)


def to_dict(config: AttentionConfig) -> dict[str, Any]:
    """As plain data, without unset fields, source and notes."""
    data: dict[str, Any] = {} if config.record is None else config.record.data
    if not config.default.is_auto:
        data["default"] = _spec(config.default)
    if config.per_role:
        data["per_role"] = {role: _spec(spec) for role, spec in config.per_role.items()}
    if config.schedule:
        data["schedule"] = [entry_to_dict(entry) for entry in config.schedule]
    settings = {name: getattr(config, name) for name in ("accuracy", "strict", "guard")}
    if config.joint_is_self and config.names_self:
        settings["joint_is_self"] = True  # its default for text is false
    if config.cards is not None:
        settings["cards"] = ", ".join(config.cards) or OFF
    return {**data, **{name: value for name, value in settings.items() if value is not None}}


def to_json(config: AttentionConfig) -> str:
    """As indented JSON."""
    return json.dumps(to_dict(config), indent=2)


def to_yaml(config: AttentionConfig) -> str:
    return dump_yaml(to_dict(config))


def to_flags(config: AttentionConfig) -> str:
    """As `name=value` pairs in one line, quoted for a shell and for `flags.py`.

    Roles that cannot be dotted names, such as a role that is a prefix of another, are written as JSON.
    """
    data = to_dict(config)
    if config.schedule:
        data["schedule"] = {str(number): entry for number, entry in enumerate(data["schedule"])}
    per_role = data.get("per_role", {})
    if per_role and not all(_dotted(role, per_role) for role in per_role):
        data["per_role"] = json.dumps(per_role)
        return " ".join(_word(name, value) for name, value in _leaves(data, raw=("per_role",)))
    return " ".join(_word(name, value) for name, value in _leaves(data))


def _spec(spec: AttentionSpec) -> dict[str, Any]:
    return {"backend": spec.backend, **({"extra": dict(spec.extra)} if spec.extra else {})}


def _dotted(role: str, roles: Mapping[str, Any]) -> bool:
    parts = role.split(".")
    return (
        _PLAIN_ROLE.fullmatch(role) is not None
        and not {*SPEC_FIELDS, *BESIDE_BACKEND} & set(parts)
        and not any(other != role and other.startswith(f"{role}.") for other in roles)
    )


def _leaves(data: Mapping[str, Any], prefix: str = "", raw: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    for name, value in data.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and not prefix.endswith("extra."):  # an option that is a mapping
            yield from _leaves(value, f"{full}.")
        else:
            yield full, value if name in raw else _value(value)


def _value(value: object) -> str:
    if isinstance(value, str) and scalar(value) == value and value == value.strip() and value:
        return value
    return json.dumps(value)


def _word(name: str, value: str) -> str:
    if _PLAIN_VALUE.fullmatch(value):
        return f"{name}={value}"
    if "'" not in value:
        return f"{name}='{value}'"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{escaped}"'
