"""Where in a text an error is: the lines of its entries, and the entry that a message is about.

A message says its place as a path, as in `config.per_role['cross']: unknown entry x`. It is looked up among the
text's own entries by that path, and only below it by the words of the message: a comment or the same word elsewhere
is never taken for it. The work grows with the length of the text, not with its square.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from ..values.bounded import MOST_MESSAGE
from ..values.data import json_marks, yaml_entries

MAX_PLACES = 2000
"""More entries than a person writes; a longer text gets no lines."""
LONGEST_NAME = 80
"""Of a name in a path, so that paths of long names don't fill the memory; no name of ours is longer."""

MOST_STEPS = 12
"""Of a path in a message; the longest of ours has six."""

_JSON = re.compile(r"\s*\{\s*[\"}]")
_STEP = re.compile(r"\.([\w-]+)|\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]")
_TAIL = re.compile(r"; known: |\(known: |; did you mean |; the names are: |; expected ")
"""What a message lists at its end is not what it is about."""


class Place(NamedTuple):
    """One entry of a text."""

    path: tuple[str, ...]
    line: int
    value: str
    """Its value where that is one word or text; empty for a mapping or a list."""
    dotted: str
    """The path in the form in which paths are compared."""


def place(path: tuple[str, ...], line: int, value: str = "") -> Place:
    """An entry; long names and values are cut."""
    path = tuple(name[:LONGEST_NAME] for name in path)
    return Place(path, line, value[:LONGEST_NAME], ".".join(path).replace("-", "_"))


def places_of(text: str, first_line: int = 1, path: tuple[str, ...] = ()) -> list[Place]:
    """The entries of JSON or YAML, in order; none where the text is neither, or has too many."""
    import yaml

    found: list[Place] = []

    def note(below: tuple[str, ...], line: int, value: str) -> None:
        if len(found) == MAX_PLACES:
            raise ValueError(f"more than {MAX_PLACES} entries")
        found.append(place((*path, *below), first_line + line, value))

    try:
        if _JSON.match(text):
            _walk_json(text, note)
        else:
            yaml_entries(text, note)
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    return found


def _walk_json(text: str, note: Callable[[tuple[str, ...], int, str], None]) -> None:
    """Tell `note` of each entry of JSON: its path, its line from 0, and its value where that is a scalar."""
    opened: list[str] = []
    path: list[str] = []
    line = last = 0
    keyed = False  # the next value belongs to the key at the end of the path
    for mark, start, end, said in json_marks(text):
        between = text[last:start].strip(" \t\r\n:")  # a number or a word before a comma or a bracket
        if between and opened and (keyed or opened[-1] == "["):
            note(tuple(path), line, between)
            keyed = False
        line += text.count("\n", last, start)
        if mark in "{[" or mark == '"':
            if mark == '"' and opened[-1:] == ["{"] and not keyed:
                path[-1], keyed, key_line = said, True, line
            elif opened:
                note(tuple(path), key_line if keyed else line, said)
                keyed = False
            if mark != '"':
                opened.append(mark)
                path.append("0")
        elif mark in "}]" and opened:
            opened.pop()
            path.pop()
        elif mark == "," and opened[-1:] == ["["]:
            path[-1] = str(int(path[-1]) + 1)
        line += text.count("\n", start, end)
        last = end


def line_of_error(message: str, source: str, places: list[Place]) -> int | None:
    """The line of the entry that a message is about; None where nothing in the text is it."""
    where, _, said = message.removeprefix(source)[:MOST_MESSAGE].partition(": ")
    said = _TAIL.split(said)[0]
    steps = [next(filter(None, step), "") for step in _STEP.findall(where)]
    inside, own = _below(steps, places)
    if said.startswith("extra of "):
        said = said.partition(": ")[2]
        inside = [one for one in inside if "extra" in one.path[:-1]] or inside
    words = [a or b for a, b in re.findall(r"'([^'\n]+)'|\"([^\"\n]+)\"", said)] + re.findall(r"[\w.-]+", said)
    again = "given twice" in said or "conflicts with" in said
    times = Counter(one.path for one in places) if again else Counter()
    named: dict[str, list[Place]] = {}
    for one in inside:
        for name in {one.path[-1], one.value, one.dotted}:
            named.setdefault(name, []).append(one)
    for word in words:
        found = named.get(word, [])
        if again:
            found = [one for one in found if times[one.path] > 1][-1:]
        if found:
            return min(found, key=lambda one: len(one.path)).line
    return own


def _below(steps: list[str], places: list[Place]) -> tuple[list[Place], int | None]:
    """The entry that a path leads to with all below it, and its line; everything where no entry has that path.

    A configuration may stand inside another system's wrapper, so the end of an entry's path counts.
    """
    dotted = [step.replace("-", "_") for step in steps[-MOST_STEPS:]]
    while dotted:
        wanted = ".".join(dotted)
        names = (wanted, "backend") if wanted == "default" else (wanted,)  # `backend: x` is short for it
        for name in names:
            found = [one for one in places if f".{one.dotted}".endswith(f".{name}")]
            if found:
                top = min(found, key=lambda one: len(one.path))
                depth = len(top.path)
                return [one for one in places if one.path[:depth] == top.path], top.line
        dotted.pop(0)
    return places, None
