"""Which part may import which: the order of folders, and that the library stays free of ComfyUI."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = {
    *("app", "comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfyui_version", "execution"),
    *("folder_paths", "latent_preview", "node_helpers", "server"),
}
MAY_IMPORT = {
    "backends": {"backends"},
    "demo": {"backends", "demo"},
    "comparison": {"backends", "comparison", "demo"},
    "cli": {"backends", "cli", "comparison", "demo"},
    "integrations": {"backends", "integrations"},
    "nodes": {"backends", "comparison", "demo", "nodes"},
}
FLOORS = {
    "backends": (
        "values",
        "kernels",
        "sparse",
        "measure",
        "config",
        "report",
        "engine",
        "observe",
        "cards",
        "parallel",
        "doctor",
        "api",
    ),
    "nodes": ("history", "hook", "configure", "report", "compare", "http"),
}
"""Folders from the lowest up; files beside them may import all of these. Each imports what stands before it alone."""
FILES_BELOW = {"nodes": ("inputs",)}
"""Files beside the folders that every folder may import; they import none of the folders."""


def _imported(path: Path) -> Iterator[str]:
    """What a file imports, in functions and for types too: `comfy.utils`, and our own as `backends.engine.plan`."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            whole = [*above, *filter(None, [node.module])]
            yield from (".".join([*whole, alias.name]) for alias in node.names)


def _files() -> list[Path]:
    return sorted(path for part in MAY_IMPORT for path in (ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("path", _files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_part_imports_only_what_it_may(path: Path) -> None:
    part = path.relative_to(ROOT).with_suffix("").parts[0]
    for name in _imported(path):
        first = name.split(".")[0]
        assert first not in MAY_IMPORT or first in MAY_IMPORT[part], name
        assert first not in COMFYUI or part == "nodes", name


def _floor(part: str, name: str) -> int | None:
    """Which floor a module of a part is on; None for the files above all folders."""
    second = name.split(".")[1] if "." in name else ""
    if second in FILES_BELOW.get(part, ()):
        return -1
    return FLOORS[part].index(second) if second in FLOORS[part] else None


@pytest.mark.parametrize("part", FLOORS)
def test_folders_import_only_those_below_them(part: str) -> None:
    folders = {path.parent.name for path in (ROOT / part).glob("*/__init__.py")}
    assert folders == set(FLOORS[part])
    up = set()
    for path in (ROOT / part).rglob("*.py"):
        here = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        floor = _floor(part, here)
        if floor is None:
            continue
        for name in _imported(path):
            if name.startswith(f"{part}."):  # `nodes` alone is ComfyUI's
                there = _floor(part, name)
                if there is None or there > floor:
                    up.add((".".join(here.split(".")[:2]), ".".join(name.split(".")[:2])))
    assert not up


def test_the_library_has_few_things_side_by_side() -> None:
    beside = [
        path for path in (ROOT / "backends").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    ]
    assert len(beside) <= 15, sorted(path.name for path in beside)


@pytest.mark.parametrize("path", sorted((ROOT / "backends" / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_do_not_know_one_another(path: Path) -> None:
    shared = {"backend", "broken", "group", "registry", "support"}
    for name in _imported(path) if path.stem not in {*shared, "__init__"} else ():
        parts = name.split(".")
        if parts[:2] == ["backends", "kernels"]:
            assert parts[2] in shared, name


def test_files_that_comments_and_docs_name_are_there() -> None:
    parts = (*MAY_IMPORT, "benchmarks", "devtools", "tests")
    ours = [f"/{path.relative_to(ROOT).as_posix()}" for part in parts for path in (ROOT / part).rglob("*.py")]
    for path in (*_files(), *(ROOT / "docs").rglob("*.md")):
        for name in re.findall(r"`([\w/]+\.py)`", path.read_text(encoding="utf-8")):
            assert any(file.endswith(f"/{name}") for file in (*ours, "/dev.py")), (path.name, name)


@pytest.mark.parametrize("path", _files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_that_a_comment_names_is_found_from_where_it_stands(path: Path) -> None:
    """In its own folder or in one above it: after a move the bare name may be that of another file."""
    above = path.relative_to(ROOT).parents
    for name in re.findall(r"`([\w/]+\.py)`", path.read_text(encoding="utf-8")):
        assert any((ROOT / folder / name).is_file() for folder in above), name
