"""Which part may import which: the rules that keep the library free of ComfyUI, and kernels free of one another."""

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
    "cli": {"backends", "comparison", "demo"},
    "nodes": {"backends", "comparison", "demo", "nodes"},
}
FOR_KERNELS = {
    *("backend", "family", "kernel_support", "limits", "machine", "mask", "memory", "names", "options", "platform"),
    *("request", "versions"),
}
"""What a file of kernels/ may import of the library."""


def _imported(path: Path) -> Iterator[str]:
    """What a file imports, those inside functions too: `comfy.utils`, and our own as `backends.mask.plan`."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            whole = [*above, *filter(None, [node.module])]
            yield from (".".join([*whole, alias.name]) for alias in node.names)


def _files() -> list[Path]:
    return sorted([ROOT / "cli.py", *(path for part in MAY_IMPORT for path in (ROOT / part).rglob("*.py"))])


@pytest.mark.parametrize("path", _files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_part_imports_only_what_it_may(path: Path) -> None:
    part = path.relative_to(ROOT).with_suffix("").parts[0]
    for name in _imported(path):
        first = name.split(".")[0]
        assert first not in MAY_IMPORT or first in MAY_IMPORT[part], name
        assert first not in COMFYUI or part == "nodes", name


@pytest.mark.parametrize("path", sorted((ROOT / "backends" / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_do_not_know_one_another(path: Path) -> None:
    for name in _imported(path) if path.name != "__init__.py" else ():
        parts = name.split(".")
        if parts[0] == "backends":
            assert parts[1] in FOR_KERNELS, name


def test_files_that_comments_and_docs_name_are_there() -> None:
    parts = (*MAY_IMPORT, "benchmarks", "devtools", "tests")
    ours = [f"/{path.relative_to(ROOT).as_posix()}" for part in parts for path in (ROOT / part).rglob("*.py")]
    for path in (*_files(), *(ROOT / "docs").rglob("*.md")):
        for name in re.findall(r"`([\w/]+\.py)`", path.read_text(encoding="utf-8")):
            assert any(file.endswith(f"/{name}") for file in (*ours, "/cli.py", "/dev.py")), (path.name, name)


@pytest.mark.parametrize("path", _files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_that_a_comment_names_is_found_from_where_it_stands(path: Path) -> None:
    """In its own folder or in one above it: after a move the bare name may be that of another file."""
    above = path.relative_to(ROOT).parents
    for name in re.findall(r"`([\w/]+\.py)`", path.read_text(encoding="utf-8")):
        assert any((ROOT / folder / name).is_file() for folder in above), name


def test_the_maps_of_the_library_and_of_the_nodes_name_every_file() -> None:
    for part in ("backends", "nodes"):
        text = (ROOT / part / "__init__.py").read_text(encoding="utf-8")
        for path in (ROOT / part).iterdir():
            if (path / "__init__.py").is_file() or (path.suffix == ".py" and path.stem != "__init__"):
                assert re.search(rf"\b{path.stem}\b", text), f"{part}/{path.name}"
