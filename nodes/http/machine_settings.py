"""Settings of the machine, in a file in ComfyUI's user folder: Hub downloads, log level, timing of runs.

Defaults for new nodes are settings of the front end.
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
from ...backends.values.fields import Fields
from ...backends.values.plain_data import load_json
from ...backends.values.platform import HUB_VARIABLE, hub_allowed

log = logging.getLogger("attention_backends")

FILE = "attention_backends.json"
MOST_BYTES = 32 * 1024
"""Most bytes of the file; it has about seventy."""
LEVELS = ("", "DEBUG", "INFO", "WARNING", "ERROR")
"""Empty: the level of ComfyUI's log."""
UNSET: dict[str, Any] = {"hub": False, "log_level": "", "trace": MODES[0]}


class MachineSettings:
    """The settings of the file; `apply` makes them effective. Environment variables from before the start win."""

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
        """Make the settings effective; timing from the next run on.

        Hub and timing are set as environment variables: probes run in other processes, and `backends` does not read
        this file.
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
        """Store checked changes in the file and apply them.

        Raises:
            PermissionError: an environment variable sets it.
            OSError: the file cannot be written; then nothing is changed.
        """
        variables = {"hub": (self.hub_is_given, HUB_VARIABLE), "trace": (self.trace_is_given, TRACE_VARIABLE)}
        for name, (is_given, variable) in variables.items():
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
        """Each setting with its value, and the environment variable that sets it, if any."""
        return {
            "hub": {"value": hub_allowed(), "variable": HUB_VARIABLE if self.hub_is_given else None},
            "log_level": {"value": self.stored["log_level"], "variable": None},
            "trace": {
                "value": trace_mode(self.environ),
                "variable": TRACE_VARIABLE if self.trace_is_given else None,
            },
        }

    def defaults_from_environment(self) -> dict[str, str]:
        """Environment variables that decide where a node has auto, with their values."""
        found = {name: self.environ.get(name, "").strip() for name in (CONFIG_VARIABLE, *DEFAULT_VARIABLES)}
        return {name: text for name, text in found.items() if text}


def checked(changes: object) -> dict[str, Any]:
    """The changes, validated.

    Raises:
        ValueError: an unknown setting, or a value of the wrong type.
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
