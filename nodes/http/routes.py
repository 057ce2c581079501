"""HTTP routes under /attention_backends/: what the front end and scripts may ask the server.

    GET  machine     the platform and each backend's state; ?backend=ID (repeatable), ?refresh=1
    GET  runs        the last runs, short, those that are going on first
    GET  runs/N      one run in full, with its timeline
    GET  last_run    the last runs in full, newest first, without those that are going on
    GET  settings    choices of the nodes, settings of the machine, and variables that decide something
    POST settings    change settings of the machine
    GET  bug_report  machine, backends and last run as Markdown, without paths

The routes of autotune's choices are in `measured_routes.py`, those of the line on a node in `line_routes.py`.

No answer holds a path, but for the interpreter in installation commands. Wrong requests get 4xx and {"error": why}.
ComfyUI serves the same under /api/ and refuses other origins where it listens on this machine alone; what changes
something also asks for a JSON body, which a page of another origin cannot send unasked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from aiohttp import web
from comfy_api.latest import io
from server import PromptServer

from ...backends.config import GUARD_MODES
from ...backends.config.names import canonical
from ...backends.kernels import BACKENDS
from ...backends.report import MODES
from ...backends.values.privacy import clean
from ...backends.values.tolerance import ACCURACY
from ..configure.selector import AttentionBackendSelector, backend_menu
from ..history import queued_by, runs
from ..hook.roles import known_roles
from . import line_routes, machine, measured_routes, recommended_routes
from .answers import PREFIX, RefusedError, bypass_reason, computed_whole, phrases_of, posted, refused
from .machine_settings import LEVELS, MachineSettings, checked

MOST_BYTES = 4096
"""Of a request's body; the settings need a hundred."""
MOST_NAMED = 64
"""Backends that one question may name."""


def register() -> None:
    """Add routes and handler to the running server; does nothing where there is none (tests of single modules)."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    settings = MachineSettings(Path(folder_paths.get_user_directory()))
    settings.apply()
    here = machine.Machine()
    add_routes(server.routes, settings, here)
    line_routes.add_routes(server.routes, here)
    measured_routes.add_routes(server.routes, measured_routes.users_store)
    recommended_routes.add_routes(server.routes)
    server.add_on_prompt_handler(queued_by.take_mark)


def add_routes(routes: web.RouteTableDef, settings: MachineSettings, here: machine.Machine) -> None:
    """Add every route; each handler says what it answers."""

    @routes.get(f"{PREFIX}/last_run")
    async def last_run(request: web.Request) -> web.Response:
        """{"runs": [{"model", "device", "steps", "rows": [...], "audit": [...], "notes": [...]}]}."""
        return web.json_response({"runs": clean(runs.recent())})

    @routes.get(f"{PREFIX}/runs")
    async def all_runs(request: web.Request) -> web.Response:
        """{"numbering", "runs": [{"number", "state", "model", "calls", "fallbacks", "totals", "nodes", ...}]}."""
        found = runs.summaries()
        return web.json_response({"numbering": runs.NUMBERING, "runs": found, "phrases": phrases_of(found)})

    @routes.get(f"{PREFIX}/runs/{{number}}")
    async def one_run(request: web.Request) -> web.Response:
        """{"numbering", "run": {"number", "state", "rows", "audit", "notes", "bypass", "windows", ...}}."""
        text = request.match_info["number"]
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            return refused(400, f"the number of a run is a whole number, not {text[:40]!r}")
        run = runs.find(int(text))
        if run is None:
            return refused(404, f"run {text} is not kept; the last {runs.KEPT} are")
        said = phrases_of([run, bypass_reason(run["bypass"]), computed_whole(run)])
        return web.json_response({"numbering": runs.NUMBERING, "run": clean(run), "phrases": said})

    @routes.get(f"{PREFIX}/machine")
    async def this_machine(request: web.Request) -> web.Response:
        """{"platform": {...}, "interpreter": {...}, "hint", "auto", "backends": [{"id", "available", ...}]}."""
        try:
            ids = named(request.query.getall("backend", []))
        except ValueError as error:
            return refused(400, str(error))
        return web.json_response(await here.describe(ids, refresh=request.query.get("refresh") == "1"))

    @routes.get(f"{PREFIX}/settings")
    async def get_settings(request: web.Request) -> web.Response:
        """{"choices", "accuracy", "guard", "roles", "defaults", "log_levels", "traces", "machine", "environment"}.

        `machine` is {name: {"value", "variable"}}, the variable being the one that holds the setting, or None.
        """
        return web.json_response(settings_answer(settings))

    @routes.post(f"{PREFIX}/settings")
    async def post_settings(request: web.Request) -> web.Response:
        """Takes {"hub": bool, "log_level": str, "trace": str} or a part of it, and answers as GET does."""
        try:
            settings.change(checked(await posted(request, MOST_BYTES, "settings")))
        except RefusedError as error:
            return error.answer
        except PermissionError as error:
            if error.errno is not None:  # the file's, not ours
                return refused(500, f"the settings cannot be written: {error.strerror}")
            return refused(409, str(error))
        except OSError as error:
            return refused(500, f"the settings cannot be written: {error.strerror}")
        except ValueError as error:
            return refused(400, str(error)[:200])
        return web.json_response(settings_answer(settings))

    @routes.get(f"{PREFIX}/bug_report")
    async def bug_report(request: web.Request) -> web.Response:
        """Markdown to paste into an issue."""
        return web.Response(text=machine.bug_report(await here.describe()))  # plain, so that a browser shows it


def named(names: list[str]) -> tuple[str, ...]:
    """The backends that a question is about.

    Raises:
        ValueError: too many, or one that is not known.
    """
    if len(names) > MOST_NAMED:
        raise ValueError(f"{len(names)} backends > {MOST_NAMED}")
    ids = tuple(dict.fromkeys(canonical(name[:80]) for name in names))
    choices = [name for name in ids if name not in BACKENDS]
    if choices:
        raise ValueError(f"{', '.join(choices)}: not one backend, or not in this version")
    return ids


def settings_answer(settings: MachineSettings) -> dict[str, Any]:
    """What GET settings answers. `defaults` are the selector's own, which a person's settings begin with."""
    inputs = AttentionBackendSelector.define_schema().inputs
    defaults = {one.id: one.default for one in inputs if isinstance(one, io.WidgetInput)}
    return {
        "choices": backend_menu(),
        "accuracy": list(ACCURACY),
        "guard": list(GUARD_MODES),
        "roles": list(known_roles()),
        "defaults": defaults,
        "log_levels": list(LEVELS),
        "traces": list(MODES),
        "machine": settings.as_dict(),
        "environment": clean(settings.defaults_from_environment()),
    }
