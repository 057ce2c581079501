"""Parses windows: `0-3`, `last 2`, `0-1,38,last 2`, `20%-80%`, `1-0.85`.

Steps and blocks are whole numbers from 0, both ends included; percent and sigmas are spans (`schedule.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

from ..values.errors import ConfigError

MOST_PARTS, LONGEST = 64, 1000
"""Most parts, and characters, of one window."""
_COUNT = r"(?P<end>first|last) *(?P<count>\d{1,6})"
_RANGE = r"(?P<low>\d{1,6})( *(?P<dash>-) *(?P<high>\d{1,6})?)?"
_NUMBERS = re.compile(rf"{_COUNT}|{_RANGE}")
_SERIES = re.compile(r"(?P<series>[A-Za-z_][\w.]*?)[. ]?(?P<rest>(?:first|last) *\d.*|\d[^.]*)", re.ASCII)
_NUMBER = r"\d{1,30}(?:\.\d*)?(?:[eE][+-]?\d{1,3})?|\.\d+"
_SPAN = re.compile(rf"({_NUMBER}) *(%?) *- *({_NUMBER}) *(%?)")
_PART = re.compile(rf"(first|last) +({_NUMBER}) *%")


class Numbers(NamedTuple):
    """One part of a window over steps or blocks: `3`, `0-3`, `4-`, `first 2`, `last 2`."""

    low: int
    high: int | None
    """The last one, included; None: to the end."""
    end: str = ""
    """`first` or `last`: `low` is the count then."""
    series: str = ""
    """Series of blocks, such as `double_blocks` in `double_blocks.3`; empty: every series."""

    def __str__(self) -> str:
        text = f"{self.end} {self.low}" if self.end else f"{self.low}" if self.low == self.high else self._range()
        return f"{self.series}.{text}" if self.series else text

    def _range(self) -> str:
        return f"{self.low}-{'' if self.high is None else self.high}"

    def among(self, present: Sequence[int]) -> set[int]:
        """The elements of `present`, in rising order, within this part."""
        if self.end:
            return set(present[: self.low] if self.end == "first" else present[max(len(present) - self.low, 0) :])
        return {number for number in present if self.low <= number and (self.high is None or number <= self.high)}


class Span(NamedTuple):
    """One part of a window over percent (0 to 1, rising) or sigmas (falling); both ends included."""

    first: float
    last: float

    def __str__(self) -> str:
        return f"{_written(self.first)}-{_written(self.last)}"


def parse_numbers(value: object, what: str) -> tuple[Numbers, ...]:
    """A window over `steps` or `blocks`: `0-3`, `last 2`, `0-1,38,last 2`; blocks also `double_blocks.0-3`.

    Raises:
        ConfigError: a part is not of these forms.
    """
    numbers = []
    for part in _parts(value, what):
        series, text = "", part
        match = _NUMBERS.fullmatch(part.lower())
        if match is None and what == "blocks":
            named = _SERIES.fullmatch(part)
            if named is not None:
                series, text = named["series"], named["rest"]
                match = _NUMBERS.fullmatch(text.lower())
        if match is None:
            forms = "0-3, 5, 4-, first 2 or last 2"
            more = ", or with a name before it, as double_blocks.0-3" if what == "blocks" else ""
            raise ConfigError(f"{what}: {part!r} is not one of the forms {forms}{more}")
        if match["end"]:
            if int(match["count"]) == 0:
                raise ConfigError(f"{what}: {part!r} is none at all; write how many, from 1")
            numbers.append(Numbers(int(match["count"]), None, match["end"], series))
            continue
        low = int(match["low"])
        high = low if not match["dash"] else int(match["high"]) if match["high"] else None
        if high is not None and high < low:
            raise ConfigError(f"{what}: {part!r} ends before it begins; write {high}-{low}")
        numbers.append(Numbers(low, high, "", series))
    return tuple(numbers)


def parse_percent(value: object) -> tuple[Span, ...]:
    """A window over the progress of the run: `0-0.2`, `20%-80%`, `last 10%`.

    Raises:
        ConfigError: a part is not of these forms, or not between 0 and 1.
    """
    spans = []
    for part in _parts(value, "percent"):
        match, at_end = _SPAN.fullmatch(part), _PART.fullmatch(part.lower())
        if at_end:
            share = _share(at_end[2], True, part)
            spans.append(Span(0.0, share) if at_end[1] == "first" else Span(1.0 - share, 1.0))
            continue
        if match is None:
            raise ConfigError(f"percent: {part!r} is not one of the forms 0-0.2, 20%-80%, first 10% or last 10%")
        span = Span(_share(match[1], bool(match[2] or match[4]), part), _share(match[3], bool(match[4]), part))
        if span.last <= span.first:
            raise ConfigError(f"percent: {part!r} ends before it begins; the run goes from 0 to 1")
        spans.append(span)
    return tuple(spans)


def parse_sigmas(value: object) -> tuple[Span, ...]:
    """A window over the model's own sigmas, in either order: `1-0.85`, `0.3-0`.

    Raises:
        ConfigError: a part is not of this form.
    """
    spans = []
    for part in _parts(value, "sigmas"):
        match = _SPAN.fullmatch(part)
        if match is None or match[2] or match[4]:
            raise ConfigError(f"sigmas: {part!r} is not of the form 1-0.85: two sigmas of this model")
        first, second = float(match[1]), float(match[3])
        if not isfinite(first + second):
            raise ConfigError(f"sigmas: {part!r} is larger than any sigma")
        spans.append(Span(max(first, second), min(first, second)))
    return tuple(spans)


def parse_flag(value: object, what: str) -> bool:
    """A boolean, given as such or as text.

    Raises:
        ConfigError: it is neither.
    """
    flag = {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(flag, bool):
        raise ConfigError(f"{what} must be true or false, not {value!r}")
    return flag


def _parts(value: object, what: str) -> list[str]:
    if isinstance(value, (list, tuple)):
        if len(value) > MOST_PARTS or any(isinstance(each, (list, tuple)) for each in value):
            raise ConfigError(f"{what}: expected text, or a list of at most {MOST_PARTS} texts, not {value!r}")
        parts = [part for each in value for part in _parts(each, what)]
        _check_parts(parts, what)
        return parts
    if isinstance(value, int) and value.bit_length() > LONGEST:
        raise ConfigError(f"{what}: a number of {value.bit_length()} bits is no step and no block")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ConfigError(f"{what}: expected text such as '0-3,last 2', not {type(value).__name__}: {value!r}")
    if isinstance(value, str) and len(value) > LONGEST:
        raise ConfigError(f"{what}: more than {LONGEST} characters: no window is that long")
    parts = [" ".join(part.split()) for part in str(value).split(",")]
    _check_parts(parts, what)
    if parts == [""]:
        return []
    if "" in parts:
        raise ConfigError(f"{what}: {value!r} has nothing between two commas, or after one")
    return parts


def _check_parts(parts: list[str], what: str) -> None:
    if len(parts) > MOST_PARTS:
        raise ConfigError(f"{what}: {len(parts)} parts > {MOST_PARTS}; join neighbours, as in 0-3")
    if sum(map(len, parts)) + len(parts) > LONGEST:
        raise ConfigError(f"{what}: more than {LONGEST} characters: no window is that long")


def _share(text: str, hundredths: bool, part: str) -> float:
    share = float(text) / 100 if hundredths else float(text)
    if share > 1:
        limit = "100%" if hundredths else "1"
        raise ConfigError(f"percent: {part!r} goes past {limit}; write 0-0.2 or 0%-20%")
    return share


def _written(number: float) -> str:
    text = repr(float(number))
    return text.removesuffix(".0")
