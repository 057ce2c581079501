"""Reads a configuration from a dict, JSON, YAML, a file, a command line or key=value pairs.

`mapping.py` reads the entries, `flags.py` flags; `print.py` writes a configuration.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..values.bounded import MOST_JSON, MOST_TEXT, read_file, shortened
from ..values.errors import ConfigError
from ..values.plain_data import check_data, check_size, load_json, load_yaml
from . import AttentionConfig
from .flags import ELSEWHERE, elsewhere_problem, looks_like_flags, notes_on, parse_flags, parse_pairs
from .mapping import FIELDS, SHORTHANDS, Reading, from_mapping, spec_of
from .names import UnknownBackendError
from .python import python_problem
from .record_reader import FIELDS as RECORD_FIELDS
from .record_reader import is_record, read

log = logging.getLogger("attention_backends")

FILE_ENDINGS = (".json", ".yaml", ".yml")
BYTE_ORDER_MARK = chr(0xFEFF)
"""Windows editors write it at the start of a file, so pasted text may have it."""

LONGER = "; a longer configuration can be written as JSON"
MOST_INSIDE = 3
"""Most levels of texts within a variable of a command line."""
_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}

CONFIG_VARIABLE = "ATTENTION_BACKENDS_CONFIG"
DEFAULT_VARIABLES = ("DIFFUSION_ATTENTION_BACKEND", "DIFFUSERS_ATTN_BACKEND")
_SYSTEM_OF = {"DIFFUSION_ATTENTION_BACKEND": "vllm_omni", "DIFFUSERS_ATTN_BACKEND": "diffusers"}


def parse_config(
    value: object, source: str = "config", *, component: str = "transformer", read_files: bool = True
) -> AttentionConfig:
    """Read a configuration.

    Args:
        value: an AttentionConfig, a mapping, or text: a backend's name; JSON; YAML; the path of a `.json`,
            `.yaml` or `.yml` file; flags of vLLM-Omni (`--diffusion-attention-config.per_role.cross.backend X`,
            `-dac '{...}'`), SGLang (`--attention-backend X`, `--component-attention-backends transformer=fa`) or
            Smart-Diffusion (`infer.attn_type=sage`), others in `docs/systems.md`, alone or in a whole command line;
            or `key=value` pairs separated by commas or spaces.
        source: its name in messages.
        component: the diffusion model that it is for; selects entries of SGLang's component map.
        read_files: False for untrusted text, which must not name files of this machine.

    Raises:
        ConfigError: something in it is not understood; the message says what and what is accepted.
        UnknownBackendError: a backend's name is not known, or is known and refused.
    """
    return _parsed(value, source, component, read_files)


def _parsed(value: object, source: str, component: str, read_files: bool, inside: int = 0) -> AttentionConfig:
    """As `parse_config`; `inside`: levels of texts around the value, each as the value of a variable."""
    if isinstance(value, AttentionConfig):
        return value
    try:
        config = _Reader(source, component, read_files, inside).read(value)
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply") from error
    for note in config.notes:
        _say_once(note)
    return config


def from_environment(
    environ: Mapping[str, str] | None = None, above: tuple[AttentionConfig, ...] = ()
) -> tuple[AttentionConfig, ...]:
    """The configurations of environment variables, highest first, below those in `above`.

    An invalid variable is only a warning if a default above it decides every role.

    Raises:
        ConfigError, UnknownBackendError: a variable that matters is invalid.
    """
    return _layers(os.environ if environ is None else environ, above)


def _layers(
    environ: Mapping[str, str],
    above: tuple[AttentionConfig, ...],
    component: str = "transformer",
    read_files: bool = True,
    inside: int = 0,
) -> tuple[AttentionConfig, ...]:
    """As `from_environment`; further arguments are for `_parsed`."""
    layers: list[AttentionConfig] = []
    for variable in (CONFIG_VARIABLE, *DEFAULT_VARIABLES):
        text = environ.get(variable, "").strip()
        if not text:
            continue
        try:
            layers.append(
                _parsed(text, variable, component, read_files, inside)
                if variable == CONFIG_VARIABLE
                else _named(text, variable)
            )
        except (ConfigError, UnknownBackendError) as error:
            if all(layer.default.is_auto for layer in (*above, *layers)):
                raise
            _warn_once(f"{error}; it is passed over, since a default above it decides")
    return tuple(layers)


def parse_extra(text: str) -> dict[str, Any]:
    """Options of one backend from JSON or `name=value` pairs; an empty text has none.

    Raises:
        ConfigError: it is neither.
    """
    return _options(text, "extra")


def _options(text: str, where: str) -> dict[str, Any]:
    text = text.strip()
    if not text.startswith("{"):
        check_size(text, where, MOST_TEXT, LONGER)
        return parse_pairs(text, where)
    loaded = load_json(text, where)
    if not isinstance(loaded, dict):
        raise ConfigError(f"{where}: expected name=value pairs, not {type(loaded).__name__}")
    return loaded


def _named(name: str, variable: str) -> AttentionConfig:
    reading = Reading(variable)
    config = AttentionConfig(spec_of(name, variable, reading, _SYSTEM_OF[variable]), source=variable)
    for note in reading.notes:
        _say_once(note)
    return replace(config, notes=tuple(reading.notes))


@lru_cache(maxsize=256)
def _say_once(note: str) -> None:
    log.info("%s", note)


@lru_cache(maxsize=256)
def _warn_once(text: str) -> None:
    log.warning("%s", text)


class _Reader:
    """Reads one value: knows its source, and whether files may be opened."""

    def __init__(self, source: str, component: str, read_files: bool, inside: int) -> None:
        if not isinstance(component, str) or not component.strip():
            raise ConfigError(f"{source}: component must be a name such as transformer, not {component!r}")
        if inside > MOST_INSIDE:
            raise ConfigError(f"{source}: {inside} texts inside one another: nested too deeply")
        self.source, self.component, self.read_files, self.inside = source, component, read_files, inside

    def read(self, value: object) -> AttentionConfig:
        if isinstance(value, Mapping):
            check_data(value, self.source)
            return self.mapping(value)
        if isinstance(value, Path):
            return self.file(value)
        if isinstance(value, str):
            return self.text(value.lstrip(BYTE_ORDER_MARK).rstrip())
        raise ConfigError(f"{self.source}: expected text or a mapping, not {type(value).__name__}")

    def mapping(self, value: Mapping[Any, Any], source: str = "") -> AttentionConfig:
        source = source or self.source
        if not is_record(value):
            return from_mapping(value, Reading(source, self.component, self.options))
        # A record may be combined with settings, such as strict.
        rest = {name: entry for name, entry in value.items() if name not in RECORD_FIELDS}
        config = from_mapping(rest, Reading(source, self.component, self.options))
        return replace(config, record=read(value, source, self.component))

    def text(self, text: str) -> AttentionConfig:
        whole, text = text, text.strip()  # unstripped for line numbers
        if not text:
            return AttentionConfig(source=self.source)
        if text.startswith("{"):
            return self.data(load_json(whole, self.source), self.source)
        check_size(whole, self.source, MOST_TEXT, LONGER)
        python = python_problem(text)
        if python is not None:
            raise ConfigError(f"{self.source}: {python}")
        flags = looks_like_flags(text)
        if "\n" not in text and text.lower().endswith(FILE_ENDINGS) and (not flags or self._is_file(text)):
            return self.file(Path(text))
        if flags:
            return self._flags(whole)
        if "\n" in text or ": " in text or text[0] in "[\"'":
            return self.data(_settings_of_yaml(load_yaml(whole, self.source)), self.source)
        reading = Reading(self.source)
        spec = spec_of(text, self.source, reading)
        return AttentionConfig(spec, source=self.source, notes=tuple(reading.notes))

    def _flags(self, text: str) -> AttentionConfig:
        flags = parse_flags(text, self.source)
        of_systems = {name: value for name, value in flags.environment.items() if name in SHORTHANDS}
        flags = flags._replace(nested={**of_systems, **flags.nested})
        config = self.mapping(flags.nested)
        variables = (CONFIG_VARIABLE, *DEFAULT_VARIABLES)
        if not flags.nested and not set(variables) & set(flags.environment):
            if problem := elsewhere_problem(flags.environment):
                raise ConfigError(f"{self.source}: {problem}")
            unknown = ", ".join(flags.environment)
            raise ConfigError(f"{self.source}: unknown entry {unknown}; known: {', '.join((*FIELDS, *variables))}")
        if flags.skipped:
            config = replace(config, notes=(*config.notes, *map(shortened, notes_on(flags.skipped))))
        for name in flags.environment:
            if ("ATT" in name or name.lower() in ELSEWHERE) and name not in (*variables, *SHORTHANDS):
                there = f"there it {ELSEWHERE[name.lower()]}; " if name.lower() in ELSEWHERE else ""
                note = f"{name}: {there}not read from text; without effect here"
                config = replace(config, notes=(*config.notes, note))
        for lower in _layers(flags.environment, (config,), self.component, self.read_files, self.inside + 1):
            if config.default.is_auto:
                config = replace(
                    config,
                    default=lower.default,
                    per_role={**lower.per_role, **config.per_role},
                    schedule=(*lower.schedule, *config.schedule),
                    joint_is_self=(config if config.names_self else lower).joint_is_self,
                    notes=(*config.notes, *lower.notes),
                )
        return config

    def data(self, loaded: object, source: str) -> AttentionConfig:
        if loaded is None:
            return AttentionConfig(source=source)
        if isinstance(loaded, str):
            if loaded.lower().endswith(FILE_ENDINGS):
                raise ConfigError(f"{source}: expected a configuration, not the name of another file: {loaded}")
            if not loaded.strip():
                raise ConfigError(f"{source}: an empty name; leave the text empty, or name a backend")
            reading = Reading(source)
            return AttentionConfig(spec_of(loaded, source, reading), source=source, notes=tuple(reading.notes))
        if not isinstance(loaded, Mapping):
            raise ConfigError(f"{source}: expected text or a mapping, not {type(loaded).__name__}")
        return self.mapping(loaded, source)

    def file(self, path: Path) -> AttentionConfig:
        source = f"{self.source} ({path.name})"
        text = self._content(path, source)
        loaded = _loaded(text, path, source)
        if path.suffix.lower() == ".json" and not isinstance(loaded, Mapping):
            raise ConfigError(f"{source}: expected a mapping, not {type(loaded).__name__}")
        return self.data(loaded, source)

    def options(self, text: str, where: str) -> dict[str, Any]:
        """Options or a component map given as text: pairs, JSON, or the path of a file."""
        if "=" not in text and text.strip().lower().endswith(FILE_ENDINGS):
            path = Path(text.strip())
            loaded = _loaded(self._content(path, where), path, where)
            if not isinstance(loaded, dict):
                raise ConfigError(f"{where}: expected a mapping in {text.strip()}, not {type(loaded).__name__}")
            return loaded
        return _options(text, where)

    def _is_file(self, text: str) -> bool:
        try:
            return self.read_files and Path(text).expanduser().is_file()
        except (OSError, RuntimeError, ValueError):  # no file name: too long, or an unknown ~user
            return False

    def _content(self, path: Path, source: str) -> str:
        if not self.read_files:
            raise ConfigError(f"{source}: files are not opened from text here: {path}; choose it as a file instead")
        try:
            # Windows editors write a byte order mark.
            return read_file(path.expanduser(), MOST_JSON).decode("utf-8-sig")
        except (OSError, RuntimeError) as error:
            said = getattr(error, "strerror", None) or error
            raise ConfigError(f"{self.source}: cannot read {path}: {said}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.source}: {path} is not UTF-8 text; save it as UTF-8") from error


def _loaded(text: str, path: Path, source: str) -> object:
    return load_json(text, source) if path.suffix.lower() == ".json" else _settings_of_yaml(load_yaml(text, source))


def _settings_of_yaml(loaded: object) -> object:
    """YAML data with `yes`, `no`, `on` and `off` of boolean settings as booleans (YAML 1.1); else they are text."""
    if not isinstance(loaded, dict):
        return loaded
    words = {name: loaded.get(name) for name in ("strict", "joint_is_self")}
    switches = {name: _SWITCHES.get(word.lower()) for name, word in words.items() if isinstance(word, str)}
    return {**loaded, **{name: switch for name, switch in switches.items() if switch is not None}}
