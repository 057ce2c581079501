"""Texts for a browser or a bug report: without names of folders, which contain people's names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_POSIX = r"(?<![\w./~*-])(?!//)(?:~[\w.-]*)?/(?:[^\s/'\"`,;:()<>|\[\]]+/)+([^\s/'\"`,;:()<>|\[\]]*)"
_WINDOWS = (
    r"(?<![A-Za-z0-9])(?:[A-Za-z]:|\\\\[^\\/:*?\"<>|\s]+)[\\/]"  # a drive or a share
    r"(?:[^\\/:*?\"'<>|\r\n,;()]+[\\/])*([^\\/:*?\"'<>|\s,;()]*)"
)
_QUOTED = re.compile(r"""(["'])((?:~?/|[A-Za-z]:\\|\\\\)[^"'\r\n]*)\1""")
_SEPARATOR = re.compile(r"[/\\]")
_PATH = re.compile(f"{_WINDOWS}|{_POSIX}")
_LOGIN = re.compile(r"(?<=://)[^\s/@]+@")
_HOMES = r"(?:/home|/Users|[A-Za-z]:[\\/]Users)[\\/]"
_NAME = r"[^\\/\r\n'\":;,<>|()]"
_IN_HOME = re.compile(f"{_HOMES}{_NAME}+(?=[\\\\/])")
_HOME = re.compile(f"{_HOMES}{_NAME}+?(?=$|[\\r\\n'\":;,<>|()]| (?![A-Z]))")


def without_paths(text: str) -> str:
    """The text with each absolute path cut down to its last part: `.../libtorch.so`. Web addresses stay."""
    home = str(Path.home())
    if len(home) > 1:  # first, since a home folder may have a space in its name
        text = text.replace(home, "~")
    text = _LOGIN.sub("", text).replace("file://", "")
    # The folder that bears a person's name, which may hold spaces: in the middle of a path, then at its end.
    text = _IN_HOME.sub(lambda found: "C:" if found[0][1] == ":" else "~", text)
    text = _HOME.sub("~", text)
    # Inside quotes a name may hold spaces.
    text = _QUOTED.sub(lambda found: f"{found[1]}.../{_SEPARATOR.split(found[2])[-1]}{found[1]}", text)
    return _PATH.sub(lambda found: f".../{found[1] or found[2] or ''}", text)


def clean(data: Any, seen: dict[str, str] | None = None) -> Any:
    """Plain data with every text in it passed through `without_paths`, each different text once."""
    seen = {} if seen is None else seen
    if isinstance(data, str):
        if data not in seen:
            seen[data] = without_paths(data)
        return seen[data]
    if isinstance(data, dict):
        return {key: clean(value, seen) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [clean(value, seen) for value in data]
    return data
