"""This machine for the panel: its platform and each backend's state, and a text about both for a bug report."""

from __future__ import annotations

import asyncio
import platform as python_platform
from typing import Any

import comfy.model_management
import comfyui_version

from ...backends.doctor.doctor import Row, examine, why_no_card
from ...backends.doctor.install import Interpreter, running_interpreter
from ...backends.engine.router import Router
from ...backends.kernels.registry import detect
from ...backends.measure.environment import driver_of, own_version
from ...backends.report import audit
from ...backends.values.platform import Platform
from ...backends.values.privacy import clean, without_paths
from ..history import runs
from ..hook.comfy_functions import started_with
from .answers import phrases_of
from .forecast import forecast
from .model_file import ModelFacts, facts_of


class Machine:
    """What the doctor finds, kept until something that can be switched while the server runs has changed.

    Asking a backend loads its package, which can take seconds: that happens in a thread, one backend at a time, so that
    the question of a node does not wait for all that the panel asks.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[Platform, str], dict[str, Any]] = {}
        self._router: Router | None = None
        self._one_at_a_time = asyncio.Lock()

    async def describe(self, ids: tuple[str, ...] = (), refresh: bool = False) -> dict[str, Any]:
        """The platform, and the rows of these backends or of all.

        Args:
            refresh: ask again, e.g. after a probe by the command line or a change in the environment.
        """
        async with self._one_at_a_time:
            if refresh:
                self._rows.clear()
                self._router = None
            router = await asyncio.to_thread(self._here)
        wanted = ids or tuple(router.backends)
        for name in wanted:
            async with self._one_at_a_time:
                await asyncio.to_thread(self._row, router, name)
        platform = router.platform
        return {
            "platform": facts(platform),
            "interpreter": interpreter_facts(running_interpreter()),
            "hint": (hint := why_no_card(platform)),
            "phrases": phrases_of([hint]),
            "auto": router.default_backend(),
            "backends": [self._rows[platform, name] for name in wanted],
        }

    async def model(self, name: str) -> ModelFacts | None:
        """What is known of a model file (`model_file.facts_of`)."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(facts_of, name)

    async def forecast(self, backend: str, accuracy: str, model: str = "", recommended: bool = False) -> dict[str, Any]:
        """What a node with these values, on a model from this file, will do here (`forecast.forecast`).

        Raises:
            ValueError: no such backend or accuracy.
        """
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._forecast, backend, accuracy, model, recommended)

    def _here(self) -> Router:
        platform = detect(comfy.model_management.get_torch_device())
        if self._router is None or self._router.platform != platform:
            self._router = Router(platform)
        return self._router

    def _row(self, router: Router, name: str) -> None:
        if (router.platform, name) not in self._rows:
            (row,) = examine(router, running_interpreter(), [name])
            self._rows[router.platform, name] = as_dict(row)

    def _forecast(self, backend: str, accuracy: str, model: str, recommended: bool) -> dict[str, Any]:
        known = (facts_of(model) if model else None) or ModelFacts("", ())
        return forecast(
            self._here(), backend, accuracy, started_with(),
            head_dims=known.head_dims, family=known.family, recommended=recommended,
        )  # fmt: skip


def facts(platform: Platform) -> dict[str, Any]:
    """The machine as plain data: card, driver, versions; None or an empty text for what is not known."""
    return {
        "kind": platform.kind,
        "card": platform.name,
        "architecture": platform.architecture or platform.gfx or "",
        "sm": platform.sm,
        "driver": driver_of(platform),
        "torch": platform.torch,
        "cuda": platform.cuda,
        "cudnn": platform.cudnn,
        "os": platform.os,
        "python": python_platform.python_version(),
        "comfyui": comfyui_version.__version__,
        "attention_backends": own_version(),
        "hub": platform.hub,
        "packages": dict(platform.packages),
    }


def interpreter_facts(interpreter: Interpreter) -> dict[str, str]:
    """The Python into which packages go; its path, because a person needs it to install anything."""
    return {"path": interpreter.path, "python": interpreter.python, "machine": interpreter.machine}


def as_dict(row: Row) -> dict[str, Any]:
    """One backend's state. Of paths only those in an installation command."""
    advice = row.advice
    return {
        "id": row.id,
        "accuracy": row.accuracy,
        "available": row.available,
        "reasons": clean(row.reasons),
        "version": row.version,
        "cards": row.cards.text,
        "probed": without_paths(row.probed.summary) if row.probed else None,
        "install": None if advice is None else {"kind": advice.kind, "text": advice.text, "note": advice.note},
        "phrases": phrases_of([row.reasons, advice]),
    }


def bug_report(machine: dict[str, Any]) -> str:
    """Machine, backends and the last run as Markdown, without paths and names of people."""
    shown = {name: value for name, value in machine["platform"].items() if value not in (None, "", {})}
    packages = ", ".join(f"{name} {version}" for name, version in shown.pop("packages", {}).items())
    lines = ["### Attention Backends: report for a bug", ""]
    lines += [f"- {name}: {value}" for name, value in shown.items()]
    lines += [f"- kernel packages: {packages or 'none'}", f"- auto begins with: {machine['auto']}", ""]
    lines += ["| backend | state |", "|---|---|"]
    for row in machine["backends"]:
        state = f"available ({row['version'] or 'no package'})" if row["available"] else "; ".join(row["reasons"])
        lines.append(f"| {row['id']} | {state.replace('|', '/')} |")
    last = next(iter(runs.recent()), None)
    lines += ["", "#### Last run", ""]
    if last is None:
        lines.append("none since the server started")
    else:
        lines += [f"- model {last['model']} on {last['device']}, {last['steps']} steps, {runs.state(last)}"]
        lines += [f"- {audit.line(last['audit'])}", *(f"- note: {note}" for note in last["notes"])]
    return without_paths("\n".join(lines)) + "\n"
