"""Writes the English files in locales/en that repeat what the code says, for translators: python tests/make_locales.py.

`nodeDefs.json` comes from the nodes themselves, asked of a real server; `settings.json` and `commands.json` from the
texts of the panel in `main.json`, which is written by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attention_backends.devtools.server import Server

ROOT = Path(__file__).resolve().parent.parent
ENGLISH = ROOT / "locales" / "en"
MODULE = f"custom_nodes.{ROOT.name}"
SPECIAL = re.compile(r"[@{}|]")
"""Characters that vue-i18n would read as its own syntax."""


def escaped(text: str) -> str:
    return SPECIAL.sub(lambda found: f"{{'{found[0]}'}}", text)


def node_definitions(server: Server) -> dict[str, Any]:
    """Names, descriptions and tooltips of our nodes, as the front end looks them up."""
    found = {}
    for node_id, node in sorted(server.get("/object_info").items()):
        if node["python_module"] != MODULE:
            continue
        inputs = {}
        for kind in ("required", "optional"):
            for name, (_, *options) in node["input"].get(kind, {}).items():
                said = options[0] if options else {}
                inputs[name] = {"name": said.get("display_name") or name}
                if said.get("tooltip"):
                    inputs[name]["tooltip"] = escaped(said["tooltip"])
        outputs = {}
        for number, name in enumerate(node["output_name"]):
            outputs[str(number)] = {"name": name}
            tooltip = (node.get("output_tooltips") or [None] * (number + 1))[number]
            if tooltip:
                outputs[str(number)]["tooltip"] = escaped(tooltip)
        found[node_id] = {
            "display_name": escaped(node["display_name"]),
            "description": escaped(node["description"]),
            "inputs": inputs,
            "outputs": outputs,
        }
    return found


def settings() -> dict[str, Any]:
    words = json.loads((ENGLISH / "main.json").read_text(encoding="utf-8"))["attentionBackends"]["settings"]
    named = {
        "NewNodes_Backend": ("backend", "new_nodes"),
        "NewNodes_Accuracy": ("accuracy", "new_nodes"),
        "NewNodes_Strict": ("strict", "new_nodes"),
        "NewNodes_Guard": ("guard", "new_nodes"),
        "NewNodes_Recommended": ("recommended", "new_nodes"),
        "Machine_Hub": ("hub", "hub_tip"),
        "Machine_LogLevel": ("log_level", "log_tip"),
        "Machine_Trace": ("trace", "trace_tip"),
        "Machine_Environment": ("environment", "environment_tip"),
    }
    found = {key: {"name": words[name], "tooltip": words[tooltip]} for key, (name, tooltip) in named.items()}
    for role in ("self", "cross", "joint"):
        text = words["role"].replace("{role}", role)
        found[f"NewNodes_{role.capitalize()}"] = {"name": text, "tooltip": words["roles"]}
    return {f"AttentionBackends_{key}": found[key] for key in sorted(found)}


def commands() -> dict[str, Any]:
    words = json.loads((ENGLISH / "main.json").read_text(encoding="utf-8"))["attentionBackends"]
    return {"AttentionBackends_ShowReport": {"label": words["command"]["show"]}}


def phrases() -> dict[str, str]:
    """Texts of reasons by their ids, as the panel looks them up: without points, which are a path there."""
    from attention_backends.backends.doctor import install  # noqa: F401  # it has texts too
    from attention_backends.backends.kernels import BACKENDS
    from attention_backends.backends.values.reasons import TEMPLATES

    assert all(BACKENDS.values())  # loading them registers their texts
    return {reason_id.replace(".", "_"): text for reason_id, text in sorted(TEMPLATES.items())}


def files(server: Server) -> dict[str, dict[str, Any]]:
    return {"nodeDefs.json": node_definitions(server), "settings.json": settings(), "commands.json": commands()}


if __name__ == "__main__":
    import conftest  # noqa: F401  # loads the package
    from server_harness import start_server

    main = json.loads((ENGLISH / "main.json").read_text(encoding="utf-8"))
    main["attentionBackends"]["said"] = phrases()
    (ENGLISH / "main.json").write_text(json.dumps(main, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with start_server(extra_nodes=()) as running:
        for name, content in files(running).items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (ENGLISH / name).write_text(text, encoding="utf-8")
