"""The archive that ComfyUI's registry serves: what `.comfyignore` leaves out, and what it must not.

comfy-cli packs what git tracks, without what `.comfyignore` names in the manner of `.gitignore`.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
from attention_backends.backends.kernels.registry import MODULES

ROOT = Path(__file__).resolve().parents[2]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@lru_cache(maxsize=1)
def left_out() -> frozenset[str]:
    """Files that .comfyignore hides, by git's own reading of its patterns, which are those of comfy-cli."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--ignored", f"--exclude-from={ROOT / '.comfyignore'}"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return frozenset(listed.splitlines())


def modules_from(path: Path) -> Iterator[Path]:
    """The files of the pack that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(text_of(path))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for place in (base, *(base / alias.name for alias in node.names)):
            yield from (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file())


def imported() -> set[str]:
    """Everything that ComfyUI or the command line can come to import."""
    kernels = (ROOT.joinpath("backends", *module.split(".")).with_suffix(".py") for module in MODULES.values())
    pending, seen = [ROOT / "__init__.py", ROOT / "__main__.py", ROOT / "cli" / "__init__.py", *kernels], set[Path]()
    while pending:
        path = pending.pop()
        if path not in seen:
            seen.add(path)
            pending += modules_from(path)
    return {name_of(path) for path in seen}


def test_the_archive_has_everything_that_the_pack_imports() -> None:
    needed = imported()
    assert {
        "nodes/hook/override.py",
        "backends/kernels/cudnn_attn.py",
        "comparison/bench_run.py",
        "demo/model.py",
    } <= needed
    assert not needed & left_out()


def test_the_archive_has_what_a_user_is_led_to() -> None:
    files = {
        name_of((ROOT / link).resolve())
        for link in re.findall(r"\]\((?![a-z]+:)([^)\s#]+)", text_of(ROOT / "README.md"))
    }
    data = [
        path
        for folder in ("demo/weights", "docs", "locales", "web", "workflows")
        for path in ROOT.glob(f"{folder}/**/*")
    ]
    files |= {name_of(path) for path in data if path.is_file()}
    files |= {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "requirements.txt"}
    assert not files & left_out()


def test_no_page_of_the_archive_leads_out_of_it() -> None:
    hidden = left_out()
    for page in [
        *ROOT.glob("*.md"),
        *(p for f in ("benchmarks", "demo", "docs", "web") for p in (ROOT / f).rglob("*.md")),
    ]:
        for link in re.findall(r"\]\((?![a-z]+:)([^)\s#]+)", text_of(page)):
            target = (page.parent / link).resolve()
            assert not target.is_file() or name_of(target) not in hidden, f"{name_of(page)}: {link}"


def test_the_readme_names_dev_py_only_for_a_checkout() -> None:
    assert "dev.py" in left_out()
    for section in re.split(r"^## ", text_of(ROOT / "README.md"), flags=re.MULTILINE)[1:]:
        title, lines = section.partition("\n")[::2]
        starts = re.findall(r"^.*(?:python3|py) dev\.py.*$", lines, re.MULTILINE)
        assert "checkout" in lines + title or not starts, f"{title}: {starts}"


def test_the_archive_has_nothing_that_only_a_developer_needs() -> None:
    hidden = left_out()
    assert {
        "dev.py",
        "requirements-dev.txt",
        "tests/conftest.py",
        "devtools/environment.py",
        "devtools/stubs/nodes.pyi",
    } <= hidden
    assert {"benchmarks/overhead.py", "demo/train.py", ".ci/run"} <= hidden
    assert "benchmarks/README.md" not in hidden
