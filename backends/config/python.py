"""Python that was pasted where a configuration belongs: recognised, and answered with the names that stand in it.

The documents of vLLM-Omni and Diffusers show their settings as Python. Nothing here runs it.
"""

from __future__ import annotations

import ast
import re
from itertools import islice

from .names import AUTO, is_known

_OF_THE_SYSTEMS = re.compile(
    r"\b(set_attention_backend|attention_backend|force_backend|AttentionConfig|AttentionSpec|OmniDiffusionConfig)\s*\("
)
_CODE = (ast.Call, ast.Import, ast.ImportFrom, ast.With, ast.FunctionDef)
_LONGEST, _MOST_NAMES = 4000, 100
"""Characters of a text that is compiled to find out, and texts in it that are looked up; examples are shorter."""
_ESCAPE = re.compile(r"\\[^\n\r'\"]")
"""Made harmless before parsing: Python warns of those it does not know, and its filters belong to the whole process."""


def python_problem(text: str) -> str | None:
    """What to say about a text that is Python, with the backends that it names; None where it is none."""
    if not _is_python(text):
        return None
    quoted = dict.fromkeys(a or b for a, b in re.findall(r"\"([^\"\n]+)\"|'([^'\n]+)'", text))
    names = [name for name in islice(quoted, _MOST_NAMES) if name.lower() != AUTO and is_known(name)]
    if len(names) == 1:
        return f"this is Python; paste the name alone: {names[0]}"
    if names:
        said = ", ".join(names)
        return f"this is Python; paste its names ({said}) as text, such as default: {names[0]} and per_role: entries"
    return "this is Python; paste a backend's name, flags, JSON or YAML"


def _is_python(text: str) -> bool:
    if _OF_THE_SYSTEMS.search(text):
        return True
    if len(text) > _LONGEST or not ("(" in text or re.match(r"\s*(import|from|with)\s", text)):
        return False
    try:
        tree = ast.parse(_ESCAPE.sub("/_", text.strip()))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, _CODE) for node in ast.walk(tree))
