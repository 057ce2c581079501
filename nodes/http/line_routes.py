"""Routes of the line on our nodes, and of the model that they are connected to.

GET  forecast?backend=ID&accuracy=CLASS  what a node with these values will do on this machine, before anything runs;
                                         with &model=FILE, the model's, on that model, and with
                                         &recommended=1 with the exceptions that are known for it
GET  model?name=FILE                     the roles of a model, from its file's header or its last run
GET  node_lines?prompt_id=ID or ?mark=M  what a prompt, or the last one of a page's workflow, came to on each node;
                                         with &ended=success or stopped where ComfyUI has said that it is over
"""

from __future__ import annotations

from aiohttp import web

from ..history import node_lines, runs
from .answers import PREFIX, phrases_of, refused
from .machine import Machine
from .model_file import ModelFacts

LONGEST = 100
"""Characters of a name, an id or a mark."""
LONGEST_FILE = 500
"""Characters of a model's name, which can have folders in it."""


def add_routes(routes: web.RouteTableDef, here: Machine) -> None:
    """Add the routes."""

    @routes.get(f"{PREFIX}/forecast")
    async def forecast(request: web.Request) -> web.Response:
        """As `forecast.forecast` has it."""
        try:
            backend, accuracy = (request.query.get(name, "")[:LONGEST] for name in ("backend", "accuracy"))
            model = request.query.get("model", "")[:LONGEST_FILE]
            recommended = request.query.get("recommended") == "1"
            return web.json_response(await here.forecast(backend or "auto", accuracy or "exact", model, recommended))
        except ValueError as error:
            return refused(400, str(error)[:400])

    @routes.get(f"{PREFIX}/model")
    async def model(request: web.Request) -> web.Response:
        """{"family", "roles", "head_dims"}, empty where nothing is known of the file."""
        known = await here.model(request.query.get("name", "")[:LONGEST_FILE])
        return web.json_response((known or ModelFacts("", ()))._asdict())

    @routes.get(f"{PREFIX}/node_lines")
    async def lines(request: web.Request) -> web.Response:
        """{"numbering", "prompt_id", "mark", "nodes": {id: {"state", "outcome", "totals", ...}}, "phrases"}."""
        prompt_id, mark = (request.query.get(name, "")[:LONGEST] for name in ("prompt_id", "mark"))
        if bool(prompt_id) == bool(mark):
            return refused(400, "give prompt_id or mark, one of them")
        ended = request.query.get("ended", "")
        if ended not in ("", node_lines.SUCCESS, node_lines.STOPPED):
            return refused(400, f"ended is {node_lines.SUCCESS} or {node_lines.STOPPED}")
        found = node_lines.of_prompt(prompt_id, ended) if prompt_id else node_lines.of_mark(mark)
        return web.json_response({"numbering": runs.NUMBERING, **found, "phrases": phrases_of(found)})
