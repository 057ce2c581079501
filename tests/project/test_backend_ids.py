"""A backend's id is a literal in its own file, in the list and in the menu's order, and else only where it is said why.

What is true of a backend is declared in its file, so no other file has to know which one it is.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from attention_backends.backends.config import names
from attention_backends.backends.engine import priorities as routes
from attention_backends.backends.kernels import registry

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("backends", "nodes", "comparison", "demo", "devtools")

MEMBERS = "the members of a backend group, best first"
PACKAGE, MODULE = "the name of a package or module", "ComfyUI's Python package"
LABEL, WORKFLOW = "a word, not the backend", "a workflow for the demo"

EXCEPTIONS: dict[str, dict[str, str]] = {
    "flash_attn.py": {**dict.fromkeys(("flash_attn_2", "flash_attn_3", "flash_attn_4", "aiter"), MEMBERS)},
    "flash_attn_2.py": {"flash_attn": PACKAGE},
    "xformers.py": {"flash_attn": PACKAGE},
    "sage_attn.py": dict.fromkeys(
        ("sage_fp16_triton", "sage_fp16_cuda", "sage_fp8_cuda", "sage_fp8_sm90"),
        "the kernels of the same package that its own function picks from: each id once",
    ),
    "planned_options.py": {"sage_attn": "SGLang's word for an option's value"},
    "schedule.py": {"torch_sdpa": "the frozen default of a node's input"},
    "bench_report.py": {"cudnn_attn": "the second backend that ratios are to", "reference": LABEL},
    **{file: {"reference": LABEL} for file in ("chart.py", "picture.py", "tables.py")},
    **{file: {"comfy": MODULE} for file in ("callers.py", "foreign_code.py", "others.py", "whose.py", "comfyui.py")},
    "demo.py": {"torch_sdpa": WORKFLOW, "sdpa_math": WORKFLOW},
}
"""File -> id -> why it stands there. By name alone: which folder the file is in says nothing here."""

ONCE = {"sage_attn.py", "schedule.py", "bench_report.py", "planned_options.py"}
"""Where each of them stands once."""


def _files() -> list[Path]:
    return [*sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")), ROOT / "cli.py"]


def _own(path: Path) -> set[str]:
    """The ids that a file declares, or that it is a list of."""
    module = ".".join(path.relative_to(ROOT / "backends").with_suffix("").parts) if "backends" in path.parts else ""
    declared = {name for name, where in registry.MODULES.items() if where == module}
    lists = {Path(str(module.__file__)) for module in (registry, names, routes)}
    return set(registry.MODULES) if path in lists else declared


def literals(text: str) -> Iterator[str]:
    """Every id that stands in a source as a string by itself; docstrings and longer texts are prose."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and node.value in registry.MODULES:
            yield str(node.value)


@pytest.mark.parametrize("path", _files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_id_is_a_literal_outside_its_file(path: Path) -> None:
    allowed = EXCEPTIONS.get(path.name, {})
    found = Counter(name for name in literals(path.read_text(encoding="utf-8")) if name not in _own(path))
    assert not set(found) - set(allowed), f"declare it in the backend's file, or say here why not: {dict(found)}"
    assert path.name not in ONCE or all(count == 1 for count in found.values()), dict(found)


def test_every_exception_is_needed() -> None:
    needed = {
        (path.name, name)
        for path in _files()
        for name in literals(path.read_text(encoding="utf-8"))
        if name not in _own(path)
    }
    assert {(file, name) for file, ids in EXCEPTIONS.items() for name in ids} == needed


def test_a_literal_is_seen() -> None:
    assert list(literals('"""flash_attn"""\nif name in ("sage_attn", "sage attn"): pass\n')) == [
        "flash_attn",
        "sage_attn",
    ]
    assert [*literals("KINDS = {'aiter': 1}")] == ["aiter"]
