"""The state of a sampling run, with a session for each device it is on.

The hook's object (`host.Override`) holds the configuration and nothing of a run. A `Run` is made around each sampling
run (`wrappers.py`) and travels in that run's own transformer options; the part that belongs to one model call is a
`ModelCall` (`model_call.py`).
"""

from __future__ import annotations

import logging
from functools import lru_cache
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from ...backends.config.layers import asks_for_autotune, names_backends, record_of, settings_of
from ...backends.config.schedule import is_scheduled
from ...backends.config.timetable import ALWAYS, Entries, Timetable, Window
from ...backends.engine.router import Router
from ...backends.engine.session import Session
from ...backends.kernels.registry import detect
from ...backends.observe import observe
from ...backends.observe.advisories import unused_advisories
from ...backends.observe.autotune.tuner import Tuner
from ...backends.observe.guard import Guard
from ...backends.report import RunReport
from ...backends.report.audit import NEVER_CALLED, UnexplainedError, asked_and_ran, unexplained
from ...backends.values.devices import synchronise
from ...backends.values.errors import NoBackendError
from ...backends.values.platform import Platform
from . import attention_modules
from .foreign_code import ForeignCode
from .model_call import ModelCall
from .others import KEY as KEY
from .others import OVERRIDE as OVERRIDE
from .others import Others
from .roles import bypass_of

if TYPE_CHECKING:
    from .hook_plans import HookPlan
    from .layouts import Layout
    from .memory import Place
    from .override import Override

log = logging.getLogger("attention_backends")

NEVER_INVOKED = "the patch was never invoked: this model does not use ComfyUI's attention hook"
RUN_KEY = "attention_backends_run"


def router_for(device: torch.device) -> Router:
    """The router of a device, kept for the life of the process: it remembers which packages are broken.

    Another one where a library has switched cuDNN's attention off or on since: each run asks anew.
    """
    return _router(detect(device))


@lru_cache(maxsize=16)
def _router(platform: Platform) -> Router:
    return Router(platform)


class Run:
    """One sampling run of one patched model: its trace, a session per device, and the marks on the model."""

    def __init__(self, override: Override) -> None:
        self.override = override
        self.run_report = RunReport(layers=override.layers)
        self.reached = False
        self.others = Others(self)
        self.roots: set[int] = set()
        """Ids of the diffusion models that are marked."""
        self.over = False
        """Its sampler has ended: model calls that still carry it have a run of their own."""
        self.family = ""
        """Of the model, as `roles.py` names it; empty where that does not know it."""
        self._scopes: dict[torch.device, ModelCall] = {}
        self._marks: dict[int, attention_modules.ForwardPatches] = {}
        self._started: float | None = None
        self.samples = 0
        """Most samples in one model call so far: prompts that ComfyUI batches count each."""
        self.place: Place | None = None
        """What the calls of this run are remembered under; None where no sampler prepared it."""
        self.extra_bytes = 0.0
        """What its kernels take for each sample beyond ComfyUI's estimate."""
        self.timeless = Timetable(override.layers) if is_scheduled(override.layers) else None
        """The schedules as they are outside a model call; None where there is none."""
        self.record = record_of(override.layers)
        """The recorded run that is repeated; None where there is none."""
        self._timetables: dict[int, tuple[Any, Timetable]] = {}
        self._windows: dict[Window, Window] = {}
        self.step: int | None = None
        """The sampler's step of the present evaluation of the model, where its loop tells it: `sampler_loop.py`."""
        self._code: dict[int, ForeignCode] = {}
        self.around_model_calls = ""
        """What of another pack calls the model in ComfyUI's place; empty where nothing does."""
        self.function_wrapper: Any = None
        """That function."""
        self.is_sampled = False
        """Whether a sampler makes the model calls; False where a program calls the model directly."""
        self.is_evaluated = False
        """The sampler has asked for the model's output."""
        for text in override.notes:
            self.run_report.note(text)

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        """Itself: packs copy the options of a model call, and its calls are of this run all the same."""
        return self

    def note(self, text: str) -> None:
        """Put a note into the account; log it the first time."""
        if self.run_report.note(text):
            log.warning("%s", text)

    def mark(self, model: Any, options: dict[str, Any]) -> None:
        """Mark the attention modules of a model, once per run; again those that others have changed since."""
        if id(model) in self._marks:
            self._marks[id(model)].renew()
        else:
            self._marks[id(model)] = attention_modules.patch_forwards(model.diffusion_model)
            self.roots |= {id(model.diffusion_model), id(getattr(model.diffusion_model, "_orig_mod", None))}
            self.run_report.model = type(model).__name__
            family = attention_modules.family_of_model(model.diffusion_model)
            self.family = family.name if family is not None else ""
            self.run_report.bypass = bypass_of(family)
            schedule = options.get("sample_sigmas")
            self.run_report.steps = 0 if schedule is None else len(schedule) - 1
            self._started = self._started or perf_counter()

    def timetable(self, model: Any, options: dict[str, Any]) -> Timetable | None:
        """The schedules on this sampler's sigmas and this model's blocks; None where there is none.

        The sigmas are read from the device once per sampler.
        """
        if self.timeless is None:
            return None
        sigmas = options.get("sample_sigmas")
        place = id(model.diffusion_model)
        before = self._timetables.get(place)
        if before is not None and before[0] is sigmas:
            return before[1]
        found = Timetable(
            self.override.layers,
            () if sigmas is None else sigmas.tolist(),
            getattr(getattr(model, "model_sampling", None), "percent_to_sigma", None),
            attention_modules.blocks_of(model.diffusion_model),
        )
        if before is not None:  # another sampler in the same run
            found.continue_from(before[1])
        self._timetables[place] = sigmas, found
        return found

    def foreign_code(self, diffusion_model: torch.nn.Module) -> ForeignCode:
        """What finds other packs' code in a model; it looks through the model once in a run."""
        found = self._code.get(id(diffusion_model))
        if found is None:
            found = self._code[id(diffusion_model)] = ForeignCode(diffusion_model)
        return found

    def note_unmatched_roles(self) -> None:
        """At the end of a whole run: say which configured roles and windows no attention call of the model had."""
        if not self.run_report.categories:
            return  # nothing reached us, which has a note of its own
        timetables = [timetable for _, timetable in self._timetables.values()]
        if timetables:
            for other in timetables[1:]:  # copies of the model on other devices
                timetables[0].held |= other.held
                timetables[0].used |= other.used
            for text in timetables[0].unused(self.run_report.categories):
                self.note(text)
            for text in chain.from_iterable(one.remarks() for one in timetables):
                self.note(text)
        for finding in asked_and_ran(self.run_report):
            if finding.verdict == NEVER_CALLED:
                self.note(*finding.reasons)
        if self.record is not None:
            for text in self.record.after(self.run_report.node_id, self.run_report.timeline.model_calls):
                self.note(text)

    def offer(self) -> None:
        """At the end of a whole run: say what is recommended for this model and was not switched on."""
        for text in unused_advisories(self.family, self.run_report):
            if self.run_report.note(text):
                log.info("%s", text)

    def unexplained(self) -> UnexplainedError | None:
        """After a whole run: the error to end with where strict was asked for and something else ran unexplained."""
        if not any(model_call.session.settings.strict for model_call in self._scopes.values()):
            return None
        text = unexplained(asked_and_ran(self.run_report))
        return None if text is None else UnexplainedError(text)

    def stop_clock(self) -> None:
        """At the end of a whole run: wait for the devices and note how long it took."""
        if self._started is not None:
            for device in self._scopes:
                synchronise(device)
            self.run_report.seconds = round(perf_counter() - self._started, 6)
            self.run_report.end_of_run()

    def close(self) -> None:
        """Take every mark off again, and read what the guard still has on a device."""
        try:
            for model_call in self._scopes.values():
                if model_call.session.guard is not None:
                    model_call.session.guard.flush()
                if model_call.session.tuner is not None:
                    model_call.session.tuner.close()
            self.run_report.collect()  # of a run that was cancelled; else they all are there
        finally:
            for marks in self._marks.values():
                for mark in marks:
                    mark.remove()
            self._marks.clear()
            self._code.clear()

    def marks(self) -> list[attention_modules.ForwardPatches]:
        """The marks of each model that this run has called so far."""
        return list(self._marks.values())

    def model_calls(self) -> list[ModelCall]:
        """The scopes of all devices so far."""
        return list(self._scopes.values())

    def model_call(self, device: torch.device) -> ModelCall:
        """The model call of a device, made on first use."""
        found = self._scopes.get(device)
        if found is None:
            self.run_report.device = device.type
            found = self._scopes[device] = ModelCall(self, DeviceSession(self, device))
            if self.record is not None:
                for text in self.record.remarks(self.run_report.node_id, found.session.router.platform):
                    self.note(text)
        return found

    def begin_model_call(self, entries: Entries) -> Window:
        """The window of the model call that begins: the active entries of the schedules, the segment of a record."""
        number = self.run_report.timeline.model_calls + 1
        segment = 0 if self.record is None else self.record.run_of(self.run_report.node_id).part(number)
        window = Window(entries, segment) if entries or segment else ALWAYS
        window = self._windows.setdefault(window, window)  # equal ones are the same object, which a key compares first
        if self.run_report.recorder is not None:
            self.run_report.recorder.begin_model_call(number, window)
        return window

    def begin_again(self, window: Window) -> None:
        """After a model call inside another one, which goes on under the next number."""
        if self.run_report.recorder is not None:
            self.run_report.recorder.begin_model_call(self.run_report.timeline.model_calls + 1, window)

    def check_reached(self, model_call: ModelCall, options: dict[str, Any]) -> None:
        """After a model call: say so when no attention call of the run is known so far, ours or another's.

        Raises:
            NoBackendError: and a backend was asked for strictly.
        """
        self.reached = self.reached or model_call.routed > 0
        if self.reached:
            self.run_report.unused = ""
        else:
            self._not_reached(options)

    def check_called(self, options: dict[str, Any]) -> None:
        """After a whole run: say so when the sampler's model calls went past us.

        Raises:
            NoBackendError: and a backend was asked for strictly.
        """
        if self.is_evaluated and not self.reached and not self.run_report.timeline.model_calls:
            self._not_reached(options)

    def _not_reached(self, options: dict[str, Any]) -> None:
        text, remedy = NEVER_INVOKED, "switch strict off; no attention node can change this model"
        around = self.others.around(options) or ", ".join(self.run_report.unseen)
        if around:
            text = f"no attention call of this model reached this node; {around} runs the model in its own way"
            remedy = f"remove or bypass {around}, or switch strict off"
        layers = self.override.layers
        if settings_of(layers).strict and (self.record is not None or names_backends(layers)):
            raise NoBackendError(f"{text}\n  what to do: {remedy}")
        self.run_report.unused = text
        self.note(text)


class DeviceSession(Session):
    """A session with the plans of one run on one device, keyed by everything that can change a decision."""

    def __init__(self, run: Run, device: torch.device) -> None:
        super().__init__(router_for(device), run.override.layers, run.run_report, device=device)
        observe(self)
        self.guard = self.registered(Guard)
        self.tuner = _tuner_of(self)
        if self.tuner is not None:
            self.register(self.tuner)
        self.plans: dict[tuple[Any, ...], HookPlan] = {}
        self.layouts: dict[tuple[Any, ...], Layout] = {}

    def forget(self) -> None:
        """Plan every kind of call anew; what failed or was caught stays known, and the account goes on."""
        self.plans.clear()
        self.layouts.clear()


def _tuner_of(session: Session) -> Tuner | None:
    """What decides where `autotune` is asked for, with the store of this ComfyUI's user; None where nobody does."""
    if not asks_for_autotune(session.layers):
        return None
    import folder_paths

    from ...backends.observe.autotune.store import path_in, shared_store

    return Tuner(session, shared_store(path_in(folder_paths.get_user_directory())))
