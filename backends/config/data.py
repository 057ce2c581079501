"""JSON and YAML text to plain data and back, with errors that name the line, and bounds for text from anywhere.

YAML here differs from PyYAML's in two points: `1e-3` is a number, as everywhere else, and a key that is given twice
is an error.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from . import ConfigError

MAX_ENTRIES, MAX_DEPTH = 10_000, 40
"""More than any configuration needs; YAML's references can make a short text far larger than it looks."""

_EXPONENT = re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+")


def load_json(text: str, source: str) -> Any:
    """Read JSON.

    Raises:
        ConfigError: with line and column.
    """
    try:
        return _bounded(json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant), source)
    except json.JSONDecodeError as error:
        message = f"{source}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        raise ConfigError(message) from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def load_yaml(text: str, source: str) -> Any:
    """Read YAML.

    Raises:
        ConfigError: with line and column.
    """
    import yaml

    try:
        return _bounded(yaml.load(text, _loader()), source)  # noqa: S506  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}: not valid YAML{place}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply") from error
    except ConfigError:
        raise
    except (ValueError, OverflowError) as error:  # such as a date of month 13
        raise ConfigError(f"{source}: not valid YAML: {error}") from error


def dump_yaml(data: Any) -> str:
    """Write YAML that `load_yaml` reads back."""
    import yaml

    text: str = yaml.dump(data, Dumper=_dumper(), sort_keys=False)  # escapes what is not ASCII: PyYAML folds U+0085
    return text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON has")


def _bounded(data: Any, source: str) -> Any:
    """`data` itself, unless it is too large to walk.

    Raises:
        ConfigError: it has too many entries or is nested too deeply.
    """
    count, pending = 0, [(data, 0)]
    while pending:
        value, depth = pending.pop()
        count += 1
        if count > MAX_ENTRIES or depth > MAX_DEPTH:
            raise ConfigError(f"{source}: more than {MAX_ENTRIES} entries, or nested more than {MAX_DEPTH} deep")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
        pending += [(each, depth + 1) for each in inner]
    return data


@lru_cache(maxsize=1)
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types here
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in getattr(node, "value", []):
                if key.tag == "tag:yaml.org,2002:merge":
                    continue
                if isinstance(key.value, str) and key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value if isinstance(key.value, str) else id(key))
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
    return Loader


@lru_cache(maxsize=1)
def _dumper() -> Any:
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        def ignore_aliases(self, data: Any) -> bool:
            return True

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
    return Dumper
