"""The texts of the golden set in today's words: of reasons, which are ids with values, and of some tooltips.

Kinds, cards, limits and names stay as they were written; only the sentence around them is another one.
"""

from __future__ import annotations

import re
from typing import Any

from attention_backends.backends.values.platform import Platform
from attention_backends.backends.values.reasons import TEMPLATES

GROUPED = re.compile(r"((?:flash|sage)_\w+): (.*)", re.DOTALL)
"""A member of a backend group with its reason."""


def reworded(value: Any) -> Any:
    """The data of a golden line with its reasons in today's words."""
    if isinstance(value, dict):
        return {key: reworded(each) for key, each in value.items()}
    if isinstance(value, list):
        return _named_once([reworded(each) for each in value])
    if not isinstance(value, str):
        return value
    for pattern, words in PHRASES:
        value = re.sub(pattern, words, value)
    head, found, reasons = value.partition("nothing to install on this machine: ")
    return f"{head}{found}{'; '.join(_named_once(re.split(r'; (?!this one)', reasons)))}" if found else value


def _named_once(reasons: list[Any]) -> list[Any]:
    """Reasons of a group's members, each once: without names where all members have it."""
    found = [GROUPED.fullmatch(reason) if isinstance(reason, str) else None for reason in reasons]
    if not reasons or not all(found):
        return reasons
    named: dict[str, list[str]] = {}
    for match in found:
        named.setdefault(match[2], []).append(match[1])  # type: ignore[index]
    members = len({name for names in named.values() for name in names})
    devices = [re.fullmatch(r"needs (.*) \(this is (.*)\)", reason) for reason in named]
    if all(devices):
        needed = dict.fromkeys(part for each in devices for part in each[1].split(" or "))  # type: ignore[index]
        return [f"needs {' or '.join(needed)} (this is {devices[0][2]})"]  # type: ignore[index]
    return [why if len(names) == members else f"{', '.join(names)}: {why}" for why, names in named.items()]


def _device(found: re.Match[str]) -> str:
    *first, last = (TEMPLATES[f"device.{kind}"] for kind in found[2].split(", "))
    needed = f"{', '.join(first)} or {last}" if first else last
    return f"needs {needed} (this is {TEMPLATES[f'device.{found[1]}']})"


def _cards(found: re.Match[str]) -> str:
    described = [_card(text) for text in found[3].split(", ")]
    names = "/".join(dict.fromkeys(card.architecture for card in described))
    article = "an" if names.startswith("A") else "a"
    shown = ", ".join(map(_sm, described))
    size = f"GPU or newer ({shown})" if found[2] == "<" else f"GPU ({shown})"
    return f"needs {article} {names} {size}; this one is {_sm(_card(found[1]))}"


def _card(text: str) -> Platform:
    major, minor = map(int, text.split("."))
    return Platform("cuda", capability=(major, minor))


def _sm(card: Platform) -> str:
    return (card.sm or "").replace("_", "")


PHRASES: tuple[tuple[str, Any], ...] = (
    (r"device (\w+) not in \(([^)]*)\)", _device),
    (r"compute capability (\d+\.\d) (<) (\d+\.\d)", _cards),
    (r"compute capability (\d+\.\d) (not in) \(([^)]*)\)", _cards),
    (r"\bcompute capability unknown", TEMPLATES["capability.unknown"]),
    (r"\barchitecture unknown not in \(([^)]*)\)", r"does not support an unknown AMD GPU, only (\1)"),
    (r"\barchitecture (\w+) not in \(([^)]*)\)", r"does not support \1, only (\2)"),
    (
        r"architecture (\w+): (\w+)=TRUE is not set, which flash-attn's Triton backend needs",
        r"on \1 flash-attn needs its Triton backend: \2=TRUE is not set",
    ),
    (r"dtype (\w+) not in \([^)]*\)", r"does not support \1"),
    (r"mask kind (\w+) not in \(key_padding, bool\): no block", r"with mask kind \1 no block"),
    (r"is skipped, SDPA is faster", "is skipped, and SDPA is faster"),
    (r"mask kind (\w+) not in \([^)]*\)", r"does not support a \1 mask"),
    (r"is_causal is not supported", "does not support is_causal"),
    (r"grouped query heads (\S+) are not supported", r"does not support grouped query heads (\1)"),
    (r"not built into this version of attention-backends", "not supported yet"),
    (r"the account of the run says so", "the run report says so"),
    (r"Put it between the sampler and the node that saves, best right", "Place it just"),
    (r"^(Place it just before) that one:", r"\1 Save Image or Save Video:"),
    (r"One that cannot run here is a panel that says why", "Unavailable ones are shown with the reason"),
    (r"A model with attention nodes of its own, as a row", "Optional: an already patched model to include"),
    (r"are taken here, so it is what auto takes", "are taken here, so auto decides"),
)
"""Old words and today's."""
