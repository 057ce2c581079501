"""Inputs of our nodes before anything runs: what is connected, and what a script may send instead of a value.

ComfyUI converts the values of widgets and compares choices and limits itself. It does not look at sockets that hold a
value instead of a connection, and it makes the text "None" of a text input that is null.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from comfy_execution.validation import validate_node_input

from ..backends.values.reasons import Reason

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
"""Types of inputs that may hold a value; all others are connected."""


def wrong_link(node: Any, input_types: Mapping[str, Any] | None, **sockets: Any) -> str | None:
    """What is wrong with what is connected to a node, or None.

    Where `validate_inputs` takes `input_types`, ComfyUI leaves the types of connections to the node, all of them.

    Args:
        input_types: input -> type of the output that is connected to it; None where a program asks.
        sockets: what the prompt has for optional sockets, None for nothing and for a connection.
    """
    if input_types is None:
        return None
    groups = node.INPUT_TYPES()
    for category in ("required", "optional"):
        for name, (wanted, *_) in groups.get(category, {}).items():
            if name in input_types:
                if not validate_node_input(input_types[name], wanted):
                    return f"{name} takes {wanted}, and {input_types[name]} is connected to it"
            elif wanted not in WIDGETS and not isinstance(wanted, list):
                given = sockets.get(name)
                if given is not None:
                    return f"{name} holds {type(given).__name__} and no connection: connect an output of type {wanted}"
                if category == "required":
                    return f"{name} is not connected: connect an output of type {wanted}"
    return None


NOT_OPTIONS = re.compile(
    r"true|false|null|undefined|nan|[-+]?\d+(\.\d*)?|fixed|increment|decrement|randomize|\[object \w+\]", re.IGNORECASE
)
"""Values that are no options, and that other packs store behind a node's widgets; ComfyUI gives them to the last widget
of the node, which older graphs did not have."""


def options_of(value: Any) -> Any:
    """The text of `kernel options`; empty where it is one of `NOT_OPTIONS`."""
    text = text_of(value)
    return "" if isinstance(text, str) and NOT_OPTIONS.fullmatch(text.strip()) else text


def about_options(value: Any) -> tuple[str, ...]:
    """The note about a value that `options_of` leaves out."""
    left_out = isinstance(value, str) and value.strip() and not options_of(value) and text_of(value)
    return (Reason("options.left_out", value=repr(value)),) if left_out else ()


def text_of(value: Any, default: str = "") -> Any:
    """A text input as it was given; its default where a script sent null, which arrives as the text None."""
    return default if value == "None" else value
