"""Reading a configuration from the forms people write: dict, JSON, YAML, files, dotted flags, key=value pairs.

All forms become one `AttentionConfig`; what it means is in `config.py`. The caller's object is never changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import AttentionConfig, AttentionSpec, ConfigError
from .names import UnknownBackendError

FIELDS = ("default", "backend", "per_role", "accuracy", "strict", "guard")
SPEC_FIELDS = ("backend", "extra")
FILE_ENDINGS = (".json", ".yaml", ".yml")
FLAG_PREFIXES = ("--diffusion-attention-config.", "diffusion-attention-config.")

CONFIG_VARIABLE = "ATTENTION_BACKENDS_CONFIG"
DEFAULT_VARIABLES = ("DIFFUSION_ATTENTION_BACKEND", "DIFFUSERS_ATTN_BACKEND")


def parse_config(value: object, source: str = "config") -> AttentionConfig:
    """Read a configuration.

    Args:
        value: an AttentionConfig, a mapping, or text: a backend's name; JSON; YAML; the path of a `.json`,
            `.yaml` or `.yml` file; dotted flags (`per_role.cross.backend=torch_sdpa`, with or without vLLM's
            `--diffusion-attention-config.`); or `key=value` pairs separated by commas or spaces.
        source: how messages name it.

    Raises:
        ConfigError: something in it is not understood; the message says what and what is accepted.
        UnknownBackendError: a backend's name is not known.
    """
    if isinstance(value, AttentionConfig):
        return value
    if isinstance(value, Mapping):
        return _from_mapping(value, source)
    if isinstance(value, Path):
        return _from_file(value, source)
    if isinstance(value, str):
        return _from_text(value.strip(), source)
    raise ConfigError(f"{source}: expected text or a mapping, not {type(value).__name__}")


def from_environment(environ: Mapping[str, str] | None = None) -> tuple[AttentionConfig, ...]:
    """The configurations that environment variables give, highest first."""
    environ = os.environ if environ is None else environ
    layers = []
    if environ.get(CONFIG_VARIABLE, "").strip():
        layers.append(parse_config(environ[CONFIG_VARIABLE], CONFIG_VARIABLE))
    for variable in DEFAULT_VARIABLES:
        name = environ.get(variable, "").strip()
        if not name:
            continue
        layers.append(AttentionConfig(default=_spec(name, variable), source=variable))
    return tuple(layers)


def parse_extra(text: str) -> dict[str, Any]:
    """Options of one backend, as JSON or as `name=value` pairs; an empty text gives none.

    Raises:
        ConfigError: the text has neither form.
    """
    text = text.strip()
    if not text.startswith("{"):
        return _unflatten(text, "extra")
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"extra: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"extra: expected name=value pairs, not {type(loaded).__name__}")
    return loaded


def _from_text(text: str, source: str) -> AttentionConfig:
    if not text:
        return AttentionConfig(source=source)
    if text.startswith("{"):
        return _from_json(text, source)
    if "\n" not in text and text.lower().endswith(FILE_ENDINGS):
        return _from_file(Path(text), source)
    if "\n" in text or ": " in text:
        return _from_yaml(text, source)
    if "=" in text or text.startswith("--"):
        return _from_mapping(_unflatten(text, source), source)
    return AttentionConfig(default=_spec(text, source), source=source)


def _from_file(path: Path, source: str) -> AttentionConfig:
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")  # Windows editors begin a file with a mark
    except OSError as error:
        raise ConfigError(f"{source}: cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: {path} is not UTF-8 text; save it as UTF-8") from error
    name = f"{source} ({path.name})"
    return _from_json(text, name) if path.suffix.lower() == ".json" else _from_yaml(text, name)


def _from_json(text: str, source: str) -> AttentionConfig:
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        message = f"{source}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        raise ConfigError(message) from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{source}: expected a mapping, not {type(loaded).__name__}")
    return _from_mapping(loaded, source)


def _from_yaml(text: str, source: str) -> AttentionConfig:
    import yaml

    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    if loaded is None:
        return AttentionConfig(source=source)
    if isinstance(loaded, str) and loaded.lower().endswith(FILE_ENDINGS):
        raise ConfigError(f"{source}: expected a configuration, not the name of another file: {loaded}")
    return parse_config(loaded, source)


def _unflatten(text: str, source: str) -> dict[str, Any]:
    """`a.b=c` pairs, and vLLM's `--flag.a.b c`, to nested dicts; `per_role.ltx2.x=name` keeps its dotted role."""
    words = text.replace(",", " ").split()
    pairs: list[tuple[str, str]] = []
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not equals:
            if not word.startswith("-") or not words:
                raise ConfigError(f"{source}: {word!r} is not name=value")
            value = words.pop(0)
        for prefix in FLAG_PREFIXES:
            name = name.removeprefix(prefix)
        pairs.append((name.lstrip("-"), value))
    nested: dict[str, Any] = {}
    for name, value in pairs:
        node = nested
        *parents, last = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{source}: {name!r} conflicts with an earlier entry")
        if last in node:
            raise ConfigError(f"{source}: {name!r} conflicts with an earlier entry")
        node[last] = _scalar(value)
    return nested


def _scalar(text: str) -> object:
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text.strip("'\"")


def _from_mapping(value: Mapping[Any, Any], source: str) -> AttentionConfig:
    unknown = [str(key) for key in value if key not in FIELDS]
    if unknown:
        raise ConfigError(f"{source}: unknown entry {', '.join(unknown)}; known: {', '.join(FIELDS)}")
    if "backend" in value and "default" in value:
        raise ConfigError(f"{source}: 'backend' is short for 'default.backend'; give one of them, not both")
    default = _spec(value.get("default", value.get("backend")), f"{source}.default")
    per_role_value = value.get("per_role") or {}
    if not isinstance(per_role_value, Mapping):
        raise ConfigError(f"{source}.per_role: expected role: backend entries, not {type(per_role_value).__name__}")
    settings = {name: value[name] for name in ("accuracy", "strict", "guard") if value.get(name) is not None}
    if settings.get("guard") is False:
        settings["guard"] = "off"  # YAML reads a bare `off` as false
    try:
        return AttentionConfig(default=default, per_role=_roles(per_role_value, source), source=source, **settings)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _roles(value: Mapping[Any, Any], source: str, prefix: str = "") -> dict[str, AttentionSpec]:
    """Entries by dotted role; nested mappings (`ltx2: {audio_self: ...}`) are joined."""
    roles: dict[str, AttentionSpec] = {}
    for key, entry in value.items():
        role = f"{prefix}{key}"
        if isinstance(entry, Mapping) and not set(entry) & set(SPEC_FIELDS):
            if not entry:
                raise ConfigError(f"{source}.per_role[{role!r}]: empty entry")
            roles.update(_roles(entry, source, f"{role}."))
        else:
            roles[role] = _spec(entry, f"{source}.per_role[{role!r}]")
    return roles


def _spec(value: object, where: str) -> AttentionSpec:
    if value is None:
        return AttentionSpec()
    if isinstance(value, AttentionSpec):
        return replace(value)
    if isinstance(value, str):
        value = {"backend": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a backend's name or a mapping, not {type(value).__name__}: {value!r}")
    unknown = [str(key) for key in value if key not in SPEC_FIELDS]
    if unknown:
        raise ConfigError(f"{where}: unknown entry {', '.join(unknown)}; known: {', '.join(SPEC_FIELDS)}")
    try:
        return AttentionSpec(value.get("backend", "auto"), value.get("extra") or {})
    except UnknownBackendError as error:
        raise UnknownBackendError(f"{where}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
