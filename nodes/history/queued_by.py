"""Which open workflow of which page queued a prompt, so that what ran is written on the nodes of that one alone.

The server's events name a prompt, and ids of nodes repeat between workflows. So a page sends a mark along, a random
text that means something to this page only, as an input of our nodes (web/workflow_runs.js): what front-end code may
add to a prompt without changing a function of ComfyUI. Here it is taken out again before the prompt is read, since
inputs decide what comes from the cache, and are written into pictures.
"""

from __future__ import annotations

import re
from typing import Any

INPUT = "attention_backends_mark"
KEY = "attention_backends"
"""In the prompt's `extra_data`, which goes through the queue and into no picture."""
_FORM = re.compile(r"[0-9a-z]{1,64}")


def take_mark(data: Any) -> Any:
    """Moves the mark of a prompt, as it was posted, from its nodes to its `extra_data`, and returns it.

    A handler for `PromptServer.add_on_prompt_handler`. What has another form than a prompt is ComfyUI's to refuse.
    """
    prompt = data.get("prompt") if isinstance(data, dict) else None
    nodes = prompt.values() if isinstance(prompt, dict) else ()
    inputs = [node["inputs"] for node in nodes if isinstance(node, dict) and isinstance(node.get("inputs"), dict)]
    found = [each.pop(INPUT) for each in inputs if INPUT in each]
    mark = next(filter(_is_mark, found), None)
    if mark is not None:
        extra = data.setdefault("extra_data", {})
        if isinstance(extra, dict):
            extra[KEY] = mark
    return data


def mark_of(extra_data: Any) -> str | None:
    """The mark in an entry of the queue; None where no page queued it."""
    mark = extra_data.get(KEY) if isinstance(extra_data, dict) else None
    return mark if _is_mark(mark) else None


def _is_mark(value: Any) -> bool:
    return isinstance(value, str) and _FORM.fullmatch(value) is not None
