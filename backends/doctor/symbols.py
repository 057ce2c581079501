"""The names that kernels take from their packages, and whether an installed package has them and is the one it says.

It imports the package; what that raises is the result.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType

from ..kernels.backend import Backend, package_reason
from ..values.package import Symbols
from ..values.platform import Platform


@dataclass(frozen=True)
class Finding:
    """The names that a kernel needs, as `module.name`, those that are missing, and why."""

    needed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    problem: str = ""
    """What is wrong with the package; empty where nothing is."""
    installed: bool = True
    """False where there is no trace of the package, which the backend's reasons say already."""

    def as_dict(self) -> dict[str, object]:
        return {"needed": list(self.needed), "missing": list(self.missing), "problem": self.problem or None}

    @property
    def text(self) -> str:
        """One line: what is wrong, or which names were found."""
        return self.problem or f"{', '.join(self.needed)} found"


def needs_of(backend: Backend, platform: Platform) -> tuple[Symbols, ...]:
    """What a backend takes from the versions that are installed; from the newest where none is."""
    needs = backend.symbols
    holding = tuple(need for need in needs if not need.when or package_reason(need.when, platform) is None)
    return holding or needs[-1:]


def without_import(backend: Backend, platform: Platform, problem: str) -> Finding:
    """The finding where the package is better not imported; `problem` says why."""
    needed = _names(needs_of(backend, platform))
    return Finding(needed, (), problem) if needed else Finding()


def find(backend: Backend, platform: Platform) -> Finding:
    """Import what a backend's package offers and look for the names."""
    needs = needs_of(backend, platform)
    found = [_look(backend, need, platform) for need in needs]
    missing = tuple(name for gone, _, _ in found for name in gone)
    problem = "; ".join(problem for _, problem, _ in found if problem)
    return Finding(_names(needs), missing, problem, all(there for _, _, there in found))


def _names(needs: tuple[Symbols, ...]) -> tuple[str, ...]:
    return tuple(f"{need.module}.{name}" for need in needs for name in need.names)


def _look(backend: Backend, need: Symbols, platform: Platform) -> tuple[list[str], str, bool]:
    """The names that are missing, why, and whether there is any trace of the package."""
    top = need.module.split(".")[0]
    distribution = next((p.distribution for p in backend.packages if _top(p.module) == top), top)
    version = platform.version(distribution)
    everything = [f"{need.module}.{name}" for name in need.names]
    if not _can_be_found(top):
        if version is None:
            return everything, f"package {distribution} is not installed", False
        return everything, f"metadata says {distribution} {version}, but there is no module {top}", True
    stranger = "" if version or top == "torch" else _owner(top, distribution)
    try:
        # What the package prints is the command line's to redirect: sys.stdout belongs to all threads of a server.
        module = import_module(need.module)
        gone = [name for name in need.names if not hasattr(module, name)]
        foreign = [name for name in need.foreign if hasattr(module, name)]
    except (Exception, SystemExit) as error:  # what a package raises is the result
        raised = f"importing {need.module} raised {type(error).__name__}: {error}"
        return everything, "; ".join(filter(None, (stranger, raised))), True
    where = _place(module)
    says = f"metadata says {distribution} {version}, but " if version else ""
    problems = [stranger]
    if gone:
        problems.append(f"{says}{where} has no {', '.join(gone)}")
    if foreign:
        problems.append(f"{says}{where} has {', '.join(foreign)}, which {need.when} does not have")
    return [f"{need.module}.{name}" for name in gone], "; ".join(filter(None, problems)), True


def _top(module: str) -> str:
    return module.split(".")[0]


def _can_be_found(top: str) -> bool:
    try:
        return find_spec(top) is not None
    except (ImportError, ValueError):  # loaded, but without a spec
        return top in sys.modules


def _place(module: ModuleType) -> str:
    """The module's file, or its folder where it is nothing but a folder."""
    file = getattr(module, "__file__", None)
    if file:
        return str(file)
    folders = list(getattr(module, "__path__", ()))
    return f"{folders[0]} (a bare folder)" if folders else module.__name__


def _owner(top: str, distribution: str) -> str:
    """Says that a module belongs to another distribution than the one that was meant."""
    owners = [name for name in dict.fromkeys(metadata.packages_distributions().get(top, ())) if name != distribution]
    if not owners:
        return f"module {top} can be imported, but package {distribution} is not installed"
    named = ", ".join(f"{name} {metadata.version(name)}" for name in owners)
    return f"module {top} is that of {named}; package {distribution} is not installed"
