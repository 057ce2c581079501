"""Where in a text an error is: the lines of its entries, and the entry that a message is about.

A message says its place as a path, as in `config.per_role['cross']: unknown entry x`. It is looked up among the
text's own entries by that path, and only below it by the words of the message: a comment or the same word elsewhere
is never taken for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_PLACES = 20_000
"""More entries than any configuration has; references can make a short YAML text look far larger than it is."""

_STEP = re.compile(r"\.([\w-]+)|\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]")
_TAIL = re.compile(r"; known: |\(known: |; did you mean |; the names are: |; expected ")
"""What a message lists at its end is not what it is about."""


class Place(NamedTuple):
    """One entry of a text."""

    path: tuple[str, ...]
    line: int
    value: str
    """Its value where that is one word or text; empty for a mapping or a list."""

    @property
    def dotted(self) -> str:
        return ".".join(self.path).replace("-", "_")


def places_of(text: str, first_line: int = 1, path: tuple[str, ...] = ()) -> list[Place]:
    """The entries of JSON or YAML, in order; none where the text is neither."""
    import yaml

    try:
        node = yaml.compose(text.replace("\t", " "), yaml.SafeLoader)  # YAML allows no tabs where JSON does
        found = []
        for place in _walk(node, path, first_line):
            found.append(place)
            if len(found) > MAX_PLACES:
                return []
        return found
    except (yaml.YAMLError, ValueError, RecursionError):
        return []


def _walk(node: Any, path: tuple[str, ...], first_line: int) -> Iterator[Place]:
    import yaml

    if isinstance(node, yaml.MappingNode):
        entries = [(str(key.value), key.start_mark.line, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        entries = [(str(number), value.start_mark.line, value) for number, value in enumerate(node.value)]
    else:
        return
    for name, line, value in entries:
        below = (*path, name)
        said = value.value if isinstance(value, yaml.ScalarNode) else ""
        yield Place(below, first_line + line, said)
        if len(below) <= 40:
            yield from _walk(value, below, first_line)


def line_of_error(message: str, source: str, places: list[Place]) -> int | None:
    """The line of the entry that a message is about; None where nothing in the text is it."""
    where, _, said = message.removeprefix(source).partition(": ")
    said = _TAIL.split(said)[0]
    steps = [next(filter(None, step), "") for step in _STEP.findall(where)]
    inside, own = _below(steps, places)
    if said.startswith("extra of "):
        said = said.partition(": ")[2]
        inside = [place for place in inside if "extra" in place.path[:-1]] or inside
    words = [a or b for a, b in re.findall(r"'([^'\n]+)'|\"([^\"\n]+)\"", said)] + re.findall(r"[\w.-]+", said)
    again = "given twice" in said or "conflicts with" in said
    for word in words:
        found = [place for place in inside if word in (place.path[-1], place.value) or place.dotted == word]
        if again:
            found = [place for place in found if any(other.path == place.path for other in places if other != place)]
            found = found[-1:]
        if found:
            return min(found, key=lambda place: len(place.path)).line
    return own


def _below(steps: list[str], places: list[Place]) -> tuple[list[Place], int | None]:
    """The entry that a path leads to with all below it, and its line; everything where no entry has that path.

    A configuration may stand inside another system's wrapper, so the end of an entry's path counts.
    """
    dotted = [step.replace("-", "_") for step in steps]
    while dotted:
        wanted = ".".join(dotted)
        names = (wanted, "backend") if wanted == "default" else (wanted,)  # `backend: x` is short for it
        for name in names:
            found = [place for place in places if f".{place.dotted}".endswith(f".{name}")]
            if found:
                top = min(found, key=lambda place: len(place.path))
                depth = len(top.path)
                return [place for place in places if place.path[:depth] == top.path], top.line
        dotted.pop(0)
    return places, None
