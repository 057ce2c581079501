"""The outcome of a comparison as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .compare import ABSENT, DIFFERENT, SAME, UNREAD, Row
from .uses import WITHOUT_KERNEL

IN_SOME = "same in some"
NO_DIFFERENCES = {
    "Pins": 'A row "the newest is" is no difference: the version that is named is there.',
    "Systems": 'A row "is listed", "is not published" is no difference: the pack takes the name, and this list of that '
    "release does not have it.",
}
"""What rows mean that are shown and are no differences."""


class Outcome(NamedTuple):
    """Everything that one run found."""

    date: str
    received: int
    versions: Mapping[str, Sequence[str]]
    """The releases that were read, of each package."""
    missing: Mapping[str, str]
    """Packages that could not be read, and why."""
    uses: Sequence[Row]
    fakes: Sequence[Row]
    gates: Sequence[Row]
    pins: Sequence[Row]
    systems: Sequence[Row]
    renamed: Sequence[str]
    """The results for parameters that were renamed in copies."""


def differences(outcome: Outcome) -> list[Row]:
    """All rows that differ."""
    everything = (*outcome.uses, *outcome.fakes, *outcome.gates, *outcome.pins, *outcome.systems)
    return [row for row in everything if row.state == DIFFERENT]


def parameters(rows: Iterable[Row]) -> Counter[str]:
    """How many arguments that kernels pass are as published, each once; `IN_SOME` for those unread in some release."""
    states: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        if row.item not in ("name", "returns"):
            states.setdefault((row.package, row.name, row.item), set()).add(row.state)
    order = (DIFFERENT, SAME, ABSENT, UNREAD)
    return Counter(
        IN_SOME if {SAME, UNREAD} <= found else next(state for state in order if state in found)
        for found in states.values()
    )


def page_of(outcome: Outcome) -> str:
    """The page."""
    passed = parameters(outcome.uses)
    lines = [
        "# What we use of other packages, against their published sources",
        "",
        "Made by `python3 dev.py contracts`, which reads sources and runs nothing of them. A row says what we use, "
        "what is there, and from which release on it is as in the newest, where releases disagree.",
        "",
        f"Read on {outcome.date}, {outcome.received / 1e6:.1f} MB.",
        "",
        f"- Arguments that kernels pass: {passed.total()}. In every release that was read {passed[SAME]} are as "
        f"published, in some {passed[IN_SOME]}; {passed[DIFFERENT]} differ, {passed[UNREAD]} could not be verified.",
        *(f"- {line}" for line in outcome.renamed),
        "",
        "## Releases",
        "",
        "| package | read |",
        "|---|---|",
        *(f"| {package} | {', '.join(found)} |" for package, found in outcome.versions.items()),
        *(f"| {package} | not read: {why} |" for package, why in outcome.missing.items()),
        *(f"| {package} | not read: no kernel uses it yet |" for package in WITHOUT_KERNEL),
    ]
    parts = (
        ("Kernels", "what kernels use", outcome.uses, (DIFFERENT,)),
        ("Not verifiable", "what kernels use and sources do not tell", outcome.uses, (UNREAD,)),
        ("Fakes", "what the fakes of the tests declare, against the release that they are nearest to", outcome.fakes,
         (DIFFERENT, UNREAD)),
        ("Versions", "what came with a version that the pack asks for", outcome.gates, (DIFFERENT, UNREAD)),
        ("Pins", "versions that install commands name", outcome.pins, (DIFFERENT, ABSENT)),
        ("Systems", "names and keys that other systems publish", outcome.systems, (DIFFERENT, UNREAD, ABSENT)),
    )  # fmt: skip
    for title, about, rows, states in parts:
        shown = list(dict.fromkeys(_line(row) for row in _joined(row for row in rows if row.state in states)))
        count = len(rows) if DIFFERENT in states else len(shown)
        lines += ["", f"## {title}", "", f"{about[0].upper()}{about[1:]}: {count} rows."]
        if shown:
            lines[-1] += f" {NO_DIFFERENCES[title]}" if title in NO_DIFFERENCES else ""
            lines += ["", "| package | release | name | what | ours | there | since |", "|---|---|---|---|---|---|---|"]
            lines += shown
        else:
            lines[-1] += " None differs." if DIFFERENT in states else ""
    return "\n".join(lines) + "\n"


def _joined(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ in their release alone as one."""
    found: dict[Row, list[str]] = {}
    for row in rows:
        found.setdefault(row._replace(version=""), []).append(row.version)
    return [row._replace(version=", ".join(dict.fromkeys(versions))) for row, versions in found.items()]


def _line(row: Row) -> str:
    cells = (row.package, row.version, f"`{row.name}`", row.item, row.ours, row.there, row.since)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
