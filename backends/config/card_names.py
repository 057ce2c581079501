"""Names of the devices over which heads are divided: `all`, `off`, or a list such as `cuda:0, cuda:1`."""

from __future__ import annotations

import re

from ..values.bounded import shortened
from ..values.errors import ConfigError

ALL, OFF = "all", "off"
MOST = 64
"""Names in a list."""
_NAME = re.compile(r"(?:cuda:)?(\d{1,2})")


def card_names(value: object, where: str = "cards") -> tuple[str, ...]:
    """The names as a tuple: `("all",)`, empty for `off`, or each device once, in order.

    Text is divided at commas and spaces; a number is the CUDA device with that number. `where`: for errors.

    Raises:
        ConfigError: something else; the message has it.
    """
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    elif isinstance(value, int):
        value = [value]  # also false, as YAML reads `off`
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where} must be text or a list, not {type(value).__name__}: {shortened(repr(value), 80)}")
    words = [OFF if name is False else str(name).strip().lower() for name in value]
    if words in ([OFF], []):
        return ()
    if words == [ALL]:
        return (ALL,)
    found = [_NAME.fullmatch(word) for word in words]
    wrong = [word for word, name in zip(words, found, strict=True) if name is None]
    if wrong or len(words) > MOST:
        said = ", ".join(shortened(word, 40) for word in wrong[:3]) or f"{len(words)} names"
        raise ConfigError(f"{where}: {said} is not {ALL}, {OFF}, or a list of devices such as cuda:0, cuda:1")
    return tuple(dict.fromkeys(f"cuda:{int(name[1])}" for name in found if name is not None))
