"""How to get the package behind a backend, for the interpreter that runs and the machine it runs on.

Pure functions over what backends declare of their packages. A printed command never changes the installed torch: a
package that pulls torch is installed with --no-deps, or beside a pin of the torch that is there, so that pip keeps it
or refuses. Where no wheel is known to fit, the answer is the project's page and the tags of a matching wheel.
"""

from __future__ import annotations

import re
import shlex
import sys
import sysconfig
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from ..kernels.backend import Backend
from ..values.package import Package
from ..values.platform import Platform
from ..values.reasons import Reason, as_reason, template

NEEDS_NONE = template("install.needs_none", "nothing to install: it needs no package")
NEEDS_SOME_TRITON = template("install.some_triton", "it needs Triton too: {page} says which fits your torch")
NEEDS_TRITON = template("install.triton", "it needs Triton too: {command}")
NO_BUILD = template("install.no_build", "no build of {package} for {system} is known")
NOTHING_HELPS = template("install.nothing_helps", "nothing to install on this machine: {reason}")
ONLY_SETTING = template("install.only_setting", "nothing to install: {setting}")
OTHER_BUILD = template(
    "install.other_build",
    "{package} is installed but does not load: a build for this machine is needed ({tags})",
)
PROJECT = template("install.project", "project: {page}")


class Interpreter(NamedTuple):
    """The Python that a package would be installed into."""

    path: str
    python: str
    """Its tag, e.g. `cp312`."""
    machine: str
    """Its wheels' platform, e.g. `linux_x86_64`, `win_amd64`."""
    refuses: str = ""
    """Why pip cannot install into it; empty when it can."""


class Advice(NamedTuple):
    """How to get a backend. `kind` is `command` (text can be run), `page` (read it there) or `nothing`."""

    kind: str
    text: str
    note: str = ""


def running_interpreter() -> Interpreter:
    return Interpreter(
        path=sys.executable or "python",
        python=f"cp{sys.version_info.major}{sys.version_info.minor}",
        machine=re.sub(r"[-.]", "_", sysconfig.get_platform()),
        refuses=_refuses(),
    )


def _refuses() -> str:
    # Not importlib.util.find_spec: before Python 3.12, setuptools takes a search for pip as pip's start and then keeps
    # itself from being imported in this process, which Inductor's compiler does.
    if PathFinder.find_spec("pip") is None:
        return "has no pip"
    inside_venv = sys.prefix != sys.base_prefix
    if not inside_venv and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists():
        return "belongs to the operating system, which forbids pip in it"
    return ""


def how_to_get(backend: Backend, platform: Platform, interpreter: Interpreter) -> Advice:
    """How to make an unavailable backend available: a command where one is known, `nothing` where none would help."""
    if platform.hub and backend.origin(platform):
        platform = replace(platform, hub=False)  # the Hub was tried; its package is the other way
    missing = backend.unavailable_reasons(platform)
    if not missing:
        return _broken(backend.packages, platform, interpreter)
    for setting in filter(None, (package.setting for package in backend.packages)):
        if not backend.unavailable_reasons(setting.on(platform)):
            return Advice("nothing", Reason(ONLY_SETTING, setting=setting.text), setting.note)
    answers, obstacles = [], []
    for package in backend.packages:
        lacking = backend.unavailable_reasons(_with_package(platform, package))
        if not lacking and platform.os in package.systems:
            answers.append(_advice(package, platform, interpreter))
        no_build = [Reason(NO_BUILD, package=package.distribution, system=platform.os)]
        obstacles.append((len(lacking), lacking or no_build))
    if not answers:
        _, missing = min(obstacles, default=(0, missing))
        pages = ", ".join(dict.fromkeys(package.page for package in backend.packages))
        text = Reason(NOTHING_HELPS, reason=tuple(missing))
        return Advice("nothing", text, Reason(PROJECT, page=pages) if pages else "")
    return next((answer for answer in answers if answer.kind == "command"), answers[0])


def package_that_helps(backend: Backend, platform: Platform) -> str:
    """The distribution whose installation would make an unavailable backend available; empty where none would."""
    for package in backend.packages:
        is_missing = platform.version(package.distribution) is None and platform.os in package.systems
        if is_missing and not backend.unavailable_reasons(_with_package(platform, package)):
            return package.distribution
    return ""


def _broken(packages: tuple[Package, ...], platform: Platform, interpreter: Interpreter) -> Advice:
    """Advice where everything is installed and loading failed: another build is needed."""
    for package in packages:
        version = platform.version(package.distribution)
        if version is not None:
            return Advice(
                "page",
                Reason(OTHER_BUILD, package=f"{package.distribution} {version}", tags=tags(platform, interpreter)),
                Reason(PROJECT, page=package.page),
            )
    return Advice("nothing", Reason(NEEDS_NONE))


def _with_package(platform: Platform, package: Package) -> Platform:
    """The same machine if `package` were installed, and Triton, which comes with torch or beside it."""
    packages = dict(platform.packages)
    triton = f"{TRITON_OF_TORCH.get(_minor(platform), '3.6')}.0"
    packages.setdefault("triton-windows" if platform.os == "win32" else "triton", triton)
    packages[package.distribution] = package.version
    machine = package.setting.on(platform) if package.setting else platform
    return replace(machine, packages=tuple(packages.items()), described=True)


def _advice(package: Package, platform: Platform, interpreter: Interpreter) -> Advice:
    facts = {
        "page": package.page,
        "tags": tags(platform, interpreter),
        "pip": pip_install((), platform, interpreter),
        "torch": platform.torch,
    }
    notes = [package.note.format(**facts)]
    if package.needs_triton and platform.os == "win32" and platform.version("triton-windows") is None:
        triton = TRITON_OF_TORCH.get(_minor(platform))
        if triton:
            command = pip_install((f"triton-windows=={triton}.*",), platform, interpreter)
            notes.append(Reason(NEEDS_TRITON, command=command))
        else:
            page = "https://github.com/triton-lang/triton-windows"
            notes.append(Reason(NEEDS_SOME_TRITON, page=page))
    notes.append(package.note_on(platform))
    note = Reason("all", reasons=tuple(map(as_reason, filter(None, notes)))) if any(notes) else ""
    if interpreter.refuses:
        use = "ask again with the Python that runs ComfyUI, or with one of a virtual environment"
        return Advice("page", f"this Python {interpreter.refuses}; {use}", Reason(PROJECT, page=facts["page"]))
    arguments = package.arguments(platform, interpreter.machine)
    if arguments:
        return Advice("command", pip_install(arguments, platform, interpreter), note)
    return Advice("page", package.how.format(**facts), note)


def pip_install(arguments: tuple[str, ...], platform: Platform, interpreter: Interpreter) -> str:
    """The command line that installs into exactly this interpreter, quoted for the platform's shell."""
    return _quoted((interpreter.path, "-m", "pip", "install", *arguments), platform)


def tags(platform: Platform, interpreter: Interpreter) -> str:
    """What a compiled wheel must match, as people look for it in file names."""
    parts = [
        f"Python {interpreter.python} (or abi3)",
        f"torch {_minor(platform)}" if platform.torch else "",
        f"CUDA {platform.cuda}" if platform.cuda else "",
        platform.sm or platform.gfx or "",
        interpreter.machine,
    ]
    return ", ".join(filter(None, parts))


def _quoted(words: tuple[str, ...], platform: Platform) -> str:
    if platform.os == "win32":
        return " ".join(f'"{word}"' if re.search(r"[^\w.:\\/=+*\[\]~-]", word) else word for word in words)
    return shlex.join(words)


def _minor(platform: Platform) -> str:
    return ".".join(platform.torch.split(".")[:2])


TRITON_OF_TORCH = {
    "2.6": "3.2", "2.7": "3.3", "2.8": "3.4", "2.9": "3.5", "2.10": "3.6", "2.11": "3.6", "2.12": "3.7",
}  # fmt: skip
"""The Triton that each torch declares on Linux; triton-windows has the same versions."""
