"""The page docs/systems.md: the names of other systems and what they mean here."""

from __future__ import annotations

from ...backends.config.foreign_options import FOREIGN_OPTIONS
from ...backends.config.systems import systems


def systems_page() -> str:
    """The text of docs/systems.md."""
    lines = [
        "# Names of other systems",
        "",
        "<!-- Generated from backends/config/systems.py. A test fails when this page is stale. -->",
        "",
        "A configuration that was written for one of these systems pastes unchanged. Every name that they publish "
        "means the id beside it, or is refused with the reason beside it. A line that says what differs is also "
        "logged when the name is read, and `explain` prints it.",
    ]
    for system in systems():
        lines += ["", f"## {system.title}", "", system.about, "", "| name | here | what to know |", "|---|---|---|"]
        lines += [
            f"| `{row.name}` | {f'`{row.means}`' if row.means else 'refused'} | {row.line} |" for row in system.names
        ]
    lines += [
        "",
        "## Roles",
        "",
        "In these systems `joint` is a role of its own, so in a configuration that is read from text, a mapping or the "
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
        "Options stand under `extra` and are checked when they are read. Those of a backend that is not built yet are "
        "treated as its name is: calls fall back, counted, and a note says so. These belong to no backend here: beside "
        "one that can run they are refused as not implemented, whatever their value.",
        "",
        "| option | of |",
        "|---|---|",
        *(f"| `{name}` | {of} |" for name, of in FOREIGN_OPTIONS.items()),
    ]
    return "\n".join(lines) + "\n"
