"""Settings of the whole machine, kept in one small file in ComfyUI's user folder: Hub downloads, the log, the trace.

A person's own defaults for new nodes are no business of the server: the front end keeps them with its other settings.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from ...backends.config.text import CONFIG_VARIABLE, DEFAULT_VARIABLES
from ...backends.report import MODES, trace_mode
from ...backends.report import VARIABLE as TRACE_VARIABLE
from ...backends.values.bounded import read_file, shortened
from ...backends.values.data import load_json
from ...backends.values.fields import Fields
from ...backends.values.platform import HUB_VARIABLE, hub_allowed

log = logging.getLogger("attention_backends")

FILE = "attention_backends.json"
MOST_BYTES = 32 * 1024
"""Of the file; it has some seventy."""
LEVELS = ("", "DEBUG", "INFO", "WARNING", "ERROR")
"""An empty level: as ComfyUI's own log."""
UNSET: dict[str, Any] = {"hub": False, "log_level": "", "trace": MODES[0]}


class MachineSettings:
    """The file's settings, in force from `apply` on. A variable that the person set before the start wins."""

    def __init__(self, folder: Path, environ: MutableMapping[str, str] = os.environ) -> None:
        self.file = folder / FILE
        self.environ = environ
        self.hub_is_given = bool(environ.get(HUB_VARIABLE, "").strip())
        self.trace_is_given = bool(environ.get(TRACE_VARIABLE, "").strip())
        self.stored = {**UNSET, **self._read()}

    def _read(self) -> dict[str, Any]:
        try:
            return checked(load_json(read_file(self.file, MOST_BYTES).decode("utf-8"), FILE))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s cannot be used, so its settings are as if it were not there: %s", FILE, error)
            return {}

    def apply(self) -> None:
        """Put them in force, the trace's from the next run on.

        The Hub's switch goes through the environment because probes run in processes of their own, the trace's because
        `backends` knows nothing of this file.
        """
        if not self.hub_is_given:
            if self.stored["hub"]:
                self.environ[HUB_VARIABLE] = "1"
            else:
                self.environ.pop(HUB_VARIABLE, None)
        if not self.trace_is_given:
            if self.stored["trace"] != UNSET["trace"]:
                self.environ[TRACE_VARIABLE] = self.stored["trace"]
            else:
                self.environ.pop(TRACE_VARIABLE, None)
        log.setLevel(self.stored["log_level"] or logging.NOTSET)

    def change(self, changes: Mapping[str, Any]) -> None:
        """Take over checked changes, keep them in the file, and put them in force.

        Raises:
            PermissionError: a setting is held by an environment variable.
            OSError: the file cannot be written; then nothing is changed.
        """
        held = {"hub": (self.hub_is_given, HUB_VARIABLE), "trace": (self.trace_is_given, TRACE_VARIABLE)}
        for name, (is_given, variable) in held.items():
            if name in changes and is_given:
                raise PermissionError(f"{name} is set by the environment variable {variable}; change it there")
        stored = {**self.stored, **changes}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        part.replace(self.file)
        self.stored = stored
        self.apply()

    def as_dict(self) -> dict[str, Any]:
        """Each setting with its value now and the variable that holds it, if one does."""
        return {
            "hub": {"value": hub_allowed(), "variable": HUB_VARIABLE if self.hub_is_given else None},
            "log_level": {"value": self.stored["log_level"], "variable": None},
            "trace": {
                "value": trace_mode(self.environ),
                "variable": TRACE_VARIABLE if self.trace_is_given else None,
            },
        }

    def defaults_from_environment(self) -> dict[str, str]:
        """Variables that decide where a node says auto, with their texts."""
        found = {name: self.environ.get(name, "").strip() for name in (CONFIG_VARIABLE, *DEFAULT_VARIABLES)}
        return {name: text for name, text in found.items() if text}


def checked(changes: object) -> dict[str, Any]:
    """Changes to the settings.

    Raises:
        ValueError: a setting is not known, or its value is of another kind.
    """
    if not isinstance(changes, dict) or not changes:
        raise ValueError(f"expected an object with one or more of: {', '.join(UNSET)}")
    unknown = sorted(map(str, set(changes) - set(UNSET)))
    if unknown:
        raise ValueError(f"unknown setting {shortened(', '.join(unknown), 200)}; known: {', '.join(UNSET)}")
    fields = Fields(changes)
    fields.flag("hub", False)
    fields.one_of("log_level", LEVELS, "")
    fields.one_of("trace", MODES, MODES[0])
    return changes
