"""The words of a command line or of `name=value` pairs, and the value that a word stands for.

Quotes, brackets, `#` comments and lines continued with a backslash are read as a shell would.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..values.data import load_json
from ..values.errors import ConfigError

_NUMBER = re.compile(r"[+-]?(\d{1,40}(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?")
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_CLOSES = {"{": "}", "[": "]"}


class Word(NamedTuple):
    """One word of a command line, without its quotes."""

    text: str
    line: int


def words_of(text: str, source: str) -> list[Word]:
    """Split at white space outside quotes and brackets.

    Raises:
        ConfigError: a quote or a bracket is never closed.
    """
    words: list[Word] = []
    current: list[str] = []
    started, line, quote, opened, closing = False, 1, "", 1, []  # type: tuple[bool, int, str, int, list[str]]
    index = 0
    while index < len(text):
        char, after = text[index], text[index + 1 : index + 2]
        index += 1
        if char == "\n":
            line += 1
        if quote:
            if char == quote:
                quote = ""
                current += [char] if closing else []
            elif char == "\\" and quote == '"' and after in ('"', "\\") and not closing:
                current.append(after)
                index += 1
            else:
                current.append(char)
        elif char in "'\"" and (closing or not started or current[-1:] in (["="], [","])):
            quote, opened, started = char, line, True
            current += [char] if closing else []
        elif char in "\\^`" and after in ("\n", "\r") and not closing:  # also as Windows' shells continue a line
            continue
        elif char in _CLOSES:
            closing.append(_CLOSES[char])
            opened, started = line, True
            current.append(char)
        elif closing and char == closing[-1]:
            closing.pop()
            current.append(char)
        elif closing or not char.isspace():
            if char == "#" and not started:
                end = text.find("\n", index)
                index = len(text) if end < 0 else end
                continue
            started = True
            current.append(char)
        elif started:
            words.append(Word("".join(current), line - (char == "\n")))
            current, started = [], False
    if quote or closing:
        raise ConfigError(f"{source}: {quote or closing[-1]!r} is missing: what opens on line {opened} is never closed")
    if started:
        words.append(Word("".join(current), line))
    return words


def with_assignments(words: list[Word]) -> list[Word]:
    """`name = value`, three words of one line, as one word."""
    joined: list[Word] = []
    for word in words:
        before = joined[-2:]
        if (
            len(before) == 2
            and before[1].text == "="
            and _NAME.fullmatch(before[0].text)
            and before[0].line == before[1].line == word.line - word.text.count("\n")
        ):
            joined[-2:] = [Word(f"{before[0].text}={word.text}", word.line)]
        else:
            joined.append(word)
    return joined


def at_commas(text: str) -> list[str]:
    pieces, begin, depth, quoted, escaped = list[str](), 0, 0, False, False
    for index, char in enumerate(text):
        if depth and char == '"' and not escaped:
            quoted = not quoted
        escaped = quoted and char == "\\" and not escaped
        if not quoted:
            depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            pieces.append(text[begin:index])
            begin = index + 1
    pieces.append(text[begin:])
    return [piece for piece in pieces if piece.strip()]


def scalar(text: str) -> object:
    """A value as it is written: true, false, a number, JSON (a list, a mapping, a quoted text), else the text."""
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _NUMBER.fullmatch(text):
        return float(text) if any(mark in text for mark in ".eE") else int(text)
    if text[:1] in ("{", "[", '"'):
        try:
            return load_json(text, "value")
        except ConfigError:
            return text
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1]
    return text
