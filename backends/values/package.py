"""The packages behind a kernel: which, from where, and the names used of them.

Values for a backend's declaration, without torch. `doctor/install.py` makes advice from them, `doctor/symbols.py` finds
the names. Versions and declared needs were read from each package's metadata in November 2026.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .platform import Platform


class Setting(NamedTuple):
    """What a person can set, without installing anything, so that a package runs on a machine."""

    text: str
    """What to do, e.g. `set X=TRUE before the program starts`."""
    note: str
    on: Callable[[Platform], Platform]
    """The same machine where it is set."""


@dataclass(frozen=True)
class Package:
    """A package that backends are made of. `version` is the one that `arguments` and the notes are about."""

    distribution: str
    module: str
    version: str
    page: str
    how: str = "take a wheel for {tags} from {page}, then: {pip} --no-deps WHEEL"
    """What to do where `arguments` gives no command; may use {page}, {tags}, {pip} and {torch}."""
    note: str = ""
    systems: tuple[str, ...] = ("linux", "win32")
    arguments: Callable[[Platform, str], tuple[str, ...]] = lambda platform, machine: ()
    """What follows `pip install` on a platform whose wheels are tagged so; empty where no command is known to work."""
    note_on: Callable[[Platform], str] = lambda platform: ""
    """A further note for some machines."""
    setting: Setting | None = None
    environment: Callable[[Platform], str] = lambda platform: ""
    """What decides, beside versions, what it computes on a platform: part of what measured and probed outcomes are kept
    under. Empty for nothing."""
    needs_triton: bool = False
    declares_torch: bool = True
    """Whether it, or what it needs, declares torch: then a command of pip needs --no-deps, or a pin of torch."""


class Symbols(NamedTuple):
    """Names that a kernel takes from a module of its package."""

    module: str
    names: tuple[str, ...]
    when: str = ""
    """The requirement under which this holds, e.g. `sageattention>=2`; empty for always."""
    foreign: tuple[str, ...] = ()
    """Names that it must not have: with them it is another release than its metadata says."""
