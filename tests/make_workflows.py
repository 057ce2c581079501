"""Writes the shipped workflows: API form to tests/workflows/, and what the template browser shows to workflows/.

    python tests/make_workflows.py          the API form alone: needs nothing
    python tests/make_workflows.py --ui     also workflows/*.json and *.jpg: needs ComfyUI, playwright and Chromium

Edit `workflow_graphs.py` or `workflow_families.py`, never the files. The second form loads each graph into the real
front end, lays it out, and keeps what the front end itself saves; it stops if a value was lost on the way. Give names
to make only those.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from workflow_families import FAMILY_WORKFLOWS
from workflow_graphs import EMBEDDED_WORKFLOWS, Graph

ROOT = Path(__file__).resolve().parent.parent
API_FORM = ROOT / "tests" / "workflows"
UI_FORM = ROOT / "workflows"
WORKFLOWS = {**EMBEDDED_WORKFLOWS, **FAMILY_WORKFLOWS}
RESULT_SHOWN = ("compare_sdpa_cudnn_sage", "compare_node")
"""Their thumbnail is the comparison that they make; the others' is the graph."""
MOST_BYTES = 60_000

ARRANGE = (ROOT / "tests" / "arrange_workflow.js").read_text(encoding="utf-8")
SHOW_ALL = """() => {
    const { ds, canvas, graph } = window.app.canvas
    const boxes = [...graph.nodes, ...graph.groups].map((item) => [...item.pos, ...item.size])
    const [left, top] = [0, 1].map((axis) => Math.min(...boxes.map((box) => box[axis])) - 60)
    const [right, low] = [0, 1].map((axis) => Math.max(...boxes.map((box) => box[axis] + box[axis + 2])) + 60)
    const { x, y, width, height } = canvas.getBoundingClientRect()
    ds.scale = Math.min(width / (right - left), height / (low - top))
    ds.offset[0] = -left
    ds.offset[1] = -top
    graph.setDirtyCanvas(true, true)
    return { x, y, width: (right - left) * ds.scale, height: (low - top) * ds.scale }
}"""
# No overlays, and text at every zoom.
QUIET = {
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}


def values(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """What a graph in API form says, without titles."""
    return {number: (node["class_type"], node["inputs"]) for number, node in nodes.items()}


def notes(saved: Mapping[str, Any]) -> list[str]:
    """The texts of the notes in a workflow as the front end saves it."""
    return [node["widgets_values"][0] for node in saved["nodes"] if node["type"] == "MarkdownNote"]


def write_api_form(names: list[str]) -> None:
    API_FORM.mkdir(exist_ok=True)
    for name in names:
        text = json.dumps(WORKFLOWS[name]().nodes, indent=1) + "\n"
        (API_FORM / f"{name}.json").write_text(text, encoding="utf-8", newline="\n")


def write_ui_form(names: list[str]) -> None:
    import conftest  # noqa: F401  (loads the package from this folder)
    from browser import open_comfyui
    from server_harness import start_server

    UI_FORM.mkdir(exist_ok=True)
    graphs = {name: WORKFLOWS[name]() for name in names}

    def fill(_: Path, folder: Path) -> None:
        # Empty files are enough for the front end: it marks a loader whose file is missing.
        for file in {file for graph in graphs.values() for file in graph.files}:
            (folder / "models" / file).parent.mkdir(exist_ok=True)
            (folder / "models" / file).touch()

    with (
        tempfile.TemporaryDirectory() as profile,
        start_server(extra_nodes=(), fill=fill) as server,
        open_comfyui(server.url, Path(profile), QUIET, width=2400) as page,
    ):
        page.evaluate("() => window.app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
        for name, graph in graphs.items():
            saved = arrange(page, name, graph)
            (UI_FORM / f"{name}.json").write_text(saved + "\n", encoding="utf-8", newline="\n")
            picture = made_picture(server, graph) if name in RESULT_SHOWN else screenshot(page, name, server)
            write_thumbnail(picture, UI_FORM / f"{name}.jpg")
            print(f"{name}: {len(saved)} characters")


def arrange(page: Any, name: str, graph: Graph) -> str:
    """The graph as the front end saves it, laid out in lanes; raises ValueError if a value differs."""
    given = {"name": name, "nodes": graph.nodes, "lanes": graph.lanes, "about": graph.about}
    saved, back = page.evaluate(ARRANGE, given)
    if values(json.loads(back)) != values(graph.nodes):
        raise ValueError(f"{name}: the front end changed it to {back}")
    if graph.about not in notes(json.loads(saved)):
        raise ValueError(f"{name}: the front end changed its note to {notes(json.loads(saved))}")
    return str(saved)


def screenshot(page: Any, name: str, server: Any) -> bytes:
    """The whole graph in the window: with its results, or else without what our nodes say of this machine."""
    if name in EMBEDDED_WORKFLOWS:
        page.evaluate("() => window.app.queuePrompt(0)")
        while any(server.get("/queue").values()):
            page.wait_for_timeout(500)
    else:
        page.evaluate(
            "() => document.querySelectorAll('[data-testid=attention_backends_line]').forEach((e) => e.remove())"
        )
    box = page.evaluate(SHOW_ALL)
    page.wait_for_timeout(1000)
    return bytes(page.screenshot(clip=box))


def made_picture(server: Any, graph: Graph) -> bytes:
    """Runs the graph and returns the picture in its Preview Image node."""
    number = next(number for number, node in graph.nodes.items() if node["class_type"] == "PreviewImage")
    shown = server.run(graph.nodes)["outputs"][number]["images"][0]
    return bytes((server.folder / shown["type"] / shown["subfolder"] / shown["filename"]).read_bytes())


def write_thumbnail(picture: bytes, path: Path) -> None:
    """A JPEG as large as MOST_BYTES allows."""
    from PIL import Image

    whole = Image.open(BytesIO(picture)).convert("RGB")
    for side in (1400, 1200, 1000, 850, 700):
        image = whole.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(path, quality=80, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            return
    raise ValueError(f"{path.name} is larger than {MOST_BYTES} bytes at every size")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Write the shipped workflows.")
    parser.add_argument("names", nargs="*", metavar="name", help="all when none is given: " + ", ".join(WORKFLOWS))
    parser.add_argument("--ui", action="store_true", help="also what the template browser shows")
    given = parser.parse_args(arguments)
    names = given.names or list(WORKFLOWS)
    unknown = [name for name in names if name not in WORKFLOWS]
    if unknown:
        parser.error(f"no workflow named {', '.join(unknown)}; there are: {', '.join(WORKFLOWS)}")
    write_api_form(names)
    if given.ui:
        write_ui_form(names)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
