"""The page docs/systems.md: the names of other systems and what they mean here."""

from __future__ import annotations

from collections.abc import Iterator

from ...backends.config.flags import ELSEWHERE
from ...backends.config.foreign_entries import COMFYUI_FLAGS, TRANSLATED
from ...backends.config.foreign_options import FOREIGN_OPTIONS, taken_by
from ...backends.config.published import Published
from ...backends.config.systems import systems


def systems_page() -> str:
    """The text of docs/systems.md."""
    lines = [
        "# Names of other systems",
        "",
        "<!-- Generated from backends/config/published.py and the kernels. A test fails when this page is stale. -->",
        "",
        "A configuration that was written for one of these systems pastes unchanged. Every name that they publish "
        "means the id beside it, or is refused with the reason beside it. A line that says what differs is also "
        "logged when the name is read, and `explain` prints it. Options beside an id are part of what the name means; "
        "those that a configuration gives have precedence.",
        "",
        "Where two systems mean different things by a name, the one that stands first on this page holds, and a note "
        "names the other. An entry that belongs to one system says which is meant.",
    ]
    for system in systems():
        named = f" Its entry is `{system.entry}`." if system.entry else ""
        newest = f" to {system.newest}" if system.newest else ""
        lines += ["", f"## {system.title}{newest}", "", system.about + named, ""]
        lines += ["| name | here | what to know |", "|---|---|---|"]
        lines += [f"| `{row.name}` | {_here(row)} | {row.line} |" for row in system.names]
    lines += [
        "",
        "## Entries and flags",
        "",
        "Entries and flags of these systems that choose attention and have another form here.",
        "",
        "| entry or flag | here |",
        "|---|---|",
        *(f"| {name} | {here} |" for name, here in _entries()),
        "",
        "These change attention there and nothing here: beside a backend, a note says so; alone, they are an error.",
        "",
        "| flag or variable | there it |",
        "|---|---|",
        *(f"| `{name}` | {there} |" for name, there in ELSEWHERE.items()),
    ]
    lines += [
        "",
        "## Roles",
        "",
        "In these systems `joint` is a separate role, so in a configuration that is read from text, a mapping or the "
        "environment `per_role.self` does not cover joint attention over text and picture (FLUX, SD3, "
        "HunyuanVideo): that takes the default. `joint_is_self: true` makes it cover it, and a `per_role.joint` entry "
        "names another backend. In the nodes, and in an `AttentionConfig` made in Python, `self` covers joint "
        "attention where nothing is said about `joint`. `explain` says so where it matters.",
        "",
        "## Components",
        "",
        "SGLang's component map reaches the diffusion model only: `transformer`, or `transformer_2` for the second "
        "expert of a pipeline such as Wan 2.2 (`component` of the node and of `explain`). `transformer_2` takes what "
        "stands under `transformer` where nothing stands under its own name. Text encoders and autoencoders are named "
        "in a note and left as they are.",
        "",
        "## Options",
        "",
        "Options stand under `extra` and are checked when they are read. These are of other systems: a backend takes "
        "them where it is named in the last column, the others refuse them.",
        "",
        "| option | of | here |",
        "|---|---|---|",
        *(f"| `{name}` | {of} | {_takes(name)} |" for name, of in FOREIGN_OPTIONS.items()),
    ]
    return "\n".join(lines) + "\n"


def _takes(option: str) -> str:
    return ", ".join(f"`{name}`" for name in taken_by(option)) or "refused"


def _here(row: Published) -> str:
    if row.means is None:
        return "refused"
    options = ", ".join(f"`{name}={str(value).lower()}`" for name, value in row.options)
    return f"`{row.means}`" + (f", {options}" if options else "")


def _entries() -> Iterator[tuple[str, str]]:
    """Each entry or flag of another form, and what it becomes."""
    for name, here in TRANSLATED.items():
        yield f"`{name}`", here
    for flag, function in COMFYUI_FLAGS.items():
        yield f"`--{flag.replace('_', '-')}`", f"the default, as `{function}`"
