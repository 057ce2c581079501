"""`Package`, `Symbols`, `Setting`: the packages of a kernel, for a backend's declaration.

`doctor/install.py` makes installation advice from them, `doctor/symbols.py` checks the names. Versions and requirements
are from each package's metadata of November 2026.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .platform import Platform


class Setting(NamedTuple):
    """A setting that makes a package run on a machine, without installation."""

    text: str
    """What to do, e.g. `set X=TRUE before the program starts`."""
    note: str
    on: Callable[[Platform], Platform]
    """The platform with the setting applied."""


@dataclass(frozen=True)
class Package:
    """A package that backends use. `arguments` and notes are for `version`."""

    distribution: str
    module: str
    version: str
    page: str
    how: str = "take a wheel for {tags} from {page}, then: {pip} --no-deps WHEEL"
    """Advice where `arguments` is empty; may use {page}, {tags}, {pip} and {torch}."""
    note: str = ""
    systems: tuple[str, ...] = ("linux", "win32")
    arguments: Callable[[Platform, str], tuple[str, ...]] = lambda platform, machine: ()
    """Arguments of `pip install` on a platform with these wheel tags; empty: no command is known to work."""
    note_on: Callable[[Platform], str] = lambda platform: ""
    """A further note for some machines."""
    setting: Setting | None = None
    environment: Callable[[Platform], str] = lambda platform: ""
    """What else changes its results on a platform, beside versions; part of the key of stored results. May be empty."""
    needs_triton: bool = False
    declares_torch: bool = True
    """Whether it, or a dependency, requires torch: pip then needs --no-deps, or a pin of torch."""


class Symbols(NamedTuple):
    """Names that a kernel uses of a module of its package."""

    module: str
    names: tuple[str, ...]
    when: str = ""
    """Requirement under which this applies, e.g. `sageattention>=2`; empty: always."""
    foreign: tuple[str, ...] = ()
    """Names that must be absent: they identify another release than the metadata says."""
