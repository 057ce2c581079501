"""The subcommands of dev.py and their command line."""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

from . import comfyui as comfy
from .console import Stop, make_output_safe, say
from .demo import demo
from .doctor import card, doctor
from .environment import prepare, version_in
from .web import prepare_web

HELP = {
    "setup": "make .venv with pinned needs, and those of a ComfyUI where one is found",
    "demo": "run a tiny model in a real ComfyUI with two backends and show what ran",
    "test": "ruff, mypy and all tests, or the rings that are named (test pure); after -- arguments of pytest",
    "bench": "measure what the pack costs and gains here, and compare with the results before; or one: bench overhead",
    "lint": "ruff, its layout of the code, and mypy",
    "doctor": "each backend: available, or why not and how to get it",
    "card": "measure what this card does within --minutes 6: one JSON and one page in benchmarks/results/<card>/",
    "contracts": "compare what kernels use of other packages with their published sources (reads the package index)",
    "docs": "write the pages of docs/ that are made from the code",
}


def main(root: Path) -> int:
    make_output_safe()
    # Ended by a signal, the server that was started must be stopped too: leave through the `finally` blocks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(prog="dev.py", description="Everything that one does with this folder.")
    parsers = parser.add_subparsers(dest="command", metavar="command")
    for name, text in HELP.items():
        parsers.add_parser(name, help=text, description=text)
    options, rest = parser.parse_known_args()
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return _run(root, options.command, rest)
    except Stop as problem:
        print(problem, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(root: Path, command: str, rest: list[str]) -> int:
    if command == "test":
        return _test(root, rest)
    if rest[:1] == ["--"]:
        rest = rest[1:]
    if command in ("setup", "demo", "lint", "docs") and rest:
        raise Stop(f"dev.py {command} takes no arguments, got: {' '.join(rest)}")
    if command == "setup":
        _prepare_and_say(root)
        return 0
    if command == "demo":
        return demo(root)
    if command == "lint":
        return _lint(root, prepare(root))
    if command == "doctor":
        return doctor(root, rest)
    if command == "card":
        return card(root, rest)
    if command == "bench":
        return _bench(root, rest)
    inside = root / "devtools" / "inside"
    script = inside / ("read_contracts.py" if command == "contracts" else "write_docs.py")
    return _call(root, prepare(root), str(inside / "with_package.py"), str(script), *rest)


def _prepare_and_say(root: Path) -> tuple[Path, comfy.ComfyUI | None]:
    found = comfy.find(root)
    python = prepare(root, found.path if found else None)
    say(f"Python {_version_of(python)}, torch {version_in(python, 'torch')}, {python}")
    say(f"{found}" if found else "No ComfyUI was found: what needs one is skipped. " + comfy.HOW_TO_GET_ONE)
    if found is not None and found.python is not None:
        say(f"ComfyUI runs with its own interpreter {found.python}")
    return python, found


RINGS = {
    "pure": "choosing and configuring, without torch",
    "project": "this folder itself: pages, sources, archive, commands, hostile files, the golden set",
    "numeric": "kernels, masks and the Python API, with torch",
    "integrations": "real models of Diffusers with tiny weights",
    "comfyui": "the hook, the nodes and the server in a real ComfyUI",
    "browser": "the front end in a Chromium",
}
"""The folders of tests/, from the fastest to the slowest."""


def _test(root: Path, words: list[str]) -> int:
    """Lint and run all tests; one ring or several are run alone, without linting."""
    rings = list(itertools.takewhile(RINGS.__contains__, words))
    arguments = words[len(rings) :]
    if arguments and not arguments[0].startswith("-"):
        listed = "".join(f"\n  {name:12} {text}" for name, text in RINGS.items())
        raise Stop(f"No ring of tests is called {arguments[0]}; there are:{listed}\nArguments of pytest follow --")
    if arguments[:1] == ["--"]:
        arguments = arguments[1:]
    with ThreadPoolExecutor(1) as beside:  # npm and pip wait for the network
        packages = beside.submit(prepare_web, root) if not rings or "browser" in rings else None
        python, found = _prepare_and_say(root)
        if packages is not None:
            packages.result()
    linted = 0 if rings else _style(root, python)
    with _types_beside(root, python) if not rings else nullcontext() as types:
        say("pytest")
        # A file's tests stay in one process: many share a model or a server that takes seconds to make.
        command = ["-m", "pytest", "-n", "auto", "--dist", "loadfile", *(f"tests/{ring}" for ring in rings), *arguments]
        tested = _call(root, python, *command, comfyui=found)
        if types is not None:
            say("mypy")
            say(types.communicate()[0].strip())
            linted = linted or types.returncode
    if linted:
        say("The tests are not all: ruff or mypy found something, see above.")
    return tested or linted


def _lint(root: Path, python: Path) -> int:
    style = _style(root, python)
    say("mypy")
    return _call(root, python, str(_types(root))) or style


def _style(root: Path, python: Path) -> int:
    say("ruff check")
    rules = _call(root, python, "-m", "ruff", "check", ".")
    say("ruff format --check")
    return _call(root, python, "-m", "ruff", "format", "--check", *FORMATTED) or rules


def _types(root: Path) -> Path:
    return root / "devtools" / "inside" / "check_types.py"


@contextmanager
def _types_beside(root: Path, python: Path) -> Iterator[subprocess.Popen[str]]:
    """mypy while the tests begin: it takes one core for a minute, and what it says is read at the end."""
    command = [str(python), str(_types(root))]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as types:
        try:
            yield types
        finally:
            types.terminate()


FORMATTED = (
    *("backends", "benchmarks", "cli", "comparison", "demo", "devtools", "integrations", "nodes", "tests"),
    *("__init__.py", "__main__.py", "dev.py"),
)
"""All code. ruff would also set the examples in README.md, whose comments stand in columns."""


def _bench(root: Path, names: list[str]) -> int:
    """Run benchmarks/suite.py, or the scripts that are named; words that begin with `-` go to the script."""
    flags = [name for name in names if name.startswith("-")]
    wanted = [name for name in names if not name.startswith("-")] or ["suite"]
    scripts = {path.stem: path for path in sorted((root / "benchmarks").glob("*.py"))}
    unknown = [name for name in wanted if name not in scripts]
    if unknown:
        raise Stop(f"No benchmark is called {' or '.join(unknown)}; there are: {', '.join(scripts) or 'none'}.")
    chosen = [scripts[name] for name in wanted]
    python, found = _prepare_and_say(root)
    runner = str(root / "devtools" / "inside" / "with_package.py")
    status = 0
    for path in chosen:
        say(f"\n{path.name}")
        status = _call(root, python, runner, str(path), *flags, comfyui=found) or status
    return status


def _call(root: Path, python: Path, *command: str, comfyui: comfy.ComfyUI | None = None) -> int:
    environ = dict(os.environ)
    if comfyui is not None:
        environ["COMFYUI_PATH"] = str(comfyui.path)
    return subprocess.run([str(python), *command], cwd=root, env=environ).returncode


def _version_of(python: Path) -> str:
    code = "import platform; print(platform.python_version())"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True).stdout.strip()
