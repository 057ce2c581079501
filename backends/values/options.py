"""The options of a backend: each with its type and limits, so that a wrong one is refused when it is read.

A backend declares them in `Backend.options` and takes them as keyword arguments of `load`. Names that other systems
use for parts that are not built are declared too (`Planned`), type-checked, and refused for that reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from .bounded import nearest

MOST_PROBLEMS = 10
"""What is said at once of the options of one backend."""

MOST_BITS = 160
"""Of a whole number."""

KIND_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


@dataclass(frozen=True)
class Option:
    """One option: what it may be and what it is when nobody says."""

    name: str
    kind: type
    """bool, int, float, str, dict or list."""
    default: object
    summary: str
    choices: tuple[object, ...] = ()
    """The only values there are; empty for any of the kind."""
    minimum: float | None = None
    maximum: float | None = None
    also: tuple[object, ...] = ()
    """Values, or types of values, that are allowed beside those of the kind, such as "auto" for a number."""
    fields: tuple[Option, ...] = ()
    """What a mapping may hold; empty for anything."""

    def problem(self, value: object) -> str | None:
        """What is wrong with `value`, or None. A whole number stands for a number, true and false for neither."""
        if type(value) in self.also or (not isinstance(value, bool | dict | list) and value in self.also):
            return None
        if isinstance(value, int) and value.bit_length() > MOST_BITS:  # Python itself may refuse to write it out
            return f"{self.name}: a number of {value.bit_length()} bits is out of range"
        wanted = (int, float) if self.kind is float else self.kind
        if not isinstance(value, wanted) or (isinstance(value, bool) and self.kind is not bool):
            return f"{self.name} must be {KIND_NAMES[self.kind]}, not {value!r}"
        if isinstance(value, float) and not isfinite(value):
            return f"{self.name} must be a finite number, not {value}"
        if self.fields and isinstance(value, Mapping) and (inner := problems(self.fields, value)):
            return f"{self.name}: {'; '.join(inner)}"
        if self.choices and value not in self.choices:
            return f"{self.name} {value!r} is not one of {', '.join(str(choice) for choice in self.choices)}"
        if self.minimum is not None and value < self.minimum:  # type: ignore[operator]  # only numbers have limits
            return f"{self.name} {value} < {self.minimum:g}"
        if self.maximum is not None and value > self.maximum:  # type: ignore[operator]
            return f"{self.name} {value} > {self.maximum:g}"
        return None


def problems(declared: tuple[Option, ...], given: Mapping[str, object]) -> list[str]:
    """What is wrong with the options in `given`, in words that name the known ones; empty when nothing is."""
    known = {option.name: option for option in declared}
    found: list[str] = []
    for name, value in given.items():
        if len(found) >= MOST_PROBLEMS:
            return [*found, f"and {len(given)} options in all"]
        if name in known:
            problem = known[name].problem(value)
            found += [problem] if problem else []
            continue
        near = nearest(str(name), known)
        hint = f"; did you mean {near[0]}?" if near else ""
        found.append(f"no option {name!r} (known: {', '.join(known) or 'none'}){hint}")
    return found
