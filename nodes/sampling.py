"""The state of a sampling run, and the two wrappers through which ComfyUI begins and ends it.

The hook's object (`host.Override`) holds the configuration and nothing of a run. A `Run` is made around each sampling
run and travels in that run's own transformer options; the part that belongs to one model call is a `Scope`, which the
wrapper around the model call makes current for its thread and takes away again.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from ..backends.audit import NEVER_CALLED, UnexplainedError, asked_and_ran, unexplained
from ..backends.bench import synchronise
from ..backends.config import settings_of
from ..backends.platform import Platform, detect
from ..backends.router import NoBackendError, Router
from ..backends.session import Session
from ..backends.trace import Trace
from . import runs, sites
from .masks import Masks
from .roles import Role

if TYPE_CHECKING:
    from .host import HookPlan, Override

log = logging.getLogger("attention_backends")

KEY = "attention_backends"
"""Where our override stands in `transformer_options`, beside ComfyUI's own key for it."""
RUN_KEY = "attention_backends_run"
OVERRIDE = "optimized_attention_override"


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
        self.trace = Trace(layers=override.layers)
        self.reached = False
        self._scopes: dict[torch.device, Scope] = {}
        self._marks: dict[int, list[sites.Mark]] = {}
        self._started: float | None = None
        for text in override.notes:
            self.trace.note(text)

    def note(self, text: str) -> None:
        """Put a note into the account; log it the first time."""
        if self.trace.note(text):
            log.warning("%s", text)

    def mark(self, model: Any, options: dict[str, Any]) -> None:
        """Mark the attention modules of a model, once per run."""
        if id(model) not in self._marks:
            self._marks[id(model)] = sites.attach(model.diffusion_model)
            self.trace.model = type(model).__name__
            family = sites.family_of_model(model.diffusion_model)
            self.trace.bypass = family.bypass if family is not None else ""
            schedule = options.get("sample_sigmas")
            self.trace.steps = 0 if schedule is None else len(schedule) - 1
            self._started = self._started or perf_counter()

    def note_unmatched_roles(self) -> None:
        """At the end of a whole run: say which configured roles no attention call of the model had."""
        if not self.trace.categories:
            return  # nothing reached us, which has a note of its own
        for finding in asked_and_ran(self.trace):
            if finding.verdict == NEVER_CALLED:
                self.note(*finding.reasons)

    def check_asked(self) -> None:
        """After a whole run, its account published: compare what was asked for with what ran.

        Raises:
            UnexplainedError: strict, and something else ran without a reason.
        """
        if any(scope.session.settings.strict for scope in self._scopes.values()):
            text = unexplained(asked_and_ran(self.trace))
            if text is not None:
                raise UnexplainedError(text)

    def stop_clock(self) -> None:
        """At the end of a whole run: wait for the devices and note how long it took."""
        if self._started is not None:
            for device in self._scopes:
                synchronise(device)
            self.trace.seconds = round(perf_counter() - self._started, 6)

    def close(self) -> None:
        """Take every mark off again."""
        for marks in self._marks.values():
            for mark in marks:
                mark.remove()
        self._marks.clear()

    def scope(self, device: torch.device) -> Scope:
        """The scope of a device, made on first use."""
        found = self._scopes.get(device)
        if found is None:
            self.trace.device = device.type
            found = self._scopes[device] = Scope(self, DeviceSession(self, device))
        return found

    def check_reached(self, scope: Scope, options: dict[str, Any]) -> None:
        """After a model call: say so when no attention call of the run has reached us so far.

        Raises:
            NoBackendError: and a backend was asked for strictly.
        """
        self.reached = self.reached or scope.routed > 0
        if self.reached:
            return
        installed = options.get(OVERRIDE)
        if installed is self.override:
            text = "the patch was never invoked: this model does not use ComfyUI's attention hook"
            remedy = "switch strict off; no attention node can change this model"
        else:
            text = f"a later node replaced the patch: {name_of(installed)} answers every attention call"
            remedy = "remove that node, or switch strict off"
        layers = self.override.layers
        if settings_of(layers).strict and any(layer.per_role or not layer.default.is_auto for layer in layers):
            raise NoBackendError(f"{text}\n  what to do: {remedy}")
        self.note(text)


class DeviceSession(Session):
    """A session with the plans of one run on one device, keyed by everything that can change a decision."""

    def __init__(self, run: Run, device: torch.device) -> None:
        super().__init__(router_for(device), run.override.layers, run.trace)
        self.plans: dict[tuple[Any, ...], HookPlan] = {}


class Scope:
    """Where in the model the current model call is; one per run and device, since a device runs one call at a time."""

    __slots__ = ("mask_source", "masks", "options", "ordinal", "routed", "run", "session", "site")

    def __init__(self, run: Run, session: DeviceSession) -> None:
        self.run = run
        self.session = session
        self.masks = Masks(run)
        self.begin({})

    def begin(self, options: dict[str, Any]) -> None:
        """Start a model call with these transformer options."""
        self.options = options
        self.site: sites.Site | None = None
        self.ordinal = 0
        self.routed = 0
        self.mask_source: torch.Tensor | None = None
        """What the running module makes its mask from, where it makes one of its own."""
        self.masks.clear()

    def role(self, ordinal: int, q_len: int, kv_len: int) -> Role:
        """The role of the call number `ordinal` of the module that is running; guessed where none is marked."""
        role = sites.role_at(self.site, ordinal, q_len, kv_len)
        self.run.trace.categories[role.name] = role.category
        return role

    @property
    def step(self) -> int:
        """The sampler's step of this model call; see `step_of`. Reads a device value: ask once per model call."""
        sigma, schedule = self.options.get("sigmas"), self.options.get("sample_sigmas")
        return 0 if sigma is None or schedule is None else step_of(float(sigma.max()), schedule.tolist())


def step_of(sigma: float, schedule: list[float]) -> int:
    """The step, from 0, that a model call belongs to, by sigmas alone: calls can be skipped, doubled or resumed.

    It is the last entry of the sampler's sigmas that is not below the current one, within 1e-4.
    """
    bound = sigma * (1 - 1e-4)
    return max((i for i, value in enumerate(schedule) if value >= bound), default=0)


def name_of(func: Any) -> str:
    """A function's name as a person would recognise it."""
    return getattr(func, "__qualname__", None) or type(func).__qualname__


def outer_sample_wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around one sampling run: make its `Run`, hand it to the model calls, publish its account at the end."""
    options = executor.class_obj.model_options.get("transformer_options", {})
    override = options.get(KEY)
    if override is None:
        return executor(*args, **kwargs)
    run = Run(override)
    options[RUN_KEY] = run
    runs.begin(run.trace)
    try:
        output = executor(*args, **kwargs)
        run.stop_clock()
        run.note_unmatched_roles()
    except BaseException as error:  # a cancelled run too; its account is not a whole run's
        run.trace.note(f"the run did not finish: {type(error).__name__}")
        raise
    finally:
        options.pop(RUN_KEY, None)
        run.close()
        runs.add(run.trace)
    run.check_asked()
    return output


def apply_model_wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around one model call: say which step it is, mark the model, set this thread's scope and clear it again."""
    options = kwargs.get("transformer_options") or (args[5] if len(args) > 5 else {})
    override = options.get(KEY)
    if override is None:
        return executor(*args, **kwargs)
    run = options.get(RUN_KEY)
    own_run = run is None or run.override is not override
    if own_run:  # a program that calls the model without a sampler
        run = Run(override)
    run.mark(executor.class_obj, options)
    scope = run.scope(args[0].device)
    scope.begin(options)
    previous = sites.set_scope(scope)
    try:
        output = executor(*args, **kwargs)
        run.trace.end_of_model_call()
        if not run.reached:
            run.check_reached(scope, options)
        return output
    finally:
        scope.masks.clear()
        sites.set_scope(previous)
        if own_run:
            run.close()
