"""Sentences that the product says are compared with snapshots, so that other words are one reviewed difference."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
MOST_WORDS = 5
"""A name with its value and limit, which a test may look for by itself."""
ALLOWED = {
    (
        "project/test_support_table.py",
        "batch to 64 with a mask",
    ): "a cell of the page, compared with the kernel's limits",
}


def sentences(source: str) -> Iterator[str]:
    """The sentences that an assert compares something with, or that an error is to match."""
    for node in ast.walk(ast.parse(source)):
        compared: list[ast.expr] = []
        if isinstance(node, ast.Assert):
            for part in ast.walk(node.test):
                if isinstance(part, ast.Compare):
                    compared += part.left, *part.comparators
        elif isinstance(node, ast.keyword) and node.arg == "match":
            compared = [part for part in ast.walk(node.value) if isinstance(part, ast.expr)]
        for part in compared:
            text = part.value if isinstance(part, ast.Constant) else None
            if isinstance(text, str) and len(text.split()) > MOST_WORDS:
                yield text


def test_tests_hold_no_sentence_of_the_product() -> None:
    found = {
        (path.relative_to(TESTS).as_posix(), text)
        for path in sorted(TESTS.glob("*/test_*.py"))
        if path.name != Path(__file__).name
        for text in sentences(path.read_text(encoding="utf-8"))
    }
    assert found - set(ALLOWED) == set(), "compare the text with the fixture `snapshot`"
    assert set(ALLOWED) - found == set(), "a reason that is no longer of use"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("assert text == 'no kernel can run this call here'", 1),
        ("assert not ('no kernel can run this call here' in text)", 1),
        ("with pytest.raises(ValueError, match=re.escape('no kernel can run this call here')):\n    run()", 1),
        ("assert text == snapshot, 'what the reader is told when it fails'", 0),
        ("assert 'head_dim 12' in text", 0),
    ],
)
def test_the_scan_finds_them(source: str, expected: int) -> None:
    assert len(list(sentences(source))) == expected
