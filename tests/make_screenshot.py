"""Writes docs/screenshot.png, the picture of README.md: the shipped workflow `schedule` after a run, and its account.

python tests/make_screenshot.py        needs ComfyUI, playwright and Chromium
"""

from __future__ import annotations

import json
import sys
import tempfile
from io import BytesIO
from pathlib import Path

import conftest  # noqa: F401  (loads the package from this folder)
from browser import load_workflow, open_comfyui
from make_workflows import QUIET, UI_FORM
from PIL import Image
from server_harness import ROOT, start_server

sys.path.insert(0, str(ROOT / "tests" / "browser"))
from test_panel import open_tab, run_workflow

PICTURE = ROOT / "docs" / "screenshot.png"
WIDTH = 1600
MIDDLE = """() => {
    const { ds, graph } = window.app.canvas
    const node = graph.nodes.find((node) => node.type === 'AttentionBackendSelector')
    ds.scale = 1
    ds.offset = [780 - node.pos[0], 180 - node.pos[1]]
    graph.setDirtyCanvas(true, true)
}"""


def main() -> int:
    settings = {**QUIET, "Comfy.VueNodes.Enabled": True, "Comfy.Workflow.WorkflowTabsPosition": "Topbar"}
    with (
        tempfile.TemporaryDirectory() as profile,
        start_server(extra_nodes=()) as server,
        open_comfyui(server.url, Path(profile), settings, width=WIDTH) as page,
    ):
        load_workflow(page, json.loads((UI_FORM / "schedule.json").read_text(encoding="utf-8")))
        page.evaluate(MIDDLE)
        run_workflow(page, server)
        panel = open_tab(page)
        panel.locator("tbody tr").first.wait_for()
        panel.evaluate("panel => { panel.closest('.p-splitterpanel').style.flexBasis = '640px' }")
        page.wait_for_timeout(1500)
        picture = Image.open(BytesIO(page.screenshot()))
    picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(PICTURE, optimize=True)
    print(f"{PICTURE.name}: {picture.width} x {picture.height}, {PICTURE.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
