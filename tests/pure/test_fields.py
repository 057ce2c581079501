"""Reading plain data field by field: what is accepted, and that an error names the field by its path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from attention_backends.backends.values.errors import ConfigError
from attention_backends.backends.values.fields import LONGEST_TEXT, Fields

Reader = Callable[[Fields], object]
LONG = "x" * LONGEST_TEXT
READERS: dict[str, tuple[Reader, list[Any], list[Any]]] = {
    "text": (lambda fields: fields.text("a"), ["", "x", LONG], [None, 1, ["x"], LONG + "x"]),
    "text of some length": (lambda fields: fields.text("a", least=1), ["x"], [""]),
    "whole": (lambda fields: fields.whole("a", 1), [1, 2**47], [0, True, 1.0, "1", 2**48, None]),
    "number": (lambda fields: fields.number("a", 0), [0, 1.5], [-1, True, "1", float("nan"), 1e999, 10**400, None]),
    "flag": (lambda fields: fields.flag("a"), [True, False], [0, 1, "true", None]),
    "one of": (lambda fields: fields.one_of("a", ("x", "y")), ["x"], ["z", None, [], 1]),
    "items": (lambda fields: fields.items("a"), [[], [1]], ["x", (1,), None]),
    "inner": (lambda fields: fields.inner("a").data, [{}, {"b": 1}], [[], "x", None]),
}  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
def test_each_reader_takes_its_kind_alone(kind: str) -> None:
    read, good, bad = READERS[kind]
    for value in good:
        assert read(Fields({"a": value})) == value
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            read(Fields({"a": value}, "top[1]", ConfigError))
        assert str(caught.value).startswith("top[1].a: ")


def test_a_field_that_is_missing_needs_a_default() -> None:
    fields = Fields({})
    assert (fields.text("a", ""), fields.whole("a", 0, 0), fields.flag("a", False)) == ("", 0, False)
    assert (fields.one_of("a", ("x",), "x"), fields.items("a", []), fields.inner("a", {}).data) == ("x", [], {})


def test_paths_are_those_of_the_whole() -> None:
    inner = Fields({"a": {"b": {}}}).inner("a").inner("b")
    with pytest.raises(ValueError, match=r"^a\.b\.c: "):
        inner.text("c")
    with pytest.raises(ValueError, match=r"^a\.b: unknown entry d"):
        Fields({"d": 1}, inner.where).only(("c",))
    with pytest.raises(ValueError, match="expected a mapping, not int"):
        Fields(3)
