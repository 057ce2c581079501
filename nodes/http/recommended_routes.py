"""The route of what is recommended by model family (backends/observe/advisories.py).

GET  recommended  every row: families, what runs exactly, with which kernels, why, and who says so
"""

from __future__ import annotations

from aiohttp import web

from ...backends.observe.advisories import ADVISORIES
from .answers import PREFIX


def add_routes(routes: web.RouteTableDef) -> None:
    """Add the route."""

    @routes.get(f"{PREFIX}/recommended")
    async def recommended(request: web.Request) -> web.Response:
        """{"recommended": [{"families", "title", "what", "where", "kernels", "backends", "reason", ...}]}."""
        return web.json_response({"recommended": [advisory.as_dict() for advisory in ADVISORIES]})
