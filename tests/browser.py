"""The real front end of a running ComfyUI in a headless Chromium, for tests and for making workflow files."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def why_no_browser() -> str | None:
    """What is missing for browser tests, or None."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    if not any(map(shutil.which, BROWSERS)):
        return "no Chromium was found"
    return None


@contextmanager
def open_comfyui(url: str, profile: Path, settings: dict[str, Any] | None = None, width: int = 1600) -> Iterator[Any]:
    """A page with the front end ready; `page.problems` holds console errors, with their address, and page errors.

    settings: front-end settings (`Comfy.VueNodes.Enabled`, ...) stored before the page loads.
    """
    from playwright.sync_api import sync_playwright

    executable = next(path for path in map(shutil.which, BROWSERS) if path)
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=executable, args=FLAGS, viewport={"width": width, "height": width * 9 // 16}
        )
        try:
            page = context.new_page()
            page.problems = []
            page.on("console", lambda message: message.type == "error" and page.problems.append(_with_address(message)))
            page.on("pageerror", lambda error: page.problems.append(str(error)))
            stored = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingNodesWarning": True}
            page.request.post(f"{url}/settings", data={**stored, **(settings or {})})
            page.goto(url)
            page.wait_for_function("() => window.app?.graph && window.app.extensionManager", timeout=60_000)
            page.wait_for_timeout(1500)
            for _ in range(3):
                page.keyboard.press("Escape")
            yield page
        finally:
            context.close()


def _with_address(message: Any) -> str:
    """What a console message says, and the script or the file that it is about."""
    return f"{message.text} ({message.location['url']})"


def load_workflow(page: Any, workflow: dict[str, Any]) -> None:
    """Show a saved workflow, as opening its file does."""
    page.evaluate("async (workflow) => { await window.app.loadGraphData(workflow) }", workflow)
    page.wait_for_timeout(500)


def missing_nodes(page: Any) -> list[str]:
    """Types of nodes in the graph that the front end does not know."""
    script = "() => window.app.graph.nodes.map(n => n.type).filter(t => !(t in window.LiteGraph.registered_node_types))"
    return list(page.evaluate(script))


def alerts(page: Any) -> list[str]:
    """What the front end tells the person just now: toasts, dialogs, and its card of errors in the workflow."""
    places = "[role=dialog], [role=alertdialog], [role=alert], .p-toast-message, [data-testid=error-overlay]"
    return [text for text in page.locator(places).all_inner_texts() if text.strip()]
