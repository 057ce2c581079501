"""Reads and writes JSON and YAML as plain data, with line numbers in errors and limits for untrusted text.

Limits of size, entries and depth are checked before objects are built. YAML values are those of JSON (text, numbers,
true, false, null); keys are unique texts; merge keys, tags, dates, octal and base 60 numbers are refused. An alias
counts as its expansion.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from json.decoder import scanstring  # type: ignore[attr-defined]  # in C where Python has it
from typing import Any

from .bounded import MOST_JSON, MOST_TEXT
from .errors import ConfigError
from .options import MOST_BITS

MAX_ENTRIES, MAX_DEPTH = 10_000, 40
"""Most entries and levels; more than any configuration needs."""
MAX_DIGITS = 40
"""Most digits of a whole number."""

_JSON_MARK = re.compile(r'[\[\]{},"]')
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", re.ASCII)
_EXPONENT = re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
}
"""Plain scalars of YAML that are not text: JSON's constants, in YAML's spellings."""


def load_json(
    text: str,
    source: str,
    *,
    most_bytes: int = MOST_JSON,
    most_entries: int = MAX_ENTRIES,
    constants: bool = False,
) -> Any:
    """Read JSON.

    constants: accept NaN and Infinity, which Python writes and JSON does not have.

    Raises:
        ConfigError: with line and column; or it is too large, or nested too deeply.
    """
    check_size(text, source, most_bytes)
    _check_json(text, source, most_entries)
    try:
        constant = float if constants else _no_constant
        data = json.loads(text, object_pairs_hook=_once, parse_constant=constant, parse_float=_float, parse_int=_whole)
        json.dumps(data, ensure_ascii=False).encode()  # JSON's escapes can make half of a character
    except UnicodeEncodeError as error:
        raise ConfigError(f"{source}: a text with half of a character ({error.reason})") from error
    except json.JSONDecodeError as error:
        message = f"{source}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        raise ConfigError(message) from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply") from error
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error
    return data


def load_yaml(text: str, source: str) -> Any:
    """Read YAML.

    Raises:
        ConfigError: with line and column; or it is too large, or nested too deeply.
    """
    import yaml

    check_size(text, source, MOST_TEXT, "; a longer configuration can be written as JSON")
    try:
        return _read_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or error.context
        if problem == "but found another document":
            problem = f"{error.context}, {problem}"
        raise ConfigError(f"{source}: not valid YAML{place}: {problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply") from error
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{source}: {error}") from error


def dump_yaml(data: Any) -> str:
    """Write YAML that `load_yaml` reads back."""
    import yaml

    text: str = yaml.dump(data, Dumper=_dumper(), sort_keys=False)  # escapes what is not ASCII: PyYAML folds U+0085
    return text


def check_size(text: str, source: str, most: int, advice: str = "") -> None:
    """Check the length of a text.

    Raises:
        ConfigError: it has more than `most` bytes as UTF-8.
    """
    size = len(text)
    if size <= most and not text.isascii():
        size = len(text.encode("utf-8", "surrogatepass"))
    if size > most:
        raise ConfigError(f"{source}: {size} bytes > {most}: no configuration is that long{advice}")


def check_data(data: object, source: str) -> None:
    """Check entries and depth of plain data from a program.

    Raises:
        ConfigError: too many entries, or nested too deeply, as data that contains itself.
    """
    count = 0
    pending: list[tuple[object, int]] = [(data, 0)]
    while pending:
        value, depth = pending.pop()
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        count += 1
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise ConfigError(f"{source}: a number of {value.bit_length()} bits is out of range")
        if count + len(inner) > MAX_ENTRIES:
            raise ConfigError(f"{source}: {_too_many(MAX_ENTRIES)}")
        if depth > MAX_DEPTH:
            raise ConfigError(f"{source}: {_TOO_DEEP}")
        pending += [(each, depth + 1) for each in inner]


_TOO_DEEP = f"nested too deeply: no configuration is nested more than {MAX_DEPTH} deep"


def _too_many(most: int) -> str:
    return f"more than {most} entries: no configuration has that many"


# JSON


def _check_json(text: str, source: str, most: int) -> None:
    """Count entries and depth of JSON text without building it: objects may take a hundred times its size."""
    depth, entries, place = 0, 1, 0
    with suppress(json.JSONDecodeError):  # the parser reports it better
        while (found := _JSON_MARK.search(text, place)) is not None:
            mark, place = found[0], found.end()
            if mark == '"':
                _, place = scanstring(text, place)
            depth += (mark in "[{") - (mark in "]}")
            entries += mark in "[{,"
            if depth > MAX_DEPTH:
                raise ConfigError(f"{source}: {_TOO_DEEP}")
            if entries > most:
                raise ConfigError(f"{source}: {_too_many(most)}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r} is given twice")
            seen.add(name)
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON has")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is larger than any number that can be computed with")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits > {MAX_DIGITS}")
    return int(text)


# YAML


def _read_yaml(text: str) -> Any:
    """Read one YAML document as plain data; aliases are expanded within the limits.

    Raises:
        yaml.YAMLError: invalid YAML, or a refused part of it.
        ValueError: it is too large, or nested too deeply.
    """
    import yaml

    left = iter(range(MAX_ENTRIES))

    def wrong(problem: str, node: Any) -> Exception:
        error: Exception = yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return error

    def plain(node: Any, depth: int) -> Any:
        if next(left, None) is None:
            raise ValueError(_too_many(MAX_ENTRIES))
        if node.id == "scalar":
            return _scalar(node)
        if depth == MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        if node.id == "sequence":
            return [plain(entry, depth + 1) for entry in node.value]
        found: dict[Any, Any] = {}
        for key, value in node.value:
            if key.id != "scalar":
                raise wrong("a key must be a scalar", key)
            if key.value == "<<" and key.style is None:
                raise wrong("merge keys (<<) are not read; write the entries out", key)
            name = _scalar(key)
            if name in found:
                raise wrong(f"{name!r} is given twice", key)
            found[name] = plain(value, depth + 1)
        return found

    node = yaml.compose(text, _loader())
    return None if node is None else plain(node, 0)


@lru_cache(maxsize=1)
def _loader() -> Any:
    import yaml

    class Loader(yaml.BaseLoader):  # type: ignore[misc]  # yaml has no types here
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if getattr(event, "tag", None) is not None:
                raise yaml.constructor.ConstructorError(
                    None, None, f"tags such as {event.tag} are not read", event.start_mark
                )
            if not isinstance(event, yaml.AliasEvent):
                self.anchors.pop(event.anchor, None)  # the last anchor of a name wins
            return super().compose_node(parent, index)

    return Loader


def _scalar(node: Any) -> object:
    text: str = node.value
    if node.style is not None:  # quoted, or a block scalar
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _NUMBER.fullmatch(text):
        return _float(text) if any(mark in text for mark in ".eE") else _whole(text)
    return text


@lru_cache(maxsize=1)
def _dumper() -> Any:
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types here
        def ignore_aliases(self, data: Any) -> bool:
            return True

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
    return Dumper
