"""Phrases that CONTRIBUTING.md forbids are in no comment, docstring or page for developers."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = (
    "backends",
    "nodes",
    "comparison",
    "devtools",
    "benchmarks",
    "demo",
    "cli",
    "dev.py",
    "__init__.py",
    "__main__.py",
)
PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md", "docs/adr")


@lru_cache(maxsize=1)
def forbidden() -> re.Pattern[str]:
    """The phrases that CONTRIBUTING.md quotes; spaces in them match line ends and the `#` of a comment too."""
    rule = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("**Plain words**")[2].partition("\n- **")[0]
    phrases = [re.escape(phrase).replace(r"\ ", r"[\s#]+") for phrase in re.findall(r'"([^"]+)"', rule)]
    assert len(phrases) > 10
    return re.compile(rf"(?<![\w`\".-])(?:{'|'.join(phrases)})(?![\w`\"-])", re.IGNORECASE)


def prose_of(source: str) -> list[str]:
    """The comments of a Python file, those of neighbouring lines together, and its docstrings."""
    comments: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            comments[line] = f"{comments.pop(line - 1, '')} {token.string}"
    texts = [
        node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return [*comments.values(), *texts]


def found_in(path: Path) -> list[str]:
    source = path.read_text(encoding="utf-8")
    texts = prose_of(source) if path.suffix == ".py" else [source]
    return [
        " ".join(match[0].replace("#", " ").split()).lower() for text in texts for match in forbidden().finditer(text)
    ]


def files(places: tuple[str, ...], suffix: str) -> list[Path]:
    found = [ROOT / place for place in places]
    return sorted(file for path in found for file in (path.rglob(f"*{suffix}") if path.is_dir() else [path]))


def counted() -> dict[str, Counter[str]]:
    """File -> its forbidden phrases with their numbers."""
    all_files = [*files(CODE, ".py"), *files(PAGES, ".md")]
    return {path.relative_to(ROOT).as_posix(): Counter(phrases) for path in all_files if (phrases := found_in(path))}


def test_no_forbidden_phrase() -> None:
    assert counted() == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""What the host is told."""', 1),
        ("x = 1  # passed on as\n# it is", 1),
        ("# whoever\ny = 2\n# held", 2),
        ('text = "what the host is told"', 0),
        ("told = put_off = 1", 0),
    ],
)
def test_the_scan_finds_them(source: str, expected: int) -> None:
    assert sum(len(forbidden().findall(text)) for text in prose_of(source)) == expected
