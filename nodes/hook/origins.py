"""Names the node or pack that made a function: the node's title, else the pack's folder.

A function belongs to the node whose class defines it. Where several classes of a pack could have made it, the queued
graph decides: the one node of that pack in it that gives a MODEL.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..history.graph import Prompt

PURE_SELECTORS = re.compile(
    r"ModelPatcher\.set_model_optimized_attention\.<locals>\.optimized_attention_override"  # ComfyUI's own node
    r"|(.*\.)?attention_override_(pytorch|sage|xformers|flash)"  # KJNodes' loaders and patches, and packs after them
)
"""Names of overrides that only choose a kernel. Our node comes later in the graph, so its choice replaces
theirs; any other override is composed with.
"""
MADE_BY = {"ModelPatcher.set_model_optimized_attention": ("ModelAttentionBackend", "Model Attention Backend")}
"""Functions of ComfyUI's library that make an override: the one node of ComfyUI that calls them, and its name."""
CORE = ("nodes", "comfy", "comfy_extras", "comfy_api", "comfy_api_nodes", "comfy_execution")
"""Packages whose code is ComfyUI's own."""
LIBRARIES = ("torch", "functools", "builtins", "operator")
EXTRAS = re.compile(r"(^|[/\\])(comfy_extras|comfy_api_nodes)[/\\]")
COMFYUI = "ComfyUI"
DEEPEST = 4
"""How many functions below each other `below` looks through."""


def name_of(func: Any) -> str:
    """A function's own name, for code that knows it; `title_of` is for people."""
    return getattr(func, "__qualname__", None) or type(func).__qualname__


def is_selector(func: Any) -> bool:
    """Whether an override only chooses a kernel; see `PURE_SELECTORS`."""
    return PURE_SELECTORS.fullmatch(name_of(func)) is not None


def below(func: Any, wanted: Callable[[Any], bool], depth: int = 0) -> Any:
    """The first function satisfying `wanted` that another one keeps to call; None where there is none."""
    for callee in _held(func):
        if wanted(callee):
            return callee
        found = below(callee, wanted, depth + 1) if depth < DEEPEST else None
        if found is not None:
            return found
    return None


def _held(func: Any) -> Iterator[Any]:
    """The callables that a function refers to: closure, arguments of a partial, attributes of its object."""
    callables: list[Any] = []
    if isinstance(func, functools.partial):
        callables = [func.func, *func.args, *func.keywords.values()]
    for cell in getattr(func, "__closure__", None) or ():
        try:
            callables.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    owner = getattr(func, "__self__", None) if hasattr(func, "__func__") else func
    if not isinstance(owner, type) and not hasattr(owner, "__code__"):
        callables += getattr(owner, "__dict__", {}).values()
    return (one for one in callables if callable(one) and not isinstance(one, type) and one is not func)


def origin(func: Any) -> tuple[str, str, str]:
    """Module, qualified name and file of the code behind a function; the file is empty where that is not known.

    From the code itself: `functools.wraps` copies the names of the function that is wrapped.
    """
    for _ in range(DEEPEST):
        if isinstance(func, functools.partial):
            given = [one for one in (func.func, *func.args, *func.keywords.values()) if callable(one)]
            func = next((one for one in given if not _is_library(origin(one)[0])), func.func)
        else:
            break
    func = getattr(func, "__func__", func)
    code = getattr(func, "__code__", None)
    if code is None:  # an object that is called
        kind = type(func)
        call = getattr(kind.__call__, "__code__", None)
        return kind.__module__, kind.__qualname__, call.co_filename if call is not None else ""
    module = func.__globals__.get("__name__") or func.__module__ or ""
    return str(module), str(getattr(code, "co_qualname", func.__qualname__)), code.co_filename


def is_foreign(func: Any, home: str) -> bool:
    """Whether a function that a module of package `home` should hold is another package's."""
    return _top(origin(func)[0]) not in (_top(home), "torch", "")


def title_of(func: Any, prompt: Prompt | None = None) -> str:
    """Who made a function: `Model Sparse Attention (ComfyUI)`; the title that a person gave the node comes first."""
    if func is None:
        return "another pack"
    module, qualname, file = origin(func)
    prompt = prompt or {}
    core = is_core(module)
    folder = COMFYUI if core else _folder(module) or _folder(file)
    node_id, name = _node(module, qualname, folder, prompt)
    if node_id is None and name is None:
        if folder is not None:
            return f"a node of {folder}"
        return f"the Python module {re.split(r'[/.]', module.strip('/'))[-1] or 'unknown'}"
    name = name or _display_name(str(node_id))
    titles = {
        str(node.get("_meta", {}).get("title", "")) for node in prompt.values() if node.get("class_type") == node_id
    } - {""}
    own = titles.pop() if len(titles) == 1 else name
    where = f", {folder}" if folder else ""
    if own not in (name, node_id):
        return f"{own} ({name}{where})"
    return f"{name} ({folder})" if folder else name


def is_core(module: str) -> bool:
    """Whether a module is ComfyUI's own; those of its extra nodes have a path as their name."""
    return _top(module) in CORE or (_folder(module) is None and EXTRAS.search(module) is not None)


def _is_library(module: str) -> bool:
    return is_core(module) or _top(module) in LIBRARIES


def _top(module: str) -> str:
    return module.partition(".")[0]


def _folder(text: str) -> str | None:
    """The folder of a pack in the name of a module, where ComfyUI writes `_x_` for points, or in a path."""
    match = re.search(r"custom_nodes[/\\.]([^/\\.]+)", text)
    return match[1].replace("_x_", ".") if match else None


def _node(module: str, qualname: str, place: str | None, prompt: Prompt) -> tuple[str | None, str | None]:
    """The id of the node that a function belongs to, and its name where that is known without asking."""
    for prefix, known in MADE_BY.items():
        if qualname.startswith(prefix):
            return known
    classes = _mapping("NODE_CLASS_MAPPINGS")
    here = [node_id for node_id, kind in classes.items() if kind.__module__ == module]
    outer = qualname.partition(".")[0]
    own = [node_id for node_id in here if classes[node_id].__name__ == outer]
    if own or len(here) == 1:
        return (own or here)[0], None
    mine = [
        node_id
        for node_id, kind in classes.items()
        if not is_core(kind.__module__) and _folder(kind.__module__) == place
    ]
    queued = {str(node.get("class_type")) for node in prompt.values()}
    candidates = here if place == COMFYUI or place is None else mine
    used = [name for name in candidates if name in queued and "MODEL" in getattr(classes[name], "RETURN_TYPES", ())]
    return (used[0] if len(used) == 1 else None), None


def _display_name(node_id: str) -> str:
    """The name in ComfyUI's menus; of nodes that are listed without one it is in their schema."""
    named = _mapping("NODE_DISPLAY_NAME_MAPPINGS").get(node_id)
    schema = getattr(_mapping("NODE_CLASS_MAPPINGS").get(node_id), "GET_SCHEMA", None)
    return str(named or (schema is not None and schema().display_name) or node_id)


def _mapping(name: str) -> Mapping[str, Any]:
    """A mapping of ComfyUI's module `nodes`; empty where a program runs without it."""
    found = getattr(sys.modules.get("nodes"), name, None)
    return found if isinstance(found, dict) else {}
