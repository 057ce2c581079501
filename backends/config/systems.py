"""Looks up the names that other systems publish for attention backends.

Names of backends are declared by the backend (`values/aliases.py`), refused ones in `published.py`; `names.py` resolves
names by both, and `docs/systems.md` is generated from them. A name is compared without regard to case. Where systems
mean different things by a name, the first one's meaning holds if the system is not known, and its note names the
others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType

from ..kernels import registry
from .published import SYSTEMS, Published, System


@lru_cache(maxsize=1)
def systems() -> tuple[System, ...]:
    """The systems with all their names: declared ones in the order of backends, then the others."""
    declared: dict[str, list[Published]] = {}
    for backend in registry.BACKENDS.values():
        for alias in backend.aliases:
            declared.setdefault(alias.system, []).append(Published(alias.name, backend.id, alias.line, alias.options))
    return tuple(system._replace(names=(*declared.get(system.id, ()), *system.names)) for system in SYSTEMS)


def key_of(name: str) -> str:
    """A name in its form for comparison: lower case, stripped, `_` for `-`."""
    return name.strip().lower().replace("-", "_")


def rows_of(name: str, system: str = "") -> Iterator[tuple[System, Published]]:
    """The rows of a name: those of `system` (an id) first, then those in the same case."""
    rows = _rows().get(key_of(name), ())
    yield from sorted(rows, key=lambda row: (row[0].id != system, row[1].name != name.strip()))


@lru_cache(maxsize=1)
def _rows() -> dict[str, list[tuple[System, Published]]]:
    """Rows by `key_of` their name."""
    rows: dict[str, list[tuple[System, Published]]] = {}
    for publisher in systems():
        for row in publisher.names:
            rows.setdefault(key_of(row.name), []).append((publisher, row))
    return rows


@lru_cache(maxsize=1)
def meanings() -> Mapping[str, Published]:
    """Accepted names, by `key_of` them, with the row that holds where the system is not known: the first one's."""
    accepted: dict[str, Published] = {}
    for name, rows in _rows().items():
        for _, row in rows:
            if row.means is not None:
                accepted.setdefault(name, row)
    return MappingProxyType(accepted)


def row_in(name: str, system: str) -> Published | None:
    """The row of a name in one system."""
    return next((row for publisher, row in _rows().get(key_of(name), ()) if publisher.id == system), None)


def entries() -> Mapping[str, str]:
    """The entries that say a system, and its id."""
    return MappingProxyType({system.entry: system.id for system in SYSTEMS if system.entry})


def line_of(name: str, system: str = "") -> str:
    """The line of an accepted name for messages, or an empty text.

    `system`: id of the system that the name comes from; if unknown, the first system with a line for what the name
    means here is used, and systems that mean something else by it are named.
    """
    own = row_in(name, system)
    row_that_holds = own or meanings().get(key_of(name))
    if row_that_holds is None or row_that_holds.means is None:
        return ""
    means = row_that_holds.means
    for publisher, row in rows_of(name, system):
        if row.means == means and row.line:
            others = "" if own or key_of(name) == means else _others(name, means)
            return f"{row.name} ({publisher.title}) means {means} here: {row.line}{others}"
        if publisher.id == system:
            return ""
    return ""


def _others(name: str, means: str) -> str:
    """What other systems mean by a name, and how to say so."""
    return "".join(
        f". In {publisher.title} it means {row.means}: {publisher.entry}: {name.strip()}"
        for publisher, row in rows_of(name)
        if row.means not in (None, means)
    )
