"""Compares what the pack uses of other packages with their published sources: `python3 dev.py contracts`.

    read_contracts.py [--sources FOLDER] [--only PACKAGE ...] [--most MB]

FOLDER holds source trees, in folders called PACKAGE@VERSION, of packages that the index does not have; a commit can
follow the version, as in flash-attn-3@3.0.0+g0251105a. The outcome is written to benchmarks/results/contracts.md,
unless only some packages were asked for.
"""

from __future__ import annotations

import argparse
import datetime
import random
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from attention_backends.backends.config import foreign_options, mapping, names, systems
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.sparse.executors import OF_PACKAGES
from attention_backends.devtools.contracts import compare, page, signatures, uses
from attention_backends.devtools.contracts import index as on_index
from attention_backends.devtools.contracts.compare import ABSENT, DIFFERENT, SAME, Row
from attention_backends.devtools.contracts.index import Release, Tree
from attention_backends.devtools.contracts.signatures import Sources
from attention_backends.devtools.contracts.systems import SYSTEMS, system_rows
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "benchmarks" / "results" / "contracts.md"
SEED, RENAMED = 1, 20
DECLARED = (*BACKENDS.values(), *(executor.declared for executor in OF_PACKAGES))


def floors() -> dict[str, str]:
    """The versions of each package that kernels take, as a specifier."""
    found: dict[str, set[str]] = {}
    for backend in DECLARED:
        for text in backend.requires:
            need = Requirement(text)
            if need.name not in uses.FLOORS and str(need.specifier) != uses.SECOND:  # which is of some kernels only
                found.setdefault(need.name, set()).add(str(need.specifier))
    return {**{name: min(specifiers, key=len) for name, specifiers in found.items()}, **uses.FLOORS}


def declared_names() -> list[tuple[str, str, str]]:
    """The names that kernels declare: package, `module:name`, and the versions that have them."""
    found = []
    for backend in DECLARED:
        for need in backend.symbols:
            top = need.module.partition(".")[0]
            package = next((one.distribution for one in backend.packages if one.module.partition(".")[0] == top), top)
            when = str(Requirement(need.when).specifier) if need.when else ""
            found += [(package, f"{need.module}:{name}", when) for name in need.names]
    return found


USES = uses.all_uses(declared_names())
FAKES = uses.all_fakes((one.distribution, one.module) for backend in DECLARED for one in backend.packages)


class Run:
    """Data that is read once and used often."""

    def __init__(self, web: on_index.Web, sources: Path | None) -> None:
        self.web, self.index = web, on_index.index_url()
        self.trees = on_index.source_trees(sources) if sources else []
        self.floors = floors()
        self.all: dict[str, list[Release]] = {}
        """Every release that a requirement takes, the oldest first."""
        self.read: dict[str, list[Release]] = {}
        """The releases to compare with."""
        self.missing: dict[str, str] = {}
        self._sources: dict[tuple[str, str], Sources] = {}

    def sources_of(self, release: Release) -> Sources:
        key = (release.package, str(release.version))
        if key not in self._sources:
            print(f"  {release.package} {release.version}", flush=True)
            self._sources[key] = Sources(release.open())
        return self._sources[key]

    def look_up(self, package: str) -> None:
        """Find a package's releases to read.

        The oldest and the newest, those that install commands name, every minor one of torch, and a person's trees.
        """
        own = [one for one in self.trees if one.package == package]
        found: list[Release] = []
        try:
            found = on_index.accepted(on_index.releases(self.web, self.index, package), self.floors.get(package, ""))
        except OSError as error:
            if not own:
                self.missing[package] = f"not on the index, and no tree of it was named ({error})"
        if package == "torch":
            minors = {one.version.release[:2]: one for one in found}  # the last of each
            chosen = [minors[minor] for minor in sorted(minors)]
        else:
            named = {one.version for backend in DECLARED for one in backend.packages if one.distribution == package}
            chosen = [one for one in found if one in (found[0], found[-1]) or str(one.version) in named]
        self.all[package] = found
        self.read[package] = [*chosen, *sorted(own, key=lambda one: one.version)]
        if not self.read[package]:
            self.missing.setdefault(package, "no release is accepted")


def with_since(run: Run, rows: list[Row], again: Callable[[Release], Iterable[Row]]) -> list[Row]:
    """The rows, with the release that brought a difference where releases that were read disagree."""
    found = []
    for row in rows:
        releases = [one for one in run.all[row.package] if one.in_place]
        others = {one.state for one in rows if (one.name, one.item) == (row.name, row.item)}
        if row.state == DIFFERENT and SAME in others and len(releases) > 2:

            def differs(release: Release, row: Row = row) -> bool:
                return any((one.name, one.item, one.state) == (row.name, row.item, DIFFERENT) for one in again(release))

            row = row._replace(since=compare.since(releases, differs))
        found.append(row)
    return found


def use_rows(run: Run, package: str) -> list[Row]:
    def of(release: Release) -> list[Row]:
        return [
            row
            for use in USES
            if use.package == package and compare.applies(use.when, release.version)
            for row in compare.use_rows(
                use,
                uses.call_of(use) if use.at else None,
                str(release.version),
                run.sources_of(release).find(use.stands or use.name),
            )
        ]

    rows = [row for release in run.read[package] for row in of(release)]
    return with_since(run, compare.never_there(rows), of)


def fake_rows(run: Run, package: str, source_of: Callable[[str], str] | None = None) -> list[Row]:
    rows = []
    for fake in FAKES:
        releases = [one for one in run.read.get(package, []) if compare.applies(fake.when, one.version)]
        if fake.package != package or not releases:
            continue
        source = (source_of or fake_source)(fake.file)
        for ours, there, when, declared in compare.functions_of(fake, source):
            found = [
                compare.fake_rows(fake, ours, there, str(one.version), declared, run.sources_of(one).find(there))
                for one in releases
                if compare.applies(when, one.version)
            ]
            rows += compare.nearest_release(found) if found else []
    return rows


def fake_source(file: str) -> str:
    return (uses.FAKES / f"{file}.py").read_text(encoding="utf-8")


def pin_rows(run: Run) -> list[Row]:
    """Versions that install commands name, against the index."""
    rows = []
    for package in dict.fromkeys(one for backend in DECLARED for one in backend.packages):
        releases = run.all.get(package.distribution, [])
        if not releases or "+" in package.version:
            continue
        versions = [str(one.version) for one in releases]
        newest = versions[-1]
        there = package.version in versions
        if not there and package.distribution == "sageattention":
            continue  # 2.x is on no index, as its package declares
        state = DIFFERENT if not there else SAME if package.version == newest else ABSENT
        text = f"the newest is {newest}" if there else f"is not on the index; the newest is {newest}"
        rows.append(Row(package.distribution, newest, "Package.version", "name", package.version, text, state))
    return list(dict.fromkeys(rows))


def name_rows(run: Run, only: list[str]) -> list[Row]:
    listed = {one.id: [row.name for row in one.names] for one in systems.systems()}
    options = [option for backend in BACKENDS.values() for option in backend.options]
    keys = {one.name for option in options for one in (option, *option.fields)}
    keys |= {*mapping.FIELDS, *mapping.SPEC_FIELDS, *foreign_options.FOREIGN_OPTIONS}
    rows = []
    for system in SYSTEMS:
        if only and system.package not in only:
            continue
        releases = on_index.releases(run.web, run.index, system.package)
        run.all[system.package] = releases
        stable = on_index.accepted(releases, "")[-1]
        chosen = {one.version: one for one in (stable, releases[-1])}
        run.read[system.package] = list(chosen.values())
        for release in chosen.values():
            tree = run.sources_of(release).tree
            known = partial(meaning, system=system.ours)
            rows += system_rows(system, str(release.version), tree, known, listed.get(system.ours, []), keys)
    return rows


def meaning(name: str, system: str = "") -> str:
    try:
        return names.canonical(name, system)
    except names.RefusedBackendError:
        return "refused"
    except names.UnknownBackendError:
        return ""


class Copy:
    """A tree in which one parameter of one function has another name."""

    def __init__(self, tree: Tree, function: str, parameter: str) -> None:
        self._tree, self.function, self.parameter = tree, function, parameter
        self.files = tree.files

    def read(self, path: str) -> str:
        source = self._tree.read(path)
        if path == signatures.SCHEMAS:
            schema = rf"^- func: {re.escape(compare.defined_as(self.function))}\(.*$"
            changed = rf"\b{self.parameter}\b(?=[,=)])"
            return re.sub(schema, lambda m: re.sub(changed, f"{self.parameter}_renamed", m[0]), source, flags=re.M)
        name = self.function.rpartition(":")[2].rpartition(".")[2]
        if f"def {compare.defined_as(self.function)}(" in source or f"class {name}(NamedTuple)" in source:
            return compare.renamed_parameter(source, self.function, self.parameter)
        return source


def rename(run: Run) -> list[str]:
    """Rename a parameter that is used or declared, in copies of real sources and in fakes: is each one seen?"""
    rng = random.Random(SEED)  # noqa: S311  # it draws what to try
    real = []
    for use in USES:
        call = uses.call_of(use) if use.at else None
        for release in run.read.get(use.package, [])[-1:]:
            found = (
                run.sources_of(release).find(use.stands or use.name)
                if compare.applies(use.when, release.version)
                else None
            )
            if call is None or not isinstance(found, signatures.Function):
                continue
            passed = {*(one.name for one in found.positional[: len(use.order[: call.positional])]), *call.keywords}
            real += [(use, call, release, one.name) for one in found.parameters if one.name in passed]
    seen = 0
    chosen = rng.sample(real, min(RENAMED, len(real)))
    missed = []
    for use, call, release, parameter in chosen:
        copied = Sources(Copy(run.sources_of(release).tree, use.stands or use.name, parameter))
        rows = compare.use_rows(use, call, str(release.version), copied.find(use.stands or use.name))
        caught = any(row.state == DIFFERENT for row in rows)
        seen += caught
        missed += [] if caught else [f"{use.name}({parameter})"]
    lines = [f"A parameter renamed in a copy of a real source: seen {seen} of {len(chosen)}."]
    before = {fake: _fake_differences(run, fake, None) for fake in FAKES}
    declared = [
        (fake, ours, one.name)
        for fake in FAKES
        if run.read.get(fake.package) and not fake.unread
        for ours, _, _, function in compare.functions_of(fake, fake_source(fake.file))
        for one in function.parameters
        if one.kind in ("positional", "keyword")
    ]
    chosen_fakes = rng.sample(declared, min(RENAMED, len(declared)))
    seen = 0
    for fake, ours, parameter in chosen_fakes:
        source = compare.renamed_parameter(fake_source(fake.file), ours, parameter)
        caught = bool(_fake_differences(run, fake, source) - before[fake])
        seen += caught
        missed += [] if caught else [f"fake {fake.file}.{ours}({parameter})"]
    lines.append(f"A parameter renamed in a fake: seen {seen} of {len(chosen_fakes)}.")
    return [*lines, *([f"Not seen: {', '.join(missed)}."] if missed else [])]


def _fake_differences(run: Run, fake: uses.Fake, source: str | None) -> set[tuple[str, str]]:
    rows = fake_rows(run, fake.package, lambda file: source if source and file == fake.file else fake_source(file))
    return {(row.name, row.item) for row in rows if row.state == DIFFERENT}


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.py contracts", description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=Path, help="a folder of source trees, called PACKAGE@VERSION")
    parser.add_argument("--only", nargs="+", default=[], metavar="PACKAGE", help="read these alone, and write no page")
    parser.add_argument("--most", type=int, default=300, metavar="MB", help="stop after so many megabytes")
    options = parser.parse_args()
    web = on_index.Web(options.most * 1_000_000)
    run = Run(web, options.sources)
    packages = dict.fromkeys(use.package for use in USES)
    wanted = [package for package in packages if not options.only or package in options.only]
    print("Reading, without installing or running anything:")
    for package in wanted:
        run.look_up(package)
    of_uses = [row for package in wanted for row in use_rows(run, package)]
    of_fakes = [row for package in wanted for row in fake_rows(run, package)]
    gates = [
        row
        for gate in uses.GATES
        if run.read.get(gate.package)
        for row in compare.gate_rows(gate, on_index.releases(web, run.index, gate.package), run.sources_of)
    ]
    pins = pin_rows(run)
    renamed = rename(run)
    of_systems = name_rows(run, options.only)
    versions = {package: [str(one.version) for one in found] for package, found in run.read.items() if found}
    today = datetime.date.today().isoformat()
    found = page.Outcome(
        today, web.received, versions, run.missing, of_uses, of_fakes, gates, pins, of_systems, renamed
    )
    text = page.page_of(found)
    print("\n" + text)
    if not options.only:
        PAGE.write_text(text, encoding="utf-8")
        print(f"Written to {PAGE.relative_to(ROOT)}.")
    return 1 if page.differences(found) else 0


if __name__ == "__main__":
    sys.exit(main())
