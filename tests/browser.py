"""The real front end of a running ComfyUI in a headless Chromium, for tests and for making workflow files."""

from __future__ import annotations

import atexit
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
# /scripts/ are ComfyUI's files for packs: its own front end uses none of them, and no other pack is there.
PACK = Path(__file__).resolve().parent.parent.name
OURS = (f"/extensions/{PACK}/", "/scripts/", "attention_backends", "AttentionBackends", "Attention Backends")

SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingNodesWarning": True,
    "Comfy.VueNodes.Enabled": False,
    "Comfy.Locale": "en",
    "Comfy.ColorPalette": "dark",
    "Comfy.Templates.SortBy": "default",
    "Comfy.Node.AlwaysShowAdvancedWidgets": False,
    "LiteGraph.Node.TooltipDelay": 500,
}
"""What a page starts from, whatever the one before it on the same server has set."""

NO_BLUEPRINTS = """{
  const { fetch } = window
  const none = () => new Response('{}', { headers: { 'content-type': 'application/json' } })
  window.fetch = async (to, ...rest) => String(to.url ?? to).endsWith('/global_subgraphs') ? none() : fetch(to, ...rest)
}"""
"""Without ComfyUI's 70 blueprints a page loads faster by a second; no test has to do with them."""


def why_no_browser() -> str | None:
    """What is missing for browser tests, or None."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    if not any(map(shutil.which, BROWSERS)):
        return "no Chromium was found"
    return None


@contextmanager
def open_comfyui(url: str, settings: dict[str, Any] | None = None, width: int = 1600) -> Iterator[Any]:
    """A page with the front end ready, in a profile that has nothing of the pages before but the browser's caches.

    `page.problems` holds console errors, with their address, page errors, and what was said to be deprecated, with
    the scripts that used it; `ours` picks those of this pack.
    settings: front-end settings (`Comfy.VueNodes.Enabled`, ...) stored before the page loads.
    """
    context = _open_browser()
    usable = False
    try:
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": width * 9 // 16})
        page.problems = []
        page.on("console", lambda message: message.type == "error" and page.problems.append(_with_address(message)))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        _watch_deprecated(page)
        page.request.post(f"{url}/settings", data={**SETTINGS, **(settings or {})})
        page.add_init_script(NO_BLUEPRINTS)
        page.goto(url)
        page.wait_for_function("() => window.app?.graph && window.app.extensionManager", timeout=60_000)
        page.evaluate("() => { window.LiteGraph.alwaysRepeatWarnings = true }")  # else ComfyUI's own hides ours
        page.wait_for_timeout(1500)
        for _ in range(3):
            page.keyboard.press("Escape")
        yield page
        _empty(context, url)
        usable = True
    finally:
        if usable:
            _idle.append(context)
        else:
            _running.remove(context)
            context.close()


_playwright: list[Any] = []
"""The one Playwright of this process, once it was started: a thread can have no second one."""
_running: list[Any] = []
"""Every browser that is running. Starting one and loading the front end anew takes several seconds of a core."""
_idle: list[Any] = []
"""Those without a page of a test."""


def _open_browser() -> Any:
    """A browser with a temporary profile and an empty page, which no other page of a test uses."""
    from playwright.sync_api import sync_playwright

    if not _idle:
        if not _playwright:
            _playwright.append(sync_playwright().start())
        executable = next(path for path in map(shutil.which, BROWSERS) if path)
        context = _playwright[0].chromium.launch_persistent_context("", executable_path=executable, args=FLAGS)
        _running.append(context)
        _idle.append(context)
    return _idle.pop()


def _empty(context: Any, url: str) -> None:
    """Closes the pages of a test and deletes what they stored; the browser's own page stays open."""
    own, *pages = context.pages
    for page in pages:
        page.close()
    context.set_offline(False)
    context.clear_cookies()
    session = context.new_cdp_session(own)
    session.send("Storage.clearDataForOrigin", {"origin": url, "storageTypes": "all"})
    session.detach()


def close_browsers() -> None:
    """Ends browsers that no test uses, and with the last one Playwright.

    While it runs, nothing else in the thread can run an event loop.
    """
    while _idle:
        context = _idle.pop()
        _running.remove(context)
        context.close()
    if _playwright and not _running:
        _playwright.pop().stop()


atexit.register(close_browsers)  # of a script; tests/conftest.py calls it between tests


def _with_address(message: Any) -> str:
    """What a console message says, and the script or the file that it is about."""
    return f"{message.text} ({message.location['url']})"


def _watch_deprecated(page: Any) -> None:
    """Adds messages about something deprecated, the front end's and the browser's, to `page.problems`.

    Such a message stands in the script of ComfyUI that it is about; which script called it only the stack tells.
    """

    def said(event: dict[str, Any]) -> None:
        text = " ".join(str(part.get("value", "")) for part in event["args"])
        if "deprecated" in text.lower():
            calls = event.get("stackTrace", {}).get("callFrames", [])
            page.problems.append(f"{text} ({', '.join(call['url'] for call in calls)})")

    def found(event: dict[str, Any]) -> None:
        details = event["issue"]["details"].get("deprecationIssueDetails")
        if details:
            page.problems.append(f"deprecated: {details['type']} ({details['sourceCodeLocation']['url']})")

    session = page.context.new_cdp_session(page)
    session.on("Runtime.consoleAPICalled", said)
    session.on("Audits.issueAdded", found)
    session.send("Runtime.enable")
    session.send("Audits.enable")


def ours(page: Any) -> list[str]:
    """Problems whose text or address is of this pack."""
    return [text for text in page.problems if any(word in text for word in OURS)]


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
