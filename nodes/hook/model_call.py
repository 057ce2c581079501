"""Where in the model the current model call is; each attention call reads it.

A `ModelCall` belongs to one run and one device (`run.py`). The wrapper around the model call (`wrappers.py`) begins it,
makes it current for its thread, and restores the previous one.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from ...backends.config.layers import Choice, resolve
from ...backends.config.schedule import step_of
from ...backends.config.timetable import ALWAYS, Entries, Window
from . import attention_modules
from .foreign_code import ForeignCode, in_a_call
from .masks import COMPOSED, FOREIGN, PATCHED, Masks
from .roles import Role, guess

if TYPE_CHECKING:
    from .run import DeviceSession, Run


class ModelCall:
    """Where in the model the current model call is; one per run and device, since a device runs one call at a time."""

    __slots__ = (
        "attention_module",
        "code",
        "elsewhere",
        "in_model_call",
        "mask_source",
        "masks",
        "options",
        "ordinal",
        "override",
        "plans",
        "routed",
        "run",
        "session",
        "timetable",
        "window",
    )

    def __init__(self, run: Run, session: DeviceSession) -> None:
        self.run = run
        self.override = run.override
        self.session = session
        self.plans = session.plans
        self.timetable = run.outside_sampler
        """The schedules for this model call and its sampler; set before `begin`."""
        self.code: ForeignCode | None = None
        """Finds code of other packs in the running model; set before `begin`."""
        self.begin({})

    def begin(self, options: dict[str, Any], *, in_model_call: bool = False, grids: int = 0) -> None:
        """Start a model call with these transformer options, or a single call outside any.

        `grids`: the run's number for its token grids.

        Attributes are replaced, never changed in place, so that `restore` can bring back the former ones.
        """
        if not in_model_call:
            self.timetable, self.code = self.run.outside_sampler, None
        self.in_model_call = in_model_call
        self.options = options
        self.attention_module: attention_modules.AttentionModule | None = None
        self.ordinal = 0
        self.routed = 0
        self.elsewhere = 0
        """Calls of this model call that other packs computed."""
        self.mask_source: torch.Tensor | None = None
        """Source tensor of a mask that the running module rebuilds in each block (Qwen-Image)."""
        self.masks = Masks(self.run, self._masks_not_kept if in_model_call else None)
        entries = self._entries()
        if in_model_call:
            self.window = self.run.begin_model_call(entries, grids)
            """What decides beside the call itself: schedules, the segment of a recorded run, token grids."""
        else:
            self.window = Window(entries) if entries else ALWAYS

    def state(self) -> tuple[Any, ...]:
        """The values of all attributes, for `restore`."""
        return _everything(self)

    def restore(self, place: tuple[Any, ...]) -> None:
        """Return to an earlier state: at the end of a nested model call, or of a call outside any."""
        (  # in the order of the slots; a loop over them takes 1 us more in each model call
            self.attention_module,
            self.code,
            self.elsewhere,
            self.in_model_call,
            self.mask_source,
            self.masks,
            self.options,
            self.ordinal,
            self.override,
            self.plans,
            self.routed,
            self.run,
            self.session,
            self.timetable,
            self.window,
        ) = place
        if self.in_model_call:
            self.run.resume_model_call(self.window)

    def _masks_not_kept(self) -> str:
        """Why masks may change between the blocks of this model call; empty if only ComfyUI and the model run."""
        if self.run.override.foreign is not None or self.run.others.on_top is not None:
            return COMPOSED
        options = self.options
        if options.get("patches") or options.get("patches_replace"):
            return PATCHED
        found = in_a_call(options) or self.run.around_model_calls
        if not found and self.code is not None:
            found = self.code.found()
        return FOREIGN.format(found) if found else ""

    def _entries(self) -> Entries:
        timetable = self.timetable
        if timetable is None:
            return ALWAYS.entries
        sigma = self.options.get("sigmas") if timetable.timed else None
        if sigma is None:
            return timetable.at(None)
        value = float(sigma.max())  # the one read from the device, for the whole model call
        step = self.run.step
        if step is None:
            self._say_once(timetable.between(value))
        timetable.watch(self.run.run_report.timeline.model_calls + 1, value, step, sigma)
        return timetable.at(value, step)

    def choice(self, role: str, category: str, *, masked: bool = False) -> Choice:
        """What is asked for the current call; `masked` where a mask hides or weighs something in it."""
        timetable = self.timetable
        if timetable is None:
            return resolve(self.session.layers, role, category)
        block = self.attention_module.block if self.attention_module is not None else ""
        choice, note = timetable.resolve(self.window.entries, role, category, block, masked)
        self._say_once(note)
        return choice

    def _say_once(self, text: str) -> None:
        if text and text not in self.run.run_report.notes:
            self.run.note(text)

    def role(self, ordinal: int, q_len: int, kv_len: int) -> Role:
        """The role of the call number `ordinal` of the module that is running; guessed where none is marked."""
        module = self.attention_module
        role = module.role(ordinal, q_len, kv_len) if module is not None else guess("", q_len, kv_len)
        self.run.run_report.categories[role.name] = role.category
        return role

    @property
    def step(self) -> int:
        """The sampler's step of this model call: from its loop, else by `step_of`.

        The second reads a device value: ask once per model call.
        """
        if self.run.step is not None:
            return self.run.step
        sigma, schedule = self.options.get("sigmas"), self.options.get("sample_sigmas")
        return 0 if sigma is None or schedule is None else step_of(float(sigma.max()), schedule.tolist())


_everything = attrgetter(*ModelCall.__slots__)
