"""What is declared about the pack equals what is there."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from make_workflows import TITLES
from workflow_graphs import EMBEDDED_WORKFLOWS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).resolve().parents[2]
NOT_PACKAGED = {"benchmarks", "build", "devtools", "dist", "tests"}


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _lines(name: str) -> list[str]:
    return (ROOT / name).read_text(encoding="utf-8").split("\n")[:-1]


def _sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted([*ROOT.glob("*.py"), *found])


def _imported(path: Path) -> Iterator[str]:
    """Top-level names of the absolute imports of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def test_requirements_txt_equals_the_run_time_needs(pyproject: dict[str, Any]) -> None:
    assert _lines("requirements.txt") == pyproject["project"]["dependencies"]


def test_requirements_dev_txt_equals_the_dev_group(pyproject: dict[str, Any]) -> None:
    assert _lines("requirements-dev.txt") == pyproject["project"]["optional-dependencies"]["dev"]


def test_torch_is_no_need_of_ours(pyproject: dict[str, Any]) -> None:
    groups = pyproject["project"]["optional-dependencies"]
    assert set(groups) == {"flash", "sage", "flashinfer", "diffusers", "dev"}
    for need in [*pyproject["project"]["dependencies"], *(need for group in groups.values() for need in group)]:
        assert not need.startswith("torch")


def test_the_package_list_equals_the_folders(pyproject: dict[str, Any]) -> None:
    folders = {
        path.parent.relative_to(ROOT)
        for path in ROOT.rglob("__init__.py")
        if not any(part in NOT_PACKAGED or part.startswith(".") for part in path.relative_to(ROOT).parts)
    }
    names = {".".join(["attention_backends", *folder.parts]) for folder in folders}
    assert set(pyproject["tool"]["setuptools"]["packages"]) == names


def test_the_front_end_folder_is_named_once(pyproject: dict[str, Any]) -> None:
    """ComfyUI serves the folder of each name it finds, under two addresses, and the page loads each script of both."""
    import attention_backends

    assert (ROOT / attention_backends.WEB_DIRECTORY / "attention.js").is_file()
    assert "web" not in pyproject["tool"]["comfy"]


def test_the_root_offers_only_the_v3_entry_point() -> None:
    # ComfyUI ignores comfy_entrypoint where it finds NODE_CLASS_MAPPINGS.
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    defined = {node.name for node in tree.body if isinstance(node, ast.AsyncFunctionDef)}
    assert "NODE_CLASS_MAPPINGS" not in names
    assert defined == {"comfy_entrypoint"}
    assert not [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


def test_dev_py_needs_only_the_standard_library() -> None:
    for path in [ROOT / "dev.py", *(ROOT / "devtools").glob("*.py")]:
        foreign = set(_imported(path)) - sys.stdlib_module_names - {"devtools"}
        assert not foreign, f"{path.name} imports {sorted(foreign)}"


def test_ci_calls_dev_py_test_and_nothing_else() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = [line for line in script.splitlines() if line and not line.startswith("#")]
    assert commands[-1] == "exec python3 dev.py test"
    assert all(line.startswith(("set ", "cd ")) for line in commands[:-1])


@pytest.mark.parametrize(
    "path",
    _sources("backends", "comparison", "nodes", "demo", "devtools"),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_every_text_can_be_printed_on_a_windows_console(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                node.value.encode("cp1252")
            except UnicodeEncodeError as error:
                pytest.fail(f"line {node.lineno}: {error}")


def test_every_python_file_is_safe_on_windows() -> None:
    """What reads one there without naming an encoding gets code page 1252; comfy-test asks for the same."""
    folders = [path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for path in _sources(*folders):
        if "node_modules" not in path.parts:
            path.read_text(encoding="utf-8").encode("cp1252")


def test_comfy_test_runs_every_workflow_that_needs_no_files() -> None:
    said = tomllib.loads((ROOT / "comfy-test.toml").read_text(encoding="utf-8"))["test"]
    assert (ROOT / said["custom"]).is_file()
    assert said["workflows"]["cpu"] == said["workflows"]["cuda"] == sorted(TITLES[name] for name in EMBEDDED_WORKFLOWS)
