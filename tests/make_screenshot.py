"""Writes docs/screenshot.png, the picture of README.md: the selector after a run, with its neighbours and the tab.

python tests/make_screenshot.py        needs ComfyUI, playwright and Chromium
"""

from __future__ import annotations

import sys
from io import BytesIO

import conftest  # noqa: F401  (loads the package from this folder)
from browser import open_comfyui
from make_workflows import QUIET
from PIL import Image
from server_harness import ROOT, start_server
from workflow_graphs import EMBEDDED, Graph, embedded, ksampler

sys.path.insert(0, str(ROOT / "tests" / "browser"))
from test_panel import open_tab, run_workflow

PICTURE = ROOT / "docs" / "screenshot.png"
WIDTH, HEIGHT = 1600, 620
PLACES = {
    "UNETLoader": (0, 0),
    "AttentionBackendSelector": (330, 0),
    "KSampler": (720, 0),
    "TinyShapesCaption": (0, 190),
    "EmptyHunyuanLatentVideo": (330, 290),
    "TinyShapesImage": (1080, 0),
    "PreviewImage": (1080, 200),
}
"""Where each node stands; those of one kind under one another."""
ARRANGE = """(places) => {
    const { canvas } = window.app, seen = {}
    for (const node of window.app.graph.nodes) {
        const [x, y] = places[node.type] ?? [1500, 0]
        seen[node.type] = (seen[node.type] ?? 0) + 1
        node.pos = [x, y + 170 * (seen[node.type] - 1)]
        if (node.type === 'AttentionBackendSelector') node.size = [340, 165]
    }
    canvas.ds.scale = 1
    canvas.ds.offset = [555, 160]
    window.app.graph.setDirtyCanvas(true, true)
}"""


def workflow() -> dict[str, dict[str, object]]:
    """The embedded model with the selector on its default, in API form."""
    graph = Graph("")
    model, settings = embedded(graph)
    latent = ksampler(graph, graph.selector(model, "auto"), **settings, **EMBEDDED)
    graph.add("PreviewImage", images=graph.add("TinyShapesImage", samples=latent, scale=16))
    return graph.nodes


def main() -> int:
    settings = {**QUIET, "Comfy.VueNodes.Enabled": True, "Comfy.Workflow.WorkflowTabsPosition": "Topbar"}
    with (
        start_server(extra_nodes=()) as server,
        open_comfyui(server.url, settings, width=WIDTH) as page,
    ):
        page.evaluate("async (graph) => { await window.app.loadApiJson(graph, 'picture') }", workflow())
        page.wait_for_timeout(500)
        page.evaluate(ARRANGE, PLACES)
        for _ in range(2):  # the first run with a kernel is not a warm one
            run_workflow(page, server)
            page.evaluate("() => { window.app.graph.nodes.find((n) => n.type === 'KSampler').widgets[0].value += 1 }")
        panel = open_tab(page)
        panel.locator("tbody tr").first.wait_for()
        panel.evaluate("panel => { panel.closest('.p-splitterpanel').style.flexBasis = '470px' }")
        page.evaluate(ARRANGE, PLACES)
        page.wait_for_timeout(6000)  # ComfyUI's own notice of the job goes away
        picture = Image.open(BytesIO(page.screenshot())).crop((0, 0, WIDTH, HEIGHT))
    picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(PICTURE, optimize=True)
    print(f"{PICTURE.name}: {picture.width} x {picture.height}, {PICTURE.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
