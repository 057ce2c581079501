"""Do the tests notice a small fault? Seeded mutants of five areas of one commit, each against the area's tests.

A mutant is one change of the syntax tree in a function's body: a comparison flipped or moved by its boundary, an
integer one higher or lower, `and` for `or`, a condition negated, True for False, `is` for `is not`, + for -, a
returned value or a keyword argument dropped. Sites are drawn by a seeded generator from all of an area's files. What
changes no answer is left out by rule (`Sites`): texts of errors and logs, annotations, assertions, defaults of
parameters, decorators.

Each mutant is written into a checkout of the commit, and the area's tests run on one thread until the first failure.
It is killed when a test fails, or when the tests take three times their processor time and 30 s. What is known is
written after each mutant, and a second start with the same file goes on from there.

Run: python benchmarks/mutants.py COMMIT --json FILE [--areas router guard] [--seed 1] [--number 12]
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from resource import RLIMIT_CPU, RUSAGE_CHILDREN, getrusage, setrlimit
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Area(NamedTuple):
    files: tuple[str, ...]
    """Patterns of the files that are changed; those that a commit does not have are left out."""
    tests: tuple[str, ...]
    """Files below tests/, the fastest first: most mutants end in one of the first."""


AREAS = {
    "router": Area(
        ("backends/engine/router.py", "backends/engine/priorities.py"),
        (
            *("pure/test_router.py", "pure/test_routes.py", "pure/test_options.py", "pure/test_registry.py"),
            *("pure/test_flash_on_rdna.py", "numeric/test_lse.py", "project/test_support_table.py"),
            "project/test_golden_set.py",
        ),
    ),
    "hook": Area(
        tuple(f"nodes/hook/{name}.py" for name in ("hook_calls", "hook_plans", "layouts", "override", "model_call")),
        (
            *("comfyui/test_checks.py", "comfyui/test_hook_views.py", "comfyui/test_hook_odd_calls.py"),
            *("comfyui/test_masks_hook.py", "comfyui/test_failed_kernels.py", "comfyui/test_hook_against_stock.py"),
            *("comfyui/test_preference.py", "comfyui/test_hook_replay.py", "comfyui/test_call_facts.py"),
            "comfyui/test_schedule_samplers.py",
        ),
    ),
    "mask plans": Area(
        (
            *("backends/engine/mask_reader.py", "backends/engine/sub_calls.py"),
            *("backends/values/masks.py", "backends/values/mask_plan.py"),
        ),
        (
            *("numeric/test_mask_plan.py", "comfyui/test_masks_hook.py", "comfyui/test_mask_booleans.py"),
            *("numeric/test_varlen.py", "numeric/test_flashinfer.py", "numeric/test_api_blocks.py"),
            *("numeric/test_cpu_operators.py", "comfyui/test_hook_odd_calls.py", "comfyui/test_call_facts.py"),
        ),
    ),
    "guard": Area(
        ("backends/guard/*.py", "backends/observe/guard/*.py"),
        (
            *("numeric/test_guard_turns.py", "numeric/test_precision.py", "comfyui/test_guard_comfyui.py"),
            "numeric/test_guard.py",
        ),
    ),
    "schedule": Area(
        tuple(f"backends/config/{name}.py" for name in ("windows", "timetable", "schedule")),
        (
            *("pure/test_schedule.py", "pure/test_systems.py", "pure/test_config.py", "pure/test_config_print.py"),
            *("pure/test_config_layers.py", "comfyui/test_recommended.py", "comfyui/test_schedule_samplers.py"),
        ),
    ),
}

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {ast.Add: ast.Sub, ast.Sub: ast.Add}
SAME_ANSWER = {"strict", "stacklevel", "maxsize", "exc_info", "repr", "slots"}
"""Keyword arguments that only check or only word."""
LOGS = {"debug", "info", "warning", "error", "exception", "log", "warn", "print"}


class Mutant(NamedTuple):
    file: str
    node: ast.expr | ast.stmt
    changed: ast.AST
    """What stands in the node's place."""
    line: str
    """The line of the source on which the node begins."""


class Sites(ast.NodeVisitor):
    """The mutants of one file."""

    def __init__(self, file: str, source: str) -> None:
        self.file = file
        self.lines = source.splitlines()
        self.found: list[Mutant] = []
        self._in_function = False

    def add(self, node: ast.expr | ast.stmt, changed: ast.AST) -> None:
        if self._in_function:
            line = self.lines[node.lineno - 1].strip()
            self.found.append(Mutant(self.file, node, changed, line))

    def changed(self, node: ast.expr | ast.stmt, **fields: Any) -> None:
        other = copy.copy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        self.add(node, other)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        before, self._in_function = self._in_function, True
        for statement in node.body:
            self.visit(statement)
        self._in_function = before

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def nothing(self, node: ast.AST) -> None:
        """Texts: of an error that is raised, of an assertion."""

    visit_Raise = visit_Assert = visit_JoinedStr = nothing

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in LOGS:
            return
        for keyword in node.keywords:
            if keyword.arg is not None and keyword.arg not in SAME_ANSWER:
                self.changed(node, keywords=[one for one in node.keywords if one is not keyword])
                self.visit(keyword.value)
        for part in (node.func, *(node.args[1:] if name == "cast" else node.args)):
            self.visit(part)

    def visit_Compare(self, node: ast.Compare) -> None:
        for place, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                self.changed(node, ops=[*node.ops[:place], other(), *node.ops[place + 1 :]])
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.changed(node, value=not node.value)
        elif isinstance(node.value, int | float):
            for step in (-1, 1):
                self.changed(node, value=node.value + step)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.changed(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        texts = (ast.JoinedStr, ast.Tuple, ast.List)  # which have no minus
        text = any(isinstance(side, texts) or _is_text(side) for side in (node.left, node.right))
        if type(node.op) in OPERATORS and not text:
            self.changed(node, op=OPERATORS[type(node.op)]())
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.changed(node, value=None)
        self.generic_visit(node)

    def negated(self, node: Any) -> None:
        for test in node.ifs if isinstance(node, ast.comprehension) else [node.test]:
            self.add(test, ast.UnaryOp(ast.Not(), test))
        self.generic_visit(node)

    visit_If = visit_While = visit_IfExp = visit_comprehension = negated


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def mutated(source: str, mutant: Mutant) -> str:
    """The source with the mutant in its node's place, on one line."""
    node = mutant.node
    text = ast.unparse(ast.fix_missing_locations(mutant.changed))
    if isinstance(node, ast.expr):
        text = f"({text})"
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    assert node.end_lineno is not None
    before = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
    after = lines[node.end_lineno - 1][node.end_col_offset :] + b"".join(lines[node.end_lineno :])
    return (before + text.encode() + after).decode()


def one_line(mutant: Mutant) -> str:
    """The mutant as a person reads it, and its key in the file of results."""
    before, after = (" ".join(ast.unparse(node).split()) for node in (mutant.node, mutant.changed))
    where = f"{mutant.file}:{mutant.node.lineno}:{mutant.node.col_offset}"
    return f"{where}: {before}  ->  {after}" + ("" if len(before) > 12 else f"  in  {mutant.line}")


def draw(tree: Path, area: str, seed: int, number: int) -> list[Mutant]:
    """Drawn from the sites of all files of the area, each site once."""
    sites = []
    for pattern in AREAS[area].files:
        for path in sorted(tree.glob(pattern)):
            source = path.read_text(encoding="utf-8")
            found = Sites(path.relative_to(tree).as_posix(), source)
            found.visit(ast.parse(source))
            sites += found.found
    random.Random(f"{seed} {area}").shuffle(sites)
    chosen: dict[tuple[str, int, int], Mutant] = {}
    for mutant in sites:
        chosen.setdefault((mutant.file, mutant.node.lineno, mutant.node.col_offset), mutant)
    return list(chosen.values())[:number]


def run_tests(tree: Path, area: str, limit: int | None, keep_bytecode: bool = False) -> tuple[str, float]:
    """The first failed test, `time` or an empty text, and the processor seconds that it took."""
    tests = [f"tests/{name}" for name in AREAS[area].tests if (tree / "tests" / name).is_file()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not keep_bytecode:
        environ["PYTHONDONTWRITEBYTECODE"] = "1"
    before = _processor_seconds()
    try:
        done = subprocess.run(
            [*command, *tests],
            **{"cwd": tree, "env": environ, "capture_output": True, "text": True, "check": False},
            timeout=None if limit is None else 10 * limit,  # for a test that waits
            preexec_fn=None if limit is None else partial(setrlimit, RLIMIT_CPU, (limit, limit)),
        )
    except subprocess.TimeoutExpired:
        return "time", _processor_seconds() - before
    seconds = _processor_seconds() - before
    if not done.returncode:
        return "", seconds
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if done.returncode < 0 and limit is not None and seconds >= limit - 1:
        return "time", seconds
    return (failed[0] if failed else f"pytest ended with {done.returncode}"), seconds


def _processor_seconds() -> float:
    """Of all processes that ended; a busy machine does not change it."""
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_mutant(tree: Path, area: str, mutant: Mutant, limit: int) -> dict[str, Any]:
    path = tree / mutant.file
    source, times = path.read_text(encoding="utf-8"), path.stat()
    path.write_text(mutated(source, mutant), encoding="utf-8")
    try:
        killed_by, seconds = run_tests(tree, area, limit)
    finally:
        path.write_text(source, encoding="utf-8")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # so that its bytecode stands
    return {"area": area, "mutant": one_line(mutant), "killed_by": killed_by, "seconds": round(seconds, 1)}


def measure(tree: Path, areas: list[str], seed: int, number: int, known: dict[str, Any]) -> Iterator[None]:
    """Fill `known`; stops after each thing that is worth to be written."""
    for area in areas:
        done = {one["mutant"] for one in known["mutants"] if one["area"] == area}
        left = [mutant for mutant in draw(tree, area, seed, number) if one_line(mutant) not in done]
        if not left:
            continue
        failed, seconds = run_tests(tree, area, None, keep_bytecode=True)
        if failed:
            raise SystemExit(f"{area}: the tests fail without a mutant: {failed}")
        known["seconds_without_mutant"][area] = round(seconds, 1)
        for mutant in left:
            known["mutants"].append(run_mutant(tree, area, mutant, limit=int(3 * seconds + 30)))
            yield


def printed(known: dict[str, Any]) -> str:
    lines = []
    for area in AREAS:
        ran = [one for one in known["mutants"] if one["area"] == area]
        if ran:
            lines.append(f"{area:12} {sum(bool(one['killed_by']) for one in ran)}/{len(ran)} killed")
            lines += [f"    survived: {one['mutant']}" for one in ran if not one["killed_by"]]
    killed = sum(bool(one["killed_by"]) for one in known["mutants"])
    return "\n".join([*lines, f"{'all':12} {killed}/{len(known['mutants'])} killed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("--areas", nargs="+", choices=AREAS, default=list(AREAS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--number", type=int, default=12, help="mutants of each area")
    parser.add_argument("--json", type=Path, required=True, help="the results, written after each mutant")
    arguments = parser.parse_args()
    commit = subprocess.check_output(["git", "rev-parse", "--short", arguments.commit], cwd=ROOT, text=True).strip()
    known: dict[str, Any] = {"commit": commit, "seed": arguments.seed, "seconds_without_mutant": {}, "mutants": []}
    if arguments.json.is_file():
        before = json.loads(arguments.json.read_text(encoding="utf-8"))
        if (before["commit"], before["seed"]) != (commit, arguments.seed):
            raise SystemExit(f"{arguments.json} is of commit {before['commit']} and seed {before['seed']}")
        known = before
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, commit)
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], cwd=ROOT, check=True)
        try:
            for _ in measure(tree, arguments.areas, arguments.seed, arguments.number, known):
                arguments.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                last = known["mutants"][-1]
                print(f"{'killed  ' if last['killed_by'] else 'survived'} {last['seconds']:5} s  {last['mutant']}")
                sys.stdout.flush()
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    print(printed(known))


if __name__ == "__main__":
    main()
