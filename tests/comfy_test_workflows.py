"""comfy-test's level `custom` of this pack (comfy-test.toml): ComfyUI's own verdict on every shipped workflow.

It needs nothing of ours but files: the API form of each workflow, which tests hold equal to what is shipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).resolve().parent / "workflows"


def run(ctx: Any) -> None:
    """Raises AssertionError if ComfyUI has anything against a workflow but absent model files, or none uses a node.

    ctx: comfy-test's LevelContext; `api` is its client of the running server, where the route /validate is installed.
    """
    used = set()
    for path in sorted(WORKFLOWS.glob("*.json")):
        nodes = json.loads(path.read_text(encoding="utf-8"))
        used |= {node["class_type"] for node in nodes.values()}
        answer = ctx.api.session.post(f"{ctx.api.base_url}/validate", json={"prompt": nodes}, timeout=60).json()
        against = [error for node in (answer.get("node_errors") or {}).values() for error in node["errors"]]
        refused = [error for error in against if not is_absent_file(error)]
        if refused or (answer.get("error") and not against):
            raise AssertionError(f"{path.stem}: {json.dumps(refused or answer['error'])}")
        ctx.log(f"  {path.stem}: {f'{len(against)} model files are not here' if against else 'valid'}")
    ours = {
        name
        for name, node in ctx.api.get_object_info().items()
        if node["python_module"].endswith(ctx.node_dir.name) and not node.get("deprecated")
    }
    if not ours or ours - used:
        raise AssertionError(
            f"no workflow uses {', '.join(sorted(ours - used)) or 'a node of this pack: none is there'}"
        )
    ctx.log(f"  all {len(ours)} nodes are used")


def is_absent_file(error: dict[str, Any]) -> bool:
    """Whether ComfyUI refuses a value because no file of that name lies in the folder of models."""
    value = str(error.get("extra_info", {}).get("received_value", ""))
    return error["type"] == "value_not_in_list" and value.endswith(".safetensors")
