"""Node Attention Schedule: another backend for some steps, sigmas or blocks of a run."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...backends.config.names import AUTO
from ...backends.config.schedule import ScheduleEntry
from ...backends.kernels import BACKENDS
from ...backends.values.errors import ConfigError
from ..hook import patch
from ..inputs import about_options, text_of, wrong_link
from .per_role import known_role
from .selector import CATEGORY, backend_menu, check_backend, environment, extra_input, spec_of

PRECISE = "precise first and last N"
DEFAULT_WINDOW = "2"
ANY_ROLE = "self"
WHEN = (PRECISE, "steps", "percent", "sigmas")


def windows(when: str, window: str) -> dict[str, str]:
    """The window of an entry from the node's two inputs; an empty window is the whole run.

    Raises:
        ConfigError: `when` is not one of the choices, or N is not a number.
    """
    if when not in WHEN:
        raise ConfigError(f"when {when!r} is not one of {', '.join(WHEN)}")
    if not isinstance(window, str):
        raise ConfigError(f"window must be text, not {type(window).__name__}: {window!r}")
    window = text_of(window, DEFAULT_WINDOW).strip()
    if when != PRECISE:
        return {when: window} if window else {}
    if not window.isdecimal() or len(window) > 6 or int(window) == 0:
        raise ConfigError(f"window: {PRECISE} takes one number from 1, such as 2, not {window!r}")
    return {"steps": f"first {window},last {window}"}


def check_precise(backend: str) -> None:
    """The preset is for steps that should be right, so a lossy kernel there is a mistake.

    Raises:
        ConfigError: the backend is not an exact one.
    """
    found = BACKENDS.get(backend)
    if found is not None and found.accuracy != "exact":
        raise ConfigError(
            f"{PRECISE}: {backend} is {found.accuracy}, not exact; choose an exact backend such as torch_sdpa, and put "
            "the faster one on a Selector before this node, or set when to steps"
        )


def entry_of(backend: str, when: str, window: str, blocks: str, role: str, extra: str = "") -> ScheduleEntry:
    """The schedule entry from the node's inputs.

    Raises:
        ConfigError, UnknownBackendError: an input is not understood.
    """
    windowed: dict[str, Any] = {**windows(when, window), "blocks": text_of(blocks), "role": text_of(role)}
    entry = ScheduleEntry(spec_of(backend, extra), **windowed)
    if when == PRECISE:
        check_precise(entry.spec.backend)
    return entry


class AttentionSchedule(io.ComfyNode):
    """MODEL in, patched MODEL out; stacks with the other nodes and with itself, the later one winning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttentionSchedule",
            display_name="Attention Schedule",
            category=CATEGORY,
            description=(
                "Another kernel for a part of the run: the first and last steps, a window of percent or sigmas, some "
                "blocks, one role. Outside it the model runs as before this node. Stack several; where two of them "
                "meet, the later one wins and the run report says so."
            ),
            search_aliases=["attention steps", "attention window", "first and last steps"],
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "backend",
                    options=backend_menu(),
                    default="torch_sdpa",
                    tooltip="The backend inside the window. auto: as if this node were not there.",
                ),
                io.Combo.Input(
                    "when",
                    options=list(WHEN),
                    default=PRECISE,
                    tooltip=(
                        f"{PRECISE}: the N first and N last steps, with an exact backend, where a faster one runs "
                        "otherwise. steps: this sampler's own, from 0. percent: of the whole run, as in other nodes. "
                        "sigmas: the model's noise levels."
                    ),
                ),
                io.String.Input(
                    "window",
                    default=DEFAULT_WINDOW,
                    tooltip=(
                        f"For {PRECISE}: N. For steps: 0-3, 5, 4-, last 2, or several: 0-1,7,last 2. For percent: "
                        "0%-20% or 0-0.2. For sigmas: 1-0.85. Empty: the whole run."
                    ),
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Only these blocks: 0-1,38,last 2, counted in each series of blocks; or of one series: "
                        "double_blocks.0-3. Empty: all. The run report lists the blocks of the model."
                    ),
                ),
                io.String.Input(
                    "role",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Only this role or category: self, cross, joint, flux.single and so on. Empty: all.",
                ),
                extra_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(
        cls,
        backend: Any = None,
        when: Any = None,
        window: Any = None,
        blocks: Any = "",
        role: Any = "",
        extra: Any = "",
        input_types: Any = None,
    ) -> bool | str:
        """Everything that can be known before the graph runs; an input that is connected is None here."""
        problem = wrong_link(cls, input_types)
        if problem is None and when is None and input_types is not None and "when" not in input_types:
            problem = f"when must be one of {', '.join(WHEN)}, not null"
        checked = problem or check_backend(backend, input_types, extra)
        if checked is not True:
            return checked
        if when is None:  # of what is connected, something that is right in any case stands in its place
            when, window = WHEN[1], ""
        if window is None:
            window = DEFAULT_WINDOW if when == PRECISE else ""
        try:
            entry = entry_of(AUTO if backend is None else backend, when, window, blocks or "", role or ANY_ROLE)
            if role and entry.role:
                known_role(entry.role)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> Any:
        return environment()

    @classmethod
    def execute(
        cls, model: Any, backend: str, when: str, window: str, blocks: str = "", role: str = "", extra: str = ""
    ) -> io.NodeOutput:
        entry = entry_of(backend, when, window, blocks, role, extra)
        return io.NodeOutput(patch.add_to_schedule(model, entry, about_options(extra)))
