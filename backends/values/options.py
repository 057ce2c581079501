"""`Option`: the declaration of a backend's option, with type and limits, checked when a configuration is read.

Backends declare them in `Backend.options` and get them as keyword arguments of `load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite

from .bounded import nearest

MOST_PROBLEMS = 10
"""Most problems in one message."""

MOST_BITS = 160
"""Most bits of a whole number."""

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
    """One option: type, default, allowed values."""

    name: str
    kind: type
    """bool, int, float, str, dict or list."""
    default: object
    summary: str
    choices: tuple[object, ...] = ()
    """The allowed values; empty: any of the type."""
    minimum: float | None = None
    maximum: float | None = None
    also: tuple[object, ...] = ()
    """Further values, or types, such as "auto" for a number."""
    fields: tuple[Option, ...] = ()
    """Entries of a mapping; empty: any."""
    by_step: bool = False
    """It may change by step: a list of values, or a mapping `{from, to, start, end}` (`sparse/by_step.py`)."""

    def problem(self, value: object) -> str | None:
        """What is wrong with `value`, or None. An int is accepted as float, a bool as neither."""
        if type(value) in self.also or (not isinstance(value, bool | dict | list) and value in self.also):
            return None
        if self.by_step and isinstance(value, list | dict):
            return self._problem_by_step(value)
        if isinstance(value, int) and value.bit_length() > MOST_BITS:  # Python may refuse to print it
            return f"{self.name}: a number of {value.bit_length()} bits is out of range"
        wanted = (int, float) if self.kind is float else self.kind
        if not isinstance(value, wanted) or (isinstance(value, bool) and self.kind is not bool):
            return f"{self.name} must be {KIND_NAMES[self.kind]}, not {value!r}"
        if isinstance(value, float) and not isfinite(value):
            return f"{self.name} must be a finite number, not {value}"
        if self.fields and isinstance(value, Mapping) and (inner := problems(self.fields, value)):
            return f"{self.name}: {'; '.join(inner)}"
        if self.choices and value not in self.choices:
            if len(self.choices) == 1:
                return f"{self.name} must be {self.choices[0]}, not {value!r}"
            return f"{self.name} {value!r} is not one of {', '.join(str(choice) for choice in self.choices)}"
        if self.minimum is not None and value < self.minimum:  # type: ignore[operator]  # only numbers have limits
            return f"{self.name} {value} < {self.minimum:g}{self._allowed}"
        if self.maximum is not None and value > self.maximum:  # type: ignore[operator]
            return f"{self.name} {value} > {self.maximum:g}{self._allowed}"
        return None

    @property
    def _allowed(self) -> str:
        """The range, where it has two ends: of the other one a message says the limit already."""
        if self.minimum is None or self.maximum is None:
            return ""
        return f" (from {self.minimum:g} to {self.maximum:g})"

    def _problem_by_step(self, value: list[object] | dict[str, object]) -> str | None:
        """What is wrong with values that change by step."""
        one = replace(self, by_step=False)
        if isinstance(value, list):
            if not value:
                return f"{self.name}: the list has no value"
            return next((problem for item in value if (problem := one.problem(item))), None)
        share = partial(Option, kind=float, default=0.0, summary="", minimum=0, maximum=1)
        fields = (replace(one, name="from"), replace(one, name="to"), share("start"), share("end"))
        if wrong := problems(fields, value):
            return f"{self.name}: {'; '.join(wrong)}"
        if missing := [name for name in ("from", "to") if name not in value]:
            return f"{self.name}: {' and '.join(map(repr, missing))} not given"
        start, end = value.get("start", 0), value.get("end", 1)
        if start >= end:  # type: ignore[operator]  # numbers: checked above
            return f"{self.name}: start {start} >= end {end}"
        return None


def problems(declared: tuple[Option, ...], given: Mapping[str, object]) -> list[str]:
    """Problems of the options in `given`; empty: none."""
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
