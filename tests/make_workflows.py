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
TITLES = {
    "wan22_14b_4_steps": "01 Wan 2.2 14B, faster (4 steps)",
    "wan22_14b_20_steps": "02 Wan 2.2 14B, faster (20 steps)",
    "qwen_image": "03 Qwen-Image, faster",
    "flux_dev": "04 FLUX.1 dev, faster",
    "ltx2": "05 LTX-2, faster",
    "benchmark": "06 Which kernel is fastest here",
    "compare_node": "07 Compare backends (demo model)",
    "compare_wan22_5b": "08 Compare backends on Wan 2.2 5B",
    "compare_qwen_image": "09 Compare SDPA, cuDNN and Sage on Qwen-Image",
    "per_role": "10 Self- and cross-attention apart (demo model)",
    "schedule": "11 Exact first and last steps (demo model)",
    "text_and_record": "12 Settings as text (demo model)",
    "clip": "13 A clip, dense and sparse (demo video model)",
    "compare_sdpa_cudnn_sage": "compare_sdpa_cudnn_sage",
}
"""Names of the files in workflows/: ComfyUI shows them as titles, in this order where its list is sorted."""
SIDE = 512
MOST_BYTES = 60_000
BADGE = 68
"""Height that the template browser's badge takes at the top of the smallest card, of `SIDE`."""

ARRANGE = (ROOT / "tests" / "arrange_workflow.js").read_text(encoding="utf-8")
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
        start_server(extra_nodes=(), fill=fill) as server,
        open_comfyui(server.url, QUIET, width=2400) as page,
    ):
        for name, graph in graphs.items():
            saved = arrange(page, name, graph)
            ui_file(name).write_text(saved + "\n", encoding="utf-8", newline="\n")
            picture = made_picture(server, graph) if name in EMBEDDED_WORKFLOWS else None
            write_thumbnail(card(TITLES[name], graph, picture), ui_file(name).with_suffix(".jpg"))
            print(f"{name}: {len(saved)} characters")


def ui_file(name: str) -> Path:
    """What the template browser opens."""
    return UI_FORM / f"{TITLES[name]}.json"


def arrange(page: Any, name: str, graph: Graph) -> str:
    """The graph as the front end saves it, laid out in columns; raises ValueError if a value differs."""
    parts = ("nodes", "columns", "folded", "fixed", "models", "about")
    saved, back = page.evaluate(ARRANGE, {"name": name, **{part: getattr(graph, part) for part in parts}})
    if values(json.loads(back)) != values(graph.nodes):
        raise ValueError(f"{name}: the front end changed it to {back}")
    if graph.about not in notes(json.loads(saved)):
        raise ValueError(f"{name}: the front end changed its note to {notes(json.loads(saved))}")
    return str(saved)


def made_picture(server: Any, graph: Graph) -> bytes:
    """Runs the graph and returns the first picture that it shows."""
    outputs = server.run(graph.nodes)["outputs"]
    shown = next(one["images"][0] for _, one in sorted(outputs.items()) if "images" in one)
    return bytes((server.folder / shown["type"] / shown["subfolder"] / shown["filename"]).read_bytes())


def card(title: str, graph: Graph, picture: bytes | None) -> Any:
    """A square with the title above the graph's own result, or above a drawing of the nodes and no result."""
    from PIL import Image, ImageDraw, ImageFont

    whole = Image.new("RGB", (SIDE, SIDE), "#1d2026")
    draw = ImageDraw.Draw(whole)
    large, small = ImageFont.load_default(46), ImageFont.load_default(28)
    lines = [""]
    for word in title.lstrip("0123456789 ").replace("_", " ").split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if draw.textlength(longer, large) < SIDE - 48 else [*lines, word]
    draw.multiline_text((28, BADGE), "\n".join(lines), "white", large, spacing=10)
    top = BADGE + 30 + 58 * len(lines)
    if picture is not None:
        shown = Image.open(BytesIO(picture)).convert("RGB")
        shown = shown.resize(_within(shown.size, (SIDE - 56, SIDE - top - 28)), Image.Resampling.LANCZOS)
        whole.paste(shown, ((SIDE - shown.width) // 2, top + (SIDE - 28 - top - shown.height) // 2))
        return whole
    kinds = {node["class_type"] for node in graph.nodes.values()}
    boxes = ["Load model", "Attention Backend Selector", "Sampler"]
    if "AttentionCompare" in kinds:
        boxes[1:] = ["Compare Attention Backends", "Pictures and times"]
    elif "AttentionComparison" in kinds:
        boxes[1:] = ["SDPA      cuDNN      Sage", "Attention Comparison"]
    step = (SIDE - top - 64) // len(boxes)
    for at, text in enumerate(boxes):
        y = top + at * step
        if at:
            draw.line((SIDE // 2, y - 22, SIDE // 2, y), "#9aa4b2", 4)
        draw.rounded_rectangle((28, y, SIDE - 28, y + step - 22), 10, "#355c3a" if at == 1 else "#353941")
        draw.text((46, y + (step - 22) / 2), text, "white", small, anchor="lm")
    draw.text((28, SIDE - 46), "Drawing, not a result", "#b4bcc8", small)
    return whole


def _within(size: tuple[int, int], most: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same shape."""
    scale = min(most[0] / size[0], most[1] / size[1])
    return round(size[0] * scale), round(size[1] * scale)


def write_thumbnail(picture: Any, path: Path) -> None:
    picture.save(path, quality=85, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.name} is larger than {MOST_BYTES} bytes")


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
