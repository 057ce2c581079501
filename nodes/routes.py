"""HTTP routes under /attention_backends/: what the front end and scripts may ask the server."""

from __future__ import annotations

from aiohttp import web
from server import PromptServer

from . import runs


def register() -> None:
    """Add the routes to the running server; does nothing where there is none (tests of single modules)."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    @server.routes.get("/attention_backends/last_run")
    async def last_run(request: web.Request) -> web.Response:
        """The last runs, newest first: {"runs": [{"model", "device", "steps", "rows": [...], "notes": [...]}]}."""
        return web.json_response({"runs": runs.recent()})
