"""A backend's id is a literal in its own file, in the list and in the menu's order, and else only where it is said why.

What is true of a backend is declared in its file, so no other file has to know which one it is.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Set
from pathlib import Path

import pytest
from attention_backends.backends.kernels import registry

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("backends", "cli", "nodes", "comparison", "demo", "devtools")

MEMBERS = "the members of a backend group, best first"
PACKAGE, MODULE = "the name of a package or module", "ComfyUI's Python package"
LABEL, WORKFLOW = "a word, not the backend", "a workflow for the demo"

EXCEPTIONS: dict[str, dict[str, str]] = {
    "backends/kernels/flash_attn.py": dict.fromkeys(("flash_attn_2", "flash_attn_3", "flash_attn_4", "aiter"), MEMBERS),
    "backends/kernels/flash_attn_2.py": {"flash_attn": PACKAGE},
    "backends/kernels/sage_attn.py": dict.fromkeys(
        ("sage_fp16_triton", "sage_fp16_cuda", "sage_fp8_cuda", "sage_fp8_sm90"),
        "the kernels of the same package that its own function picks from: each id once",
    ),
    "backends/kernels/xformers.py": {"flash_attn": PACKAGE},
    "backends/sparse/methods/sol.py": {"sage_attn": "SGLang's word for an option's value"},
    "comparison/bench_report.py": {"cudnn_attn": "the second backend that ratios are to", "reference": LABEL},
    "comparison/tables.py": {"reference": LABEL},
    "comparison/quality_chart.py": {"reference": LABEL},
    "devtools/comfyui.py": {"comfy": MODULE},
    "devtools/contracts/uses.py": dict.fromkeys(
        ("xformers", "flash_attn", "aiter", "flash_attn_2", "flash_attn_3", "flash_attn_4"), PACKAGE
    ),
    "devtools/demo.py": {"torch_sdpa": WORKFLOW, "sdpa_math": WORKFLOW},
    "nodes/configure/selector.py": {"xformers": "a word for the node search"},
    "nodes/configure/schedule.py": {"torch_sdpa": "the frozen default of a node's input"},
    "nodes/http/forecast.py": dict.fromkeys(("torch_sdpa", "xformers"), "what ComfyUI's functions of that name run"),
    **{f"nodes/hook/{file}.py": {"comfy": MODULE} for file in ("callers", "foreign_code", "origins", "other_packs")},
}
"""File -> id -> why it stands there."""

ONCE = {
    "backends/kernels/sage_attn.py",
    "nodes/configure/schedule.py",
    "comparison/bench_report.py",
    "backends/sparse/methods/sol.py",
}
"""Where each of them stands once."""

LISTS = {
    "backends/kernels/registry.py": {"MODULES"},
    "backends/config/names.py": {"MENU", "COMFY", "FAVOURITES"},
    "backends/engine/priorities.py": {"PRIORITIES", "LAST_RESORT"},
}
"""File -> the assignments in which ids are data: lists, and the two that have a name."""

CONSTANTS = {"COMFY", "LAST_RESORT"}
"""The ids that have a name; comparing with one is the same as comparing with the literal."""

NAMED: dict[str, set[str]] = {
    "backends/engine/routers.py": {"COMFY"},  # puts another one in its place, outside ComfyUI
    "backends/engine/router.py": {"COMFY", "LAST_RESORT"},  # what is left when nothing else runs
    "backends/engine/session.py": {"COMFY"},  # whether a person asked for it
    "comparison/bench_command.py": {"COMFY"},
    "comparison/bench_report.py": {"COMFY", "LAST_RESORT"},
    "comparison/bench_run.py": {"COMFY"},
    "comparison/contenders.py": {"COMFY", "LAST_RESORT"},
    "comparison/run.py": {"COMFY"},
    "nodes/compare/compare_runs.py": {"COMFY"},
    "nodes/http/forecast.py": {"COMFY"},
    "nodes/hook/comfy_functions.py": {"COMFY"},  # the label of ComfyUI's own functions
    "nodes/hook/hook_calls.py": {"COMFY"},
    "nodes/hook/hook_plans.py": {"COMFY", "LAST_RESORT"},
}
"""Which of them a file takes. In the doctor and in what is observed none does: they ask what a backend declares."""


def _files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _own(path: Path) -> set[str]:
    """The ids that a file declares."""
    module = ".".join(path.relative_to(ROOT / "backends").with_suffix("").parts) if "backends" in path.parts else ""
    return {name for name, where in registry.MODULES.items() if where == module}


def foreign(path: Path) -> list[str]:
    """The ids that stand as literals in a file that neither declares them nor lists them there."""
    own = _own(path)
    return [
        name for name in literals(path.read_text(encoding="utf-8"), LISTS.get(_name(path), set())) if name not in own
    ]


def literals(text: str, lists: Set[str] = frozenset()) -> Iterator[str]:
    """Every id that stands in a source as a string by itself, but for what is assigned to a name of `lists` at the top.

    Docstrings and longer texts are prose.
    """
    for statement in ast.parse(text).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
        if not lists.isdisjoint(target.id for target in targets if isinstance(target, ast.Name)):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Constant) and node.value in registry.MODULES:
                yield str(node.value)


def constants(text: str) -> set[str]:
    """The ids with a name that a source takes from elsewhere."""
    imports = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom))
    return {alias.name for node in imports for alias in node.names} & CONSTANTS


@pytest.mark.parametrize("path", _files(), ids=_name)
def test_no_id_is_a_literal_outside_its_file(path: Path) -> None:
    allowed = EXCEPTIONS.get(_name(path), {})
    found = Counter(foreign(path))
    assert not set(found) - set(allowed), f"declare it in the backend's file, or say here why not: {dict(found)}"
    assert _name(path) not in ONCE or all(count == 1 for count in found.values()), dict(found)


def test_every_exception_is_needed() -> None:
    needed = {(_name(path), name) for path in _files() for name in foreign(path)}
    assert {(file, name) for file, ids in EXCEPTIONS.items() for name in ids} == needed


@pytest.mark.parametrize("path", _files(), ids=_name)
def test_no_id_with_a_name_decides_what_a_declaration_could(path: Path) -> None:
    assert constants(path.read_text(encoding="utf-8")) == NAMED.get(_name(path), set())


def test_a_literal_is_seen() -> None:
    assert list(literals('"""flash_attn"""\nif name in ("sage_attn", "sage attn"): pass\n')) == [
        "flash_attn",
        "sage_attn",
    ]
    assert [*literals("KINDS = {'aiter': 1}")] == ["aiter"]
    assert [*literals("MENU: tuple[str, ...] = ('aiter',)\nMORE = ('xformers',)", {"MENU"})] == ["xformers"]
    assert constants("from .names import AUTO, COMFY") == {"COMFY"}
