"""The names and configuration keys that other systems publish, read from their sources, against those known here."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from .compare import ABSENT, DIFFERENT, SAME, UNREAD, Row
from .index import Tree


class System(NamedTuple):
    """Where a package lists its attention backends."""

    package: str
    file: str
    enum: str
    by_value: bool = False
    """A person writes the members' values, not their names."""
    ours: str = ""
    """The id of the system here; empty where the pack has no table of it."""
    keys: tuple[str, ...] = ()
    """Dataclasses of `keys_in` whose fields are a configuration's keys."""
    keys_in: str = ""
    """A file with dataclasses, or a folder whose files ask a configuration for keys."""


SYSTEMS = (
    System(
        "vllm-omni",
        "vllm_omni/diffusion/attention/backends/registry.py",
        "DiffusionAttentionBackendEnum",
        ours="vllm_omni",
        keys=("AttentionConfig", "AttentionSpec"),
        keys_in="vllm_omni/diffusion/data.py",
    ),
    System(
        "sglang",
        "sglang/multimodal_gen/runtime/platforms/interface.py",
        "AttentionBackendEnum",
        ours="sglang",
        keys_in="sglang/multimodal_gen/runtime/layers/attention/",
    ),
    System("diffusers", "diffusers/models/attention_dispatch.py", "AttentionBackendName", True, "diffusers"),
    System("xfuser", "xfuser/core/distributed/attention_backend.py", "AttentionBackendType", ours="xfuser"),
    System("fastvideo", "fastvideo/platforms/interface.py", "AttentionBackendEnum", ours="fastvideo"),
    System("yunchang", "yunchang/kernels/__init__.py", "AttnType", True, "yunchang"),
)


def members(source: str, enum: str, by_value: bool) -> list[str]:
    """The members of an enum, by their names or their values."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == enum:
            for one in node.body:
                if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name):
                    value = one.value.value if isinstance(one.value, ast.Constant) else None
                    found.append(value if by_value and isinstance(value, str) else one.targets[0].id)
    return [name for name in found if not name.startswith("_") or by_value]


def fields(source: str, classes: Iterable[str]) -> list[str]:
    """The fields of dataclasses that a person may set, as `class.field`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name in classes:
            for one in node.body:
                hidden = (
                    one.value is not None and "repr=False" in ast.unparse(one)
                    if isinstance(one, ast.AnnAssign)
                    else True
                )
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and not hidden:
                    found.append(f"{node.name}.{one.target.id}")
    return found


ASKED = re.compile(r"(?:config|cfg)\w*(?:\.get\(|\[)\s*[\"']([a-zA-Z]\w*)[\"']|attention_backend_config\.([a-zA-Z]\w*)")


def asked_keys(tree: Tree, folder: str) -> list[str]:
    """The keys that the files of a folder ask their configuration for."""
    found: dict[str, None] = {}
    for path in tree.files:
        if path.startswith(folder) and path.endswith(".py"):
            source = tree.read(path)
            if "attention_backend_config" in source:
                found.update(dict.fromkeys(one or other for one, other in ASKED.findall(source)))
    return [key for key in found if key not in ("get", "items", "keys", "update")]


def system_rows(
    system: System, version: str, tree: Tree, known: Callable[[str], str], ours: list[str], keys: Iterable[str]
) -> list[Row]:
    """A row for each name and key of a release, and for each name of ours that it does not have.

    Args:
        known: what a name means here, or why it is refused; empty for an unknown one.
        ours: the names that the pack lists for the system.
        keys: the configuration keys that the pack reads.
    """

    def row(item: str, ours: str, there: str, state: str) -> Row:
        return Row(system.package, version, system.enum, item, ours, there, state)

    if system.file not in tree.files:
        return [row("name", system.file, "is not there", UNREAD)]
    published = members(tree.read(system.file), system.enum, system.by_value)
    rows = [
        row(name, known(name) or "unknown", "is published", SAME if known(name) else DIFFERENT) for name in published
    ]
    listed = {name.lower() for name in published}
    rows += [row(name, "is listed", "is not published", ABSENT) for name in ours if name.lower() not in listed]
    if system.keys:
        there = fields(tree.read(system.keys_in), system.keys)
    else:
        there = asked_keys(tree, system.keys_in) if system.keys_in else []
    reads = set(keys)
    for key in there:
        fits = key.rpartition(".")[2] in reads
        rows.append(row(f"key {key}", "is read" if fits else "unknown", "is published", SAME if fits else DIFFERENT))
    return rows
