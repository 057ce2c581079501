"""Splits a command line or `name=value` pairs into words, and reads the value of a word.

Not `shlex`, which removes backslashes of Windows paths, opens a quote inside a word such as `don't`, starts a comment
inside a word, and does not know brackets: JSON may be unquoted here.
"""

from __future__ import annotations

import re

from ..values.errors import ConfigError
from ..values.plain_data import load_json

_NUMBER = re.compile(r"[+-]?(\d{1,40}(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?")
_ASSIGNED = re.compile(r"[A-Za-z_][\w.-]*")
_CLOSES = {"{": "}", "[": "]"}
_MARK = re.compile(r'"(?:\\.?|[^"\\])*(?:"|\Z)|[{}\[\]]', re.DOTALL)
"""What counts inside brackets: a text of JSON, to the end where it is not closed, and brackets."""
_GAP = re.compile(r"(?:\s|[\\^`](?=[\r\n])|(?:(?<=\s)|\A)#.*)+")
"""Between words: white space, a line that is continued as in a shell of any system, a comment."""
_QUOTED = re.compile(r""""((?:\\["\\]|\\(?!["\\])|[^"\\])*)"|'([^']*)'""")
_ESCAPED = re.compile(r'\\(["\\])')
_PLAIN = re.compile(r"""[=,]|(?:(?![\\^`][\r\n])[^\s{\["'=,])+|["']""")
"""Of a word: up to where a quote or a bracket may open."""


def words_of(text: str, source: str) -> list[str]:
    """Split at white space outside quotes and brackets, without the quotes.

    Raises:
        ConfigError: a quote or a bracket is never closed.
    """
    words: list[str] = []
    position, begins = 0, True
    while position < len(text):
        if gap := _GAP.match(text, position):
            position, begins = gap.end(), True
            continue
        char, match = text[position], _PLAIN.match(text, position)
        end, piece = (match.end(), match[0]) if match else (0, "")
        if char in _CLOSES:
            end = _end_of_brackets(text, position)
            piece = text[position:end]
        elif char in "'\"" and (begins or words[-1].endswith(("=", ","))):
            match = _QUOTED.match(text, position)
            end, piece = (match.end(), match[2] or _ESCAPED.sub(r"\1", match[1] or "")) if match else (0, "")
        if not end:
            line, missing = text.count("\n", 0, position) + 1, _CLOSES.get(char, char)
            raise ConfigError(f"{source}: {missing!r} is missing: what opens on line {line} is never closed")
        words += [""] if begins else []
        words[-1] += piece
        position, begins = end, False
    return words


def _end_of_brackets(text: str, position: int) -> int:
    """Behind the bracket that closes the one at `place`; 0 where none does."""
    closing: list[str] = []
    for match in _MARK.finditer(text, position):
        if match[0] in _CLOSES:
            closing.append(_CLOSES[match[0]])
        elif match[0] == closing[-1]:
            closing.pop()
            if not closing:
                return match.end()
    return 0


def with_assignments(words: list[str]) -> list[str]:
    """`name = value`, three words, as one."""
    joined: list[str] = []
    for word in words:
        if joined[-1:] == ["="] and _ASSIGNED.fullmatch(" ".join(joined[-2:-1])):
            joined[-2:] = [f"{joined[-2]}={word}"]
        else:
            joined.append(word)
    return joined


def at_commas(text: str) -> list[str]:
    """Split at commas outside brackets."""
    pieces, begin, position = list[str](), 0, 0
    while position < len(text):
        if text[position] == ",":
            pieces.append(text[begin:position])
            begin = position + 1
        position = (_end_of_brackets(text, position) or len(text)) if text[position] in _CLOSES else position + 1
    return [piece for piece in (*pieces, text[begin:]) if piece.strip()]


def scalar(text: str) -> object:
    """Parse a value: true, false, a number, JSON (a list, a mapping, a quoted text), else the text."""
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
