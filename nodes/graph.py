"""What a node can know of the graph around it: the nodes it depends on, and the settings they were given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Prompt = Mapping[str, Mapping[str, Any]]
"""ComfyUI's API form: node id -> {"class_type", "inputs"}; a link is a list of node id and output number."""

OURS = (
    "AttentionBackendSelector",
    "PerRoleAttentionConfig",
    "AttentionSchedule",
    "AttentionConfigText",
    "AttentionReport",
)
"""Nodes that make runs differ on purpose: left out of the settings that have to be equal."""


def ancestors(prompt: Prompt, node_id: str) -> list[str]:
    """Ids of every node that `node_id` depends on, nearest first."""
    found: list[str] = []
    pending = list(_links(prompt.get(node_id, {})))
    while pending:
        current = pending.pop(0)
        if current not in found and current in prompt:
            found.append(current)
            pending += _links(prompt[current])
    return found


def _links(node: Mapping[str, Any]) -> Iterator[str]:
    for value in node.get("inputs", {}).values():
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int):
            yield str(value[0])


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
