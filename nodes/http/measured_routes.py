"""Routes of the measured choices, which are kept over runs (backends/observe/autotune/store.py).

GET  autotune         summary and entries
POST autotune/clear   forget all of them; the body is {}
GET  autotune/export  a document that another machine of the same kind can import
POST autotune/import  take over such a document

Each of them is served under `measured` too, the older name.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comfy.model_management
import folder_paths
from aiohttp import web

from ...backends.kernels.registry import detect
from ...backends.observe.autotune.entry import MOST_BYTES
from ...backends.values.bounded import shortened
from ...backends.values.privacy import clean
from .answers import PREFIX, RefusedError, posted

if TYPE_CHECKING:
    from ...backends.observe.autotune.store import Store

WHAT = "measured choices"


def add_routes(routes: web.RouteTableDef, store: Callable[[], Store]) -> None:
    """Add the routes. The store is asked for with each request, and works in a thread: its file may be locked."""

    @routes.get(f"{PREFIX}/autotune")
    @routes.get(f"{PREFIX}/measured")
    async def summary(request: web.Request) -> web.Response:
        """{"summary": {"path_name", "entries", "entries_here", "bytes", "problem"}, "entries": [...]}."""
        return await answer(lambda: content(store()))

    @routes.post(f"{PREFIX}/autotune/clear")
    @routes.post(f"{PREFIX}/measured/clear")
    async def clear(request: web.Request) -> web.Response:
        """Takes {}, forgets every choice, and answers {"removed": N} with what GET autotune says then."""
        try:
            if await posted(request, MOST_BYTES, WHAT) != {}:
                raise RefusedError(400, "expected {}: all measured choices are forgotten at once")
        except RefusedError as error:
            return error.answer
        return await answer(lambda: {"removed": store().clear(), **content(store())})

    @routes.get(f"{PREFIX}/autotune/export")
    @routes.get(f"{PREFIX}/measured/export")
    async def export(request: web.Request) -> web.Response:
        """The document that POST autotune/import takes."""
        return await answer(lambda: clean(store().export()))

    @routes.post(f"{PREFIX}/autotune/import")
    @routes.post(f"{PREFIX}/measured/import")
    async def import_(request: web.Request) -> web.Response:
        """Takes a document of GET autotune/export, and answers {"taken": N} with what GET autotune says then."""
        try:
            document = await posted(request, MOST_BYTES, WHAT)
        except RefusedError as error:
            return error.answer
        return await answer(lambda: {"taken": store().import_(document), **content(store())})


def users_store() -> Store:
    """The one of this server."""
    from ...backends.measure.environment import environment_of
    from ...backends.observe.autotune.store import path_in, shared_store

    store = shared_store(path_in(folder_paths.get_user_directory()))
    if not store.here:  # before any run; ComfyUI may use another device than the machine's first
        store.here.add(environment_of(detect(comfy.model_management.get_torch_device())))
    return store


def content(store: Store) -> dict[str, Any]:
    """What GET autotune answers."""
    return {"summary": clean(store.summary()), "entries": clean(store.entries())}


async def answer(work: Callable[[], Any]) -> web.Response:
    """The result of some work on the store as JSON, or why it failed."""
    try:
        return web.json_response(await asyncio.to_thread(work))
    except ValueError as error:
        return RefusedError(400, clean(shortened(str(error)))[:200]).answer
    except (OSError, sqlite3.Error) as error:
        return RefusedError(500, f"the measured choices cannot be used: {clean(str(error))[:200]}").answer
