"""What a node can know of the graph around it: the nodes it depends on, and the settings they were given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

Prompt = Mapping[str, Mapping[str, Any]]
"""ComfyUI's API form: node id -> {"class_type", "inputs"}; a link is a list of node id and output number."""

SELECTOR = "AttentionBackendSelector"
OURS = (
    SELECTOR,
    "PerRoleAttentionConfig",
    "AttentionSchedule",
    "AttentionConfigText",
    "AttentionOverGPUs",
    "AttentionReport",
    "AttentionRecord",
)
"""Nodes that make runs differ on purpose: left out of the settings that have to be equal."""


def ancestors(
    prompt: Prompt, node_id: str, stop: Container[str] = (), follow: Callable[[str, int], bool] | None = None
) -> list[str]:
    """Ids of every node that `node_id` depends on, nearest first; nodes in `stop` are named but not followed.

    follow: of a node's class and the number of its output, whether links from there count; all without it.
    """
    found: dict[str, None] = {}
    seen: set[tuple[str, int]] = set()
    pending = list(_outputs(prompt.get(node_id, {})))
    for current, number in pending:  # it grows while we read it
        if (current, number) in seen or current not in prompt:
            continue
        seen.add((current, number))
        if follow is None or follow(str(prompt[current].get("class_type")), number):
            found[current] = None
            pending += () if current in stop else _outputs(prompt[current], number)
    return list(found)


def _outputs(node: Mapping[str, Any], number: int | None = None) -> Iterator[tuple[str, int]]:
    """The outputs that a node takes, id of the node and number: all, or those that decide its own output `number`.

    A selector patches two models separately: each goes from its input to one output.
    """
    apart = number is not None and node.get("class_type") == SELECTOR
    other = ("model_2", "model")[number == 1] if apart else None
    for name, value in sorted(node.get("inputs", {}).items()):
        if name != other and _is_link(value):
            yield str(value[0]), value[1]


def _links(node: Mapping[str, Any]) -> Iterator[str]:
    return (name for name, _ in _outputs(node))


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)


def is_taken(prompt: Prompt, node_id: str, number: int) -> bool:
    """Whether any node takes this output. True where that cannot be known: the node is not in the graph as queued."""
    if node_id not in prompt:
        return True
    inputs = (value for node in prompt.values() for value in node.get("inputs", {}).values())
    return any(_is_link(value) and (str(value[0]), value[1]) == (node_id, number) for value in inputs)


def descendants(prompt: Prompt, node_id: str) -> list[str]:
    """Ids of every node that depends on `node_id`, in order."""
    found = {node_id}
    for _ in prompt:  # at most as many rounds as nodes
        more = {name for name, node in prompt.items() if name not in found and found & set(_links(node))}
        if not more:
            break
        found |= more
    return sorted(found - {node_id})


SEEDS = ("seed", "noise_seed")


def seed(prompt: Prompt, node_id: str) -> int | None:
    """The seed of a node that samples, from itself or the nearest node before it; None where a link gives it."""
    for name in (node_id, *ancestors(prompt, node_id)):
        inputs = prompt[name].get("inputs", {})
        found = next((inputs[key] for key in SEEDS if key in inputs), None)
        if found is not None:
            return found if isinstance(found, int) else None
    return None


def likeness(prompt: Prompt, node_id: str) -> str:
    """As `signature`, without seeds and the values on our nodes: runs of one likeness do the same work."""
    return signature(prompt, node_id, lambda class_type, name: class_type in OURS or name in SEEDS)


def signature(prompt: Prompt, node_id: str, ignored: Callable[[str, str], bool] | None = None) -> str:
    """A hash of what decides a node's output: its class and inputs, and those of everything it depends on.

    Node ids and titles are not in it, as they are not in the key of ComfyUI's cache (`CacheKeySetInputSignature`):
    a graph with other numbers takes the same result from the cache. A file that changed under its name is not seen.

    ignored: whether the value of an input is left out, by class and input; none without it. Links never are.
    """
    names = [node_id, *ancestors(prompt, node_id)]
    places = {name: index for index, name in enumerate(names)}
    nodes = [
        [
            prompt[name].get("class_type"),
            [
                [key, "link", places.get(str(value[0])), value[1]] if _is_link(value) else [key, "value", value]
                for key, value in sorted(prompt[name].get("inputs", {}).items())
                if _is_link(value) or ignored is None or not ignored(str(prompt[name].get("class_type")), key)
            ],
        ]
        for name in names
    ]
    return hashlib.sha256(json.dumps(nodes, sort_keys=True, default=str).encode()).hexdigest()


def origin(prompt: Prompt, node_id: str) -> str | None:
    """The node of the graph that a running node belongs to: itself, or the one that ComfyUI expanded into it.

    The id of an expanded node begins with that of its origin and a point (`GraphBuilder.alloc_prefix`).
    """
    name = node_id
    while name not in prompt and "." in name:
        name = name.rpartition(".")[0]
    return name if name in prompt else None


def settings(prompt: Prompt, node_id: str) -> dict[str, Any]:
    """Every value set by hand upstream of `node_id`, as `NodeClass.input` -> value.

    Where several nodes of one class hold different values (two prompts), the value is their sorted list. Links and
    our own nodes are left out, so two branches that differ only in attention have equal settings.
    """
    values: dict[str, list[Any]] = {}
    for ancestor in ancestors(prompt, node_id):
        node = prompt[ancestor]
        if node.get("class_type") in OURS:
            continue
        for name, value in node.get("inputs", {}).items():
            if not isinstance(value, list):
                values.setdefault(f"{node['class_type']}.{name}", []).append(value)
    return {key: found[0] if len(found) == 1 else sorted(found, key=str) for key, found in sorted(values.items())}


def values(settings: Mapping[str, Any], *names: str) -> list[Any]:
    """What `settings` holds for inputs of these names, of any node; empty texts left out."""
    found = [value for key, value in settings.items() if key.rsplit(".", 1)[-1] in names]
    return [each for value in found for each in (value if isinstance(value, list) else [value]) if each != ""]
