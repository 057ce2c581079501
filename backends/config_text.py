"""Reading a configuration from the forms people write: dict, JSON, YAML, files, command lines, key=value pairs.

All forms become one `AttentionConfig`; what it means is in `config.py`, which entries there are in
`config_mapping.py`, how flags are read in `config_flags.py`, and the way back in `config_print.py`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .config import AttentionConfig, ConfigError
from .config_data import load_json, load_yaml
from .config_flags import looks_like_flags, parse_flags, parse_pairs
from .config_mapping import FIELDS, Reading, from_mapping, spec_of
from .names import UnknownBackendError

log = logging.getLogger("attention_backends")

FILE_ENDINGS = (".json", ".yaml", ".yml")
BYTE_ORDER_MARK = chr(0xFEFF)
"""Windows editors begin a file with it, and so may what is pasted from one."""

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
            Smart-Diffusion (`infer.attn_type=sage`), alone or in a whole command line; or `key=value` pairs
            separated by commas or spaces.
        source: how messages name it.
        component: which diffusion model of a pipeline it is for, where SGLang's component map tells them apart.
        read_files: False for text from somebody who must not name files of this machine.

    Raises:
        ConfigError: something in it is not understood; the message says what and what is accepted.
        UnknownBackendError: a backend's name is not known, or is known and refused.
    """
    if isinstance(value, AttentionConfig):
        return value
    reader = _Reader(source, component, read_files)
    if isinstance(value, Mapping):
        config = reader.mapping(value)
    elif isinstance(value, Path):
        config = reader.file(value)
    elif isinstance(value, str):
        config = reader.text(value.lstrip(BYTE_ORDER_MARK).rstrip())
    else:
        raise ConfigError(f"{source}: expected text or a mapping, not {type(value).__name__}")
    for note in config.notes:
        _say_once(note)
    return config


def from_environment(
    environ: Mapping[str, str] | None = None, above: tuple[AttentionConfig, ...] = ()
) -> tuple[AttentionConfig, ...]:
    """The configurations that environment variables give, highest first, below those in `above`.

    A variable that cannot be read is passed over, with a warning, where a default above it decides every role anyway.

    Raises:
        ConfigError, UnknownBackendError: a variable that could decide something cannot be read.
    """
    return _layers(os.environ if environ is None else environ, above)


def _layers(environ: Mapping[str, str], above: tuple[AttentionConfig, ...], **how: Any) -> tuple[AttentionConfig, ...]:
    """As `from_environment`; `how` is handed to `parse_config`."""
    layers: list[AttentionConfig] = []
    for variable in (CONFIG_VARIABLE, *DEFAULT_VARIABLES):
        text = environ.get(variable, "").strip()
        if not text:
            continue
        try:
            layers.append(
                parse_config(text, variable, **how) if variable == CONFIG_VARIABLE else _named(text, variable)
            )
        except (ConfigError, UnknownBackendError) as error:
            if all(layer.default.is_auto for layer in (*above, *layers)):
                raise
            _warn_once(f"{error}; it is passed over, since a default above it decides")
    return tuple(layers)


def parse_extra(text: str) -> dict[str, Any]:
    """Options of one backend, as JSON or as `name=value` pairs; an empty text gives none.

    Raises:
        ConfigError: the text has neither form.
    """
    return _options(text, "extra")


def _options(text: str, where: str) -> dict[str, Any]:
    text = text.strip()
    if not text.startswith("{"):
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
    """One reading: where it comes from and what it may open."""

    def __init__(self, source: str, component: str, read_files: bool) -> None:
        if not isinstance(component, str) or not component.strip():
            raise ConfigError(f"{source}: component must be a name such as transformer, not {component!r}")
        self.source, self.component, self.read_files = source, component, read_files

    def mapping(self, value: Mapping[Any, Any], source: str = "") -> AttentionConfig:
        return from_mapping(value, Reading(source or self.source, self.component, self.options))

    def text(self, text: str) -> AttentionConfig:
        if "\n" not in text:
            return self._text(text)
        try:
            return self._text(text)
        except (ConfigError, UnknownBackendError) as error:
            raise _located(error, text) from error

    def _text(self, text: str) -> AttentionConfig:
        whole, text = text, text.strip()  # the whole for what counts lines
        if not text:
            return AttentionConfig(source=self.source)
        if text.startswith("{"):
            return self.data(load_json(whole, self.source), self.source)
        flags = looks_like_flags(text)
        if "\n" not in text and text.lower().endswith(FILE_ENDINGS) and (not flags or self._is_file(text)):
            return self.file(Path(text))
        if flags:
            return self._flags(whole)
        if "\n" in text or ": " in text:
            return self.data(load_yaml(whole, self.source), self.source)
        reading = Reading(self.source)
        spec = spec_of(text, self.source, reading)
        return AttentionConfig(spec, source=self.source, notes=tuple(reading.notes))

    def _flags(self, text: str) -> AttentionConfig:
        flags = parse_flags(text, self.source)
        config = self.mapping(flags.nested)
        variables = (CONFIG_VARIABLE, *DEFAULT_VARIABLES)
        if not flags.nested and not set(variables) & set(flags.environment):
            unknown = ", ".join(flags.environment)
            raise ConfigError(f"{self.source}: unknown entry {unknown}; known: {', '.join((*FIELDS, *variables))}")
        if flags.skipped:
            note = f"{', '.join(flags.skipped)}: not about attention; without effect here"
            config = replace(config, notes=(*config.notes, note))
        for name in flags.environment:
            if "ATT" in name and name not in variables:
                config = replace(config, notes=(*config.notes, f"{name}: not read from text; without effect here"))
        how = {"component": self.component, "read_files": self.read_files}
        for lower in _layers(flags.environment, (config,), **how):
            if config.default.is_auto:
                config = replace(
                    config,
                    default=lower.default,
                    per_role={**lower.per_role, **config.per_role},
                    notes=(*config.notes, *lower.notes),
                )
        return config

    def data(self, loaded: object, source: str) -> AttentionConfig:
        if loaded is None:
            return AttentionConfig(source=source)
        if isinstance(loaded, str):
            if loaded.lower().endswith(FILE_ENDINGS):
                raise ConfigError(f"{source}: expected a configuration, not the name of another file: {loaded}")
            reading = Reading(source)
            return AttentionConfig(spec_of(loaded, source, reading), source=source, notes=tuple(reading.notes))
        if not isinstance(loaded, Mapping):
            raise ConfigError(f"{source}: expected text or a mapping, not {type(loaded).__name__}")
        return self.mapping(loaded, source)

    def file(self, path: Path) -> AttentionConfig:
        source = f"{self.source} ({path.name})"
        loaded = self._load(path, source)
        if path.suffix.lower() == ".json" and not isinstance(loaded, Mapping):
            raise ConfigError(f"{source}: expected a mapping, not {type(loaded).__name__}")
        return self.data(loaded, source)

    def options(self, text: str, where: str) -> dict[str, Any]:
        """Options or a component map that is written as text: pairs, JSON, or the path of a file."""
        if "=" not in text and text.strip().lower().endswith(FILE_ENDINGS):
            loaded = self._load(Path(text.strip()), where)
            if not isinstance(loaded, dict):
                raise ConfigError(f"{where}: expected a mapping in {text.strip()}, not {type(loaded).__name__}")
            return loaded
        return _options(text, where)

    def _is_file(self, text: str) -> bool:
        return self.read_files and Path(text).expanduser().is_file()

    def _load(self, path: Path, source: str) -> object:
        if not self.read_files:
            raise ConfigError(f"{source}: files are not opened from text here: {path}; choose it as a file instead")
        try:
            text = path.expanduser().read_text(encoding="utf-8-sig")  # Windows editors begin a file with a mark
        except (OSError, RuntimeError) as error:
            said = getattr(error, "strerror", None) or error
            raise ConfigError(f"{self.source}: cannot read {path}: {said}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.source}: {path} is not UTF-8 text; save it as UTF-8") from error
        return load_json(text, source) if path.suffix.lower() == ".json" else load_yaml(text, source)


def _located(error: Exception, text: str) -> Exception:
    """The error with the line of the word it is about, where that word stands on one line only."""
    message = str(error)
    if re.search(r"\bline \d", message):
        return error
    lines = text.splitlines()
    for word in reversed(re.findall(r"'([^'\n]+)'|unknown entry (\w+)", message)):
        found = [number for number, line in enumerate(lines, 1) if (word[0] or word[1]) in line]
        if len(found) == 1:
            return type(error)(f"{message} (line {found[0]})")
    return error
