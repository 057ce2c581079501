"""Compares what is used or declared here with what a release has: one row for each name, parameter and return."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from .index import Memory, Release
from .signatures import Function, Parameter, Sources, Thing
from .uses import Call, Fake, Gate, Use, fake_functions

SAME, DIFFERENT, UNREAD, ABSENT = "same", "different", "not verifiable", "absent"
"""The results of a row. `ABSENT`: an argument that is passed only to releases that have it, and this one has not."""


class Row(NamedTuple):
    """One name, parameter or return value, looked up in one release."""

    package: str
    version: str
    name: str
    item: str
    """`name`, `returns`, a parameter, or the place of a positional argument."""
    ours: str
    there: str
    state: str
    since: str = ""
    """The first release on the index with this result, where releases disagree."""
    asked: bool = False
    """Passed only to releases that have it."""


Found = Function | Thing | None


def use_rows(use: Use, call: Call | None, release: str, found: Found) -> list[Row]:
    """The rows of one `Use` in one release."""

    def row(item: str, ours: str, there: str, state: str, asked: bool = False) -> Row:
        return Row(use.package, release, use.name, item, ours, there, state, asked=asked)

    name = use.name.rpartition(":")[2].rpartition(".")[2]
    optional = name in use.asked
    if found is None:
        state = UNREAD if use.unread else ABSENT if optional else DIFFERENT
        missing = [row("name", "is used", use.unread or "is not there", state, optional)]
        passed = _passed(use, call) if state == UNREAD else []
        return missing + [row(item, "is passed", use.unread, UNREAD) for item in passed]
    rows = [row("name", "is used", "is there", SAME, optional)]
    if use.calls_unread:
        return [*rows, row("calls", "are made", use.calls_unread, UNREAD)]
    parameters = [one for one in use.asked if one != name]
    if call is None and not parameters:
        return rows
    if isinstance(found, Thing):
        rows += [row(item, "is passed", found.what, UNREAD) for item in _passed(use, call)]
        return rows
    if call is not None:
        rows += [row(*one) for one in _call_rows(use, call, found, parameters)]
    for one in parameters:
        known = found.parameter(one) is not None
        what = "is a parameter" if known else "no such parameter"
        rows.append(row(one, "is passed where it is there", what, SAME if known else ABSENT, True))
    if use.returns:
        lengths = sorted(found.returns)
        fits = any(length in use.returns for length in lengths)
        there = " or ".join(map(str, lengths)) or "what something else returns"
        ours = f"{' or '.join(map(str, use.returns))} is read"
        rows.append(row("returns", ours, there, SAME if fits else DIFFERENT if lengths else UNREAD))
    return rows


def _passed(use: Use, call: Call | None) -> list[str]:
    if call is None:
        return []
    places = [f"argument {place + 1}" for place in range(call.positional)]
    return [*places, *sorted(call.keywords), *(["returns"] if use.returns else [])]


def _call_rows(use: Use, call: Call, found: Function, asked: list[str]) -> list[tuple[str, str, str, str]]:
    rows = []
    order = [*use.order[: call.positional], *[""] * (call.positional - len(use.order))]
    for place, spelled in enumerate(order):
        there = found.positional[place].name if place < len(found.positional) else ""
        spellings = spelled.split("|") if spelled else [there]
        fits = there in spellings if there else found.has("args")
        state = SAME if fits else DIFFERENT
        rows.append((f"argument {place + 1}", spelled.replace("|", " or ") or "is passed", there or "no place", state))
    for keyword in sorted(call.keywords):
        parameter = found.parameter(keyword)
        if parameter is not None:
            rows.append((keyword, "is passed", "is a parameter", SAME))
        elif found.has("kwargs"):
            rows.append((keyword, "is passed", "falls into **, unread", DIFFERENT))
        else:
            rows.append((keyword, "is passed", "no such parameter", DIFFERENT))
    given = {one.name for one in found.positional[: call.positional]} | call.keywords | set(asked)
    for parameter in found.parameters:
        if parameter.default is None and parameter.kind in ("positional", "keyword") and parameter.name not in given:
            rows.append((parameter.name, "is not passed", "has no default", DIFFERENT))
    return rows


def fake_rows(fake: Fake, ours: str, there: str, release: str, declared: Function, found: Found) -> list[Row]:
    """The rows of one function of a fake in one release."""

    def row(item: str, here: str, real: str, state: str) -> Row:
        return Row(fake.package, release, f"{fake.file}.{ours} for {there}", item, here, real, state)

    if not isinstance(found, Function):
        why = fake.unread or (found.what if found else "is not there")
        state = UNREAD if found is not None or fake.unread else DIFFERENT
        return [row("name", "is declared", why, state)]
    rows = [row("name", "is declared", "is there", SAME)]
    real = {one.name: (place, one) for place, one in enumerate(found.parameters)}
    for place, one in enumerate(declared.parameters):
        if one.name not in real:
            # What goes into the release's ** is no parameter; a fake's ** takes the parameters that it omits.
            fits = one.kind in ("args", "kwargs")
            rows.append(row(one.name, _declared(place, one), "no such parameter", SAME if fits else DIFFERENT))
            continue
        at, other = real[one.name]
        same = one.kind == other.kind and one.default == other.default and (one.kind == "keyword" or at == place)
        rows.append(row(one.name, _declared(place, one), _declared(at, other), SAME if same else DIFFERENT))
    names = {one.name for one in declared.parameters}
    for one in found.parameters:
        if one.default is None and one.kind in ("positional", "keyword") and one.name not in names:
            rows.append(row(one.name, "is left out", "has no default", DIFFERENT))
    if declared.returns and found.returns:
        here, real_lengths = (" or ".join(map(str, sorted(one.returns))) for one in (declared, found))
        rows.append(row("returns", here, real_lengths, SAME if declared.returns <= found.returns else DIFFERENT))
    return rows


def _declared(place: int, one: Parameter) -> str:
    where = f"place {place + 1}" if one.kind == "positional" else one.kind
    return where + (f", default {one.default}" if one.default is not None else "")


def nearest_release(by_release: Sequence[list[Row]]) -> list[Row]:
    """Of the rows of one fake's function in several releases those of the release that differs least.

    A fake imitates one release: others may differ.
    """
    readable = [rows for rows in by_release if all(row.state != UNREAD for row in rows)]
    return min(readable or by_release, key=lambda rows: sum(row.state == DIFFERENT for row in rows))


def never_there(rows: Iterable[Row]) -> list[Row]:
    """The rows; an argument that is passed conditionally and that no release has becomes a difference."""
    rows = list(rows)
    there = {(row.name, row.item) for row in rows if row.state == SAME and row.asked}
    return [
        row._replace(state=DIFFERENT, ours="is passed where it is there", there="in no release that was read")
        if row.state == ABSENT and (row.name, row.item) not in there
        else row
        for row in rows
    ]


def gate_rows(gate: Gate, found: list[Release], sources_of: Callable[[Release], Sources]) -> list[Row]:
    """Whether a name exists from its declared version on, and not before."""
    version = Version(gate.version)
    after = [one for one in found if one.version >= version and not one.version.is_prerelease][:1]
    before = [one for one in found if one.version < version and not one.version.is_prerelease][-1:]
    rows = []
    for one, wanted in ((before, False), (after, True)):
        for release in one:
            thing = sources_of(release).find(gate.name)
            there = thing is not None
            if gate.parameter:
                there = isinstance(thing, Function) and thing.parameter(gate.parameter) is not None
            ours, real = ("is there" if one else "is not there" for one in (wanted, there))
            item = gate.parameter or "name"
            state = SAME if wanted == there else DIFFERENT
            rows.append(
                Row(gate.package, str(release.version), f"gate at {gate.version}: {gate.name}", item, ours, real, state)
            )
    return rows


def since(found: Sequence[Release], holds: Callable[[Release], bool]) -> str:
    """The oldest of these releases from which on all agree with the last; empty if all do."""
    wanted = holds(found[-1])
    first, last = 0, len(found) - 1
    if holds(found[0]) == wanted:
        return ""
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (first, middle) if holds(found[middle]) == wanted else (middle, last)
    return str(found[last].version)


def declared_in(source: str, name: str) -> Function:
    """A function of a fake, by `name` or `Class.name`."""
    found = Sources(Memory({"fake.py": source})).find(f"fake:{name}")
    if not isinstance(found, Function):
        raise ValueError(f"{name} is no function")
    return found


def functions_of(fake: Fake, source: str) -> list[tuple[str, str, str, Function]]:
    """What a fake declares: its name here, `module:name` there, the versions that are so, and its parameters."""
    return [(*one, declared_in(source, one[0])) for one in fake_functions(fake, source)]


def applies(when: str, version: Version) -> bool:
    """Whether something holds for a version."""
    return SpecifierSet(when).contains(version, prereleases=True)


def renamed_parameter(source: str, function: str, parameter: str) -> str:
    """A source in which a function's parameter has another name: to test that the comparison detects it."""
    tree = ast.parse(source)
    name = defined_as(function)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                if argument.arg == parameter:
                    argument.arg = f"{parameter}_renamed"
        elif isinstance(node, ast.ClassDef) and function.endswith((f":{node.name}", f".{node.name}")):
            for field in node.body:  # of a NamedTuple
                if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == parameter:
                    field.target = ast.Name(f"{parameter}_renamed")
    return ast.unparse(tree)


def defined_as(name: str) -> str:
    """The name after `def` of what is called: of a class that of its constructor."""
    last = name.rpartition(":")[2].rpartition(".")[2]
    return "__init__" if last.lstrip("_")[:1].isupper() else last
