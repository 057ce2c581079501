"""The state of a sampling run, with a session for each device it is on.

The hook's object (`override.py`) has the configuration and no state of a run. `wrappers.py` makes a `Run` around each
sampling run and passes it on in that run's transformer options; the state of one model call is a `ModelCall`
(`model_call.py`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from itertools import chain, count
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from ...backends.config.layers import asks_for_sparse, cards_of, names_backends, record_of, settings_of
from ...backends.config.schedule import is_scheduled
from ...backends.config.timetable import ALWAYS, Entries, Timetable, Window
from ...backends.engine.router import Router
from ...backends.engine.session import Session
from ...backends.kernels import BACKENDS
from ...backends.kernels.registry import detect
from ...backends.observe.advisories import unused_advisories
from ...backends.observe.autotune.store import path_in
from ...backends.observe.autotune.tuner import Tuner
from ...backends.observe.run_session import RunSession, tuner_of
from ...backends.report import RunReport
from ...backends.report.audit import NEVER_CALLED, UnexplainedError, asked_and_ran, unexplained
from ...backends.report.split import whole
from ...backends.values.devices import synchronise
from ...backends.values.errors import NoBackendError
from ...backends.values.platform import Platform
from ...backends.values.reasons import Reason
from . import attention_modules, run_progress
from .core_split import OF_CORE, CardRuns
from .foreign_code import ForeignCode
from .model_call import ModelCall
from .other_packs import KEY as KEY
from .other_packs import OVERRIDE as OVERRIDE
from .other_packs import Others
from .roles import bypass_of
from .run_progress import NO_SAMPLER, WholeSchedule, whole_schedule
from .token_grids import Grids

if TYPE_CHECKING:
    from ...backends.cards.heads import HeadsOverCards
    from .hook_plans import HookPlan
    from .layouts import Layout
    from .memory import MemoryKey
    from .override import Override

log = logging.getLogger("attention_backends")

NEVER_INVOKED = "the patch was never invoked: this model does not use ComfyUI's attention hook"
RUN_KEY = "attention_backends_run"
_told: set[str] = set()
"""Backends of which a run report of this process said so."""


def router_for(device: torch.device) -> Router:
    """The router of a device, kept for the life of the process: it remembers which packages are broken.

    A library may have switched cuDNN's attention off or on since: then the platform is another one, and so the router.
    """
    return _router(detect(device))


@lru_cache(maxsize=16)
def _router(platform: Platform) -> Router:
    return Router(platform)


class Run:
    """One sampling run of one patched model: its run report, a session per device, and the patched forwards.

    Where ComfyUI divides the model calls over several cards, `cards` has a run for each of them.
    """

    def __init__(self, override: Override) -> None:
        self.override = override
        self.run_report = RunReport(layers=override.layers)
        self.reached = False
        self.others = Others(self)
        self.roots: set[int] = set()
        """Ids of the diffusion models whose forwards are patched."""
        self.over = False
        """Its sampler has ended: model calls whose options still contain it get another run."""
        self.family = ""
        """The model family, by its name in `roles.py`; empty if unknown."""
        self._model_calls: dict[torch.device, ModelCall] = {}
        self._patches: dict[int, attention_modules.ForwardPatches] = {}
        self._patching = threading.Lock()
        self._is_closed = False
        self.cards = CardRuns(self)
        self.sigmas: Any = None
        """The sampler's own tensor of its sigmas; a card's model calls get copies. None outside a sampler."""
        self.samples = 0
        """Most samples in one model call so far; each of the prompts that ComfyUI batches counts."""
        self.memory_key: MemoryKey | None = None
        """The key under which the calls of this run are remembered; None without a sampler."""
        self.extra_bytes = 0.0
        """Bytes that its kernels take for each sample beyond ComfyUI's estimate."""
        self.outside_sampler = Timetable(override.layers) if is_scheduled(override.layers) else None
        """The schedules outside a model call; None without a schedule."""
        self.record = record_of(override.layers)
        """The recorded run to repeat; None without one."""
        self._timetables: dict[int, tuple[Any, Timetable]] = {}
        self._windows: dict[Window, Window] = {}
        self.asks_for_sparse = asks_for_sparse(override.layers)
        """Whether token grids and progress are needed."""
        self.grids: dict[int, Grids] = {}
        """The token grids of its model calls, by the number in `Window.grids`."""
        self._numbers: dict[Grids, int] = {}
        self._count = count(1)
        self._schedule: tuple[Any, WholeSchedule] | None = None
        self.step: int | None = None
        """The sampler's step of the current evaluation of the model, from its loop (`sampler_loop.py`), or None."""
        self._code: dict[int, ForeignCode] = {}
        self.around_model_calls = ""
        """The name of another pack's function that calls the model instead of ComfyUI; empty without one."""
        self.function_wrapper: Any = None
        """That function."""
        self.is_sampled = False
        """Whether a sampler makes the model calls; False where a program calls the model directly."""
        self.is_evaluated = False
        """The sampler has asked for the model's output."""
        for text in override.notes:
            self.run_report.note(text)

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        """Itself: packs copy the options of a model call, whose calls still belong to this run."""
        return self

    def note(self, text: str) -> None:
        """Put a note into the run report; log it the first time."""
        if self.run_report.note(text):
            log.warning("%s", text)

    def patch_modules(self, model: Any, options: dict[str, Any], conds: Any = ()) -> None:
        """Patch the forwards of a model's attention modules, once per run; again those that changed since.

        conds: of the model calls, where a sampler makes them.
        """
        with self._patching:
            if id(model) in self._patches:
                self._patches[id(model)].renew()
                return
            if self._is_closed:  # the thread of another card, after the sampler has ended
                return
            self._patches[id(model)] = attention_modules.patch_forwards(model.diffusion_model)
            self.roots |= {id(model.diffusion_model), id(getattr(model.diffusion_model, "_orig_mod", None))}
            self.run_report.model = type(model).__name__
            family = attention_modules.family_of_model(model.diffusion_model)
            self.family = family.name if family is not None else ""
            controlled = any("control" in cond for part in conds for cond in part or ())
            self.run_report.bypass = bypass_of(family, _names_in(model.diffusion_model, options), controlled)
            schedule = options.get("sample_sigmas")
            self.run_report.steps = 0 if schedule is None else len(schedule) - 1
            self.run_report.started = self.run_report.started or perf_counter()

    def sigmas_of(self, options: Mapping[str, Any]) -> Any:
        """The sampler's sigmas for a model call with these options: the same tensor throughout a sampler."""
        if OF_CORE in options and self.sigmas is not None:
            return self.sigmas
        return options.get("sample_sigmas")

    def timetable(self, model: Any, options: dict[str, Any]) -> Timetable | None:
        """The schedules on this sampler's sigmas and this model's blocks; None where there is none.

        The sigmas are read from the device once per sampler.
        """
        if self.outside_sampler is None:
            return None
        sigmas = self.sigmas_of(options)
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

    def whole_schedule(self, model: Any, options: dict[str, Any]) -> WholeSchedule:
        """Where this sampler's steps lie in the whole schedule; its sigmas are read once per sampler."""
        sigmas = self.sigmas_of(options)
        if sigmas is None:
            return NO_SAMPLER
        if self._schedule is None or self._schedule[0] is not sigmas:
            percent_to_sigma = getattr(getattr(model, "model_sampling", None), "percent_to_sigma", None)
            blocks = attention_modules.blocks_of(model.diffusion_model)
            self._schedule = sigmas, whole_schedule(sigmas.tolist(), percent_to_sigma)._replace(blocks=blocks)
        return self._schedule[1]

    def foreign_code(self, diffusion_model: torch.nn.Module) -> ForeignCode:
        """Finds other packs' code in a model; the model is searched once in a run."""
        found = self._code.get(id(diffusion_model))
        if found is None:
            found = self._code[id(diffusion_model)] = ForeignCode(diffusion_model)
        return found

    def note_unmatched_roles(self) -> None:
        """At the end of a whole run: note the configured roles and windows that matched no attention call."""
        runs, report = self.cards.all(), whole(self.run_report)
        if not report.categories:
            return  # no call reached us: another note says so
        timetables = [timetable for run in runs for _, timetable in run._timetables.values()]
        if timetables:
            for other in timetables[1:]:  # copies of the model on other devices
                timetables[0].was_active |= other.was_active
                timetables[0].used |= other.used
            for text in timetables[0].unused(report.categories):
                self.note(text)
            for text in chain.from_iterable(one.remarks() for one in timetables):
                self.note(text)
        for finding in asked_and_ran(report):
            if finding.verdict == NEVER_CALLED:
                self.note(*finding.reasons)
        if self.record is not None:
            made = {run.run_report.card: run.run_report.timeline.model_calls for run in runs if len(runs) > 1}
            for text in self.record.after(self.run_report.node_id, self.run_report.timeline.model_calls, made):
                self.note(text)

    def note_sparse_now(self) -> None:
        """At the end of a whole run: note once in the life of the server which backends used to fall back."""
        rows = whole(self.run_report).rows.values()
        names = {row.backend for row in rows if row.calls and row.asked == row.backend}
        ran = {name for name in names if name in BACKENDS and BACKENDS[name].once_planned}
        if new := sorted(ran - _told):
            _told.update(new)
            self.note(Reason("sparse.now", backends=", ".join(new)))

    def offer(self) -> None:
        """At the end of a whole run: note the advisories for this model that were not switched on."""
        for text in unused_advisories(self.family, whole(self.run_report)):
            if self.run_report.note(text):
                log.info("%s", text)

    def unexplained(self) -> UnexplainedError | None:
        """After a whole run: the error to end with if strict was asked for and something else ran unexplained."""
        model_calls = chain.from_iterable(run.model_calls() for run in self.cards.all())
        if not any(model_call.session.settings.strict for model_call in model_calls):
            return None
        text = unexplained(asked_and_ran(whole(self.run_report)))
        return None if text is None else UnexplainedError(text)

    def stop_clock(self) -> None:
        """At the end of a whole run: wait for the devices and note how long it took."""
        started = self.run_report.started
        if started is not None:
            for device in {device for run in self.cards.all() for device in run._model_calls}:
                synchronise(device)
            self.run_report.seconds = round(perf_counter() - started, 6)
            self.run_report.end_of_run()

    def close(self) -> None:
        """Restore every patched forward, and read the guard's figures that are still on a device."""
        with ExitStack() as stack:  # all of them, whatever one raises
            for run in self.cards.all():
                stack.callback(run._close)

    def _close(self) -> None:
        try:
            if any(model_call.in_model_call for model_call in self._model_calls.values()):
                return  # in a thread of a card that ComfyUI no longer waits for, which closes it when it has ended
            for model_call in self._model_calls.values():
                if model_call.session.guard is not None:
                    model_call.session.guard.flush()
                if model_call.session.tuner is not None:
                    model_call.session.tuner.close()
                if model_call.session.over_cards is not None:
                    model_call.session.over_cards.close()
                run_progress.clear(model_call.session.progress)
            self.run_report.collect()  # times of a cancelled run; of others all are there
        finally:
            with self._patching:
                self._is_closed = True
                for marks in self._patches.values():
                    for mark in marks:
                        mark.remove()
                self._patches.clear()
            self._code.clear()

    def forward_patches(self) -> list[attention_modules.ForwardPatches]:
        """The patched forwards of each model that this run has called so far."""
        return list(self._patches.values())

    def model_calls(self) -> list[ModelCall]:
        """The model calls of all devices so far."""
        return list(self._model_calls.values())

    def model_call(self, device: torch.device) -> ModelCall:
        """The model call of a device, made on first use."""
        found = self._model_calls.get(device)
        if found is None:
            self.run_report.device = device.type
            found = self._model_calls[device] = ModelCall(self, DeviceSession(self, device))
            if self.record is not None:
                report, platform = self.run_report, found.session.router.platform
                for text in self.record.remarks(report.node_id, platform, report.card):
                    self.note(text)
        return found

    def number_of(self, grids: Grids) -> int:
        """The number of some token grids in this run: plan keys have it, whose hash costs less than theirs."""
        number = self._numbers.setdefault(grids, next(self._count)) if grids else 0
        self.grids[number] = grids
        return number

    def begin_model_call(self, entries: Entries, grids: int = 0) -> Window:
        """The window of the model call that begins: entries of the schedules, segment of a record, token grids."""
        report = self.run_report
        number = report.timeline.model_calls + 1
        segment = 0 if self.record is None else self.record.run_of(report.node_id, report.card).part(number)
        window = Window(entries, segment, grids) if entries or segment or grids else ALWAYS
        window = self._windows.setdefault(window, window)  # equal ones are the same object, which a key compares first
        if self.run_report.recorder is not None:
            self.run_report.recorder.begin_model_call(number, window)
        return window

    def resume_model_call(self, window: Window) -> None:
        """After a nested model call: the outer one continues under the next number."""
        if self.run_report.recorder is not None:
            self.run_report.recorder.begin_model_call(self.run_report.timeline.model_calls + 1, window)

    def check_reached(self, model_call: ModelCall, options: dict[str, Any]) -> None:
        """After a model call: note it if no attention call of the run is known so far, ours or another's.

        Raises:
            NoBackendError: it is so, and a backend was asked for strictly.
        """
        self.reached = self.reached or model_call.routed > 0
        if self.reached:
            self.run_report.unused = ""
        else:
            self._not_reached(options)

    def check_called(self, options: dict[str, Any]) -> None:
        """After a whole run: note it if none of the sampler's model calls reached us.

        Raises:
            NoBackendError: it is so, and a backend was asked for strictly.
        """
        runs = self.cards.all()
        if self.is_evaluated and not any(run.reached or run.run_report.timeline.model_calls for run in runs):
            self._not_reached(options)

    def _not_reached(self, options: dict[str, Any]) -> None:
        text, remedy = NEVER_INVOKED, "switch strict off; no attention node can change this model"
        around = self.others.around(options) or ", ".join(self.run_report.unseen)
        if around:
            text = Reason("unreached", packs=around)
            remedy = f"remove or bypass {around}, or switch strict off"
        layers = self.override.layers
        if settings_of(layers).strict and (self.record is not None or names_backends(layers)):
            raise NoBackendError(f"{text}\n  what to do: {remedy}")
        self.run_report.unused = text
        self.note(text)


def _names_in(model: Any, options: Mapping[str, Any]) -> str:
    """The names of the classes of a model and of its patches, with their modules."""
    patches = [patch for kind in options.get("patches", {}).values() for patch in kind]
    kinds = [*type(model).__mro__, *(kind for patch in patches for kind in (type(patch), patch))]
    return " ".join(f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}" for kind in kinds)


class DeviceSession(RunSession):
    """A session with the plans of one run on one device, keyed by everything that can change a decision."""

    def __init__(self, run: Run, device: torch.device) -> None:
        super().__init__(router_for(device), run.override.layers, run.run_report, device, _tuner_of)
        self.over_cards = _divided(self, device)
        """Divides calls over several GPUs; None without."""
        self.plans: dict[tuple[Any, ...], HookPlan] = {}
        self.layouts: dict[tuple[Any, ...], Layout] = {}

    def forget(self) -> None:
        """Drop all plans; quarantined and vetoed kernels stay known, and the run report continues."""
        self.plans.clear()
        self.layouts.clear()


def _divided(session: Session, device: torch.device) -> HeadsOverCards | None:
    """Divide the session's calls over the devices that a node named."""
    if not cards_of(session.layers):
        return None
    from ...backends.cards.over import divide

    return divide(session, device, router_for, _make_room)


def _make_room(size: int, device: torch.device) -> None:
    from comfy import model_management

    model_management.free_memory(size, device)


def _tuner_of(session: Session) -> Tuner | None:
    """Autotune with the store of this ComfyUI's user; None where no configuration asks for it."""
    return tuner_of(session, _store_path)


def _store_path() -> Path:
    import folder_paths

    return path_in(folder_paths.get_user_directory())
