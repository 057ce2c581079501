"""How many statements the library has in some commits, by its syntax trees, without what gives a log-sum-exp.

Of the last column's statements docstrings are none.

Run: python benchmarks/statements.py COMMIT ...
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    for inner in ast.iter_child_nodes(node):
        if "lse" not in str(getattr(inner, "name", "")).split("_"):
            if isinstance(inner, ast.stmt):
                yield inner
            yield from statements(inner)


for commit in sys.argv[1:]:
    packed = subprocess.check_output(["git", "archive", commit, "backends"], cwd=ROOT)
    found: list[ast.stmt] = []
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        for member in files:
            if member.name.endswith(".py") and not member.name.endswith(("/lse.py", "/merge.py")):
                found += statements(ast.parse(files.extractfile(member).read()))  # type: ignore[union-attr]
    texts = sum(isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) for one in found)
    print(commit, len(found), len(found) - texts)
