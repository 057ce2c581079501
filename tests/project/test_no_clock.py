"""No test judges by a clock: a busy machine would fail it. Tests count modules, calls, allocations; times belong to
benchmarks/."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
CLOCKS = re.compile(
    r"(perf_counter|monotonic|process_time|thread_time|clock_gettime)(_ns)?|getrusage|timeit|default_timer|time_ns"
)
IN_TEXT = re.compile(rf"\b(({CLOCKS.pattern})\(|time\.time\(|os\.times\(|datetime\.now\()")
"""In a script that a test runs in a process of its own."""
DURATION = re.compile(r"(^|_)(seconds|secs|elapsed|duration|wall|milliseconds|latency)(_|$)", re.IGNORECASE)

_WORK = "CPU time and memory of hostile inputs in a process of their own: what they cost before was minutes"
ALLOWED = {
    ("rank_worker.py", "time.monotonic"): "a limit of 10 seconds or more for ranks that must not hang",
    ("comfyui/test_measured_file.py", "time.time"): "a stamp in a file, compared with no duration",
    ("hostile_process.py", "time.process_time"): _WORK,
    ("hostile_process.py", "resource"): _WORK,
}


def clocks(source: str) -> Iterator[str]:
    """What a source takes from a clock, and asserts with an upper bound on a time that somebody else took."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            for name in (alias.name for alias in node.names):
                if CLOCKS.fullmatch(name) or (node.module, name) == ("time", "time"):
                    yield f"{node.module}.{name}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in ("timeit", "resource"))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            dotted = f"{node.value.id}.{node.attr}"
            if CLOCKS.fullmatch(node.attr) or dotted in ("time.time", "os.times", "datetime.now"):
                yield dotted
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = IN_TEXT.search(node.value)
            if found:
                yield f"text: {found.group(1)}"
        elif isinstance(node, ast.Assert):
            yield from _bounded(node.test)


def _bounded(test: ast.expr) -> Iterator[str]:
    for node in ast.walk(test):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        for left, operator, right in zip(sides, node.ops, sides[1:], strict=False):
            if isinstance(operator, (ast.Gt, ast.GtE)):
                left, right = right, left
            elif not isinstance(operator, (ast.Lt, ast.LtE)):
                continue
            if isinstance(right, ast.Constant) and any(DURATION.search(word) for word in _words(left)):
                yield f"assert {ast.unparse(node)}"


def _words(node: ast.expr) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def test_no_test_judges_by_a_clock() -> None:
    found = {
        (path.relative_to(TESTS).as_posix(), name)
        for path in sorted(TESTS.rglob("*.py"))
        if path.name != Path(__file__).name
        for name in clocks(path.read_text(encoding="utf-8"))
    }
    assert found - set(ALLOWED) == set()
    assert set(ALLOWED) - found == set(), "a reason that is no longer of use"


@pytest.mark.parametrize(
    "source",
    [
        "from time import perf_counter",
        "import time\nstart = time.monotonic()",
        "import timeit",
        "SCRIPT = 'import time; start = time.process_time()'",
        "assert report['seconds'] < 5",
        "assert 0 < elapsed <= 2",
        "assert 3 > outcome.duration",
        "assert max(row.seconds for row in rows) < 0.5",
    ],
)
def test_the_scan_sees(source: str) -> None:
    assert list(clocks(source))


@pytest.mark.parametrize(
    "source",
    [
        "monkeypatch.setattr(bench, 'perf_counter', lambda: now[0])",
        "assert run['seconds'] > 0",
        "time.sleep(0.05)",
        "assert clock.now < 5",
    ],
)
def test_the_scan_leaves_alone(source: str) -> None:
    assert not list(clocks(source))
