"""The two wrappers through which ComfyUI begins and ends a sampling run and each of its model calls.

The one around the run makes its `Run` and publishes its run report. The one around a model call makes the run's
`ModelCall` for that device current for the thread, and clears it in `finally`.
"""

from __future__ import annotations

import sys
from typing import Any

from ...backends.config.layers import settings_of
from ...backends.observe.guard.turns import Step
from ...backends.observe.replay.run_recorder import RunRecorder
from ...backends.report import outcome
from ...backends.values.faults import is_cuda_fault, is_out_of_memory
from ...backends.values.reasons import Reason
from ..history import runs
from . import attention_modules, memory, run_progress
from .core_split import CLONES, OF_CORE
from .foreign_code import function_wrapper
from .model_call import ModelCall
from .run import KEY, OVERRIDE, RUN_KEY, Run
from .sampler_loop import loop_step
from .token_grids import grids_of


def outer_sample_wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around one sampling run: make its `Run`, hand it to the model calls, publish its run report at the end."""
    options = executor.class_obj.model_options.get("transformer_options", {})
    override = options.get(KEY)
    if override is None:
        return executor(*args, **kwargs)
    run = Run(override)
    run.is_sampled = True
    run.run_report.recorder = RunRecorder()
    run.run_report.size = _size(args)
    run.others.at_start = options.get(OVERRIDE)
    options[RUN_KEY] = run
    run.around_model_calls = function_wrapper(executor.class_obj.model_options)
    run.function_wrapper = executor.class_obj.model_options.get("model_function_wrapper")
    runs.begin(run.run_report)
    refusal = None
    try:
        output = executor(*args, **kwargs)
        run.stop_clock()
        run.check_called(options)
        run.note_unmatched_roles()
        run.note_sparse_now()
        run.offer()
        if (refusal := run.unexplained()) is not None:
            run.run_report.stopped = outcome.of_error(refusal, strict=True)
    except BaseException as error:  # also a cancelled run; its report is partial
        strict = settings_of(override.layers).strict
        run.run_report.stopped = stopped = outcome.of_error(error, strict=strict, cancelled=_is_cancelled(error))
        run.run_report.note(Reason("unfinished", cause=stopped.cause or "cancelled"))
        raise
    finally:
        options.pop(RUN_KEY, None)
        for one in run.cards.all():
            one.over = True
        try:
            memory.learn(run)
            run.close()
        finally:
            runs.add(run.run_report)  # else it would count as going on for ever
    if refusal is not None:
        raise refusal
    return output


def _size(args: tuple[Any, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes of the noise, the sampler's first argument: one tensor, or several in one (video with sound)."""
    noise: Any = args[0] if args else None
    return tuple(tuple(part.shape) for part in getattr(noise, "tensors", (noise,)) if hasattr(part, "shape"))


def calc_cond_batch_wrapper(
    executor: Any, model: Any, conds: Any, x_in: Any, timestep: Any, model_options: dict[str, Any]
) -> Any:
    """Around the model calls of one evaluation: find the sampler's step, in its own thread; tell the memory planner.

    On several cards the model calls inside are made by other threads, from which the sampler's loop is not seen.
    """
    options = model_options.get("transformer_options", {})
    run = options.get(RUN_KEY)
    if run is None:
        return executor(model, conds, x_in, timestep, model_options)
    before, sigmas = run.step, options.get("sample_sigmas")
    outer, attention_modules.current.run = getattr(attention_modules.current, "run", None), run
    if not run.over and hasattr(model, "diffusion_model"):
        run.patch_modules(model, options, conds)  # here: a pack may call it without the wrapper below
        if CLONES in model_options:
            run.cards.begin_evaluation(model_options[CLONES], options, conds)
    step = step_in_loop(sigmas)
    for one in (run, *run.cards.others.values()):
        one.is_evaluated, one.step, one.sigmas = True, step, sigmas
    try:
        return executor(memory.with_estimate(model, run), conds, x_in, timestep, model_options)
    finally:
        for one in (run, *run.cards.others.values()):
            one.step = before
        attention_modules.current.run = outer


def step_in_loop(schedule: Any) -> int | None:
    """The step that the sampler's own loop is in; None without a sampler, or where its loop is not found."""
    return None if schedule is None else loop_step(outer_sample_wrapper.__code__, len(schedule) - 1)


def _is_cancelled(error: BaseException) -> bool:
    """Whether a person stopped the run: ComfyUI's own exception, or the keyboard's."""
    management = sys.modules.get("comfy.model_management")
    kinds = KeyboardInterrupt, getattr(management, "InterruptProcessingException", KeyboardInterrupt)
    return isinstance(error, kinds)


def apply_model_wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around one model call: set its step, mark the model, make it current for this thread, and clear that
    afterwards."""
    options = kwargs.get("transformer_options") or (args[5] if len(args) > 5 else {})
    override = options.get(KEY)
    if override is None:
        return executor(*args, **kwargs)
    sampled: Run | None = options.get(RUN_KEY)
    if sampled is None or sampled.override is not override or sampled.over:  # over: another pack kept its options
        run, own_run = Run(override), True  # a program that calls the model without a sampler
    else:
        run, own_run = sampled if OF_CORE not in options else sampled.cards.of(options[OF_CORE]), False
    run.patch_modules(executor.class_obj, options)
    run.samples = max(run.samples, args[0].shape[0])
    model_call = run.model_call(args[0].device)
    if model_call.session.over_cards is not None and OF_CORE in options:
        model_call.session.over_cards.turn_off(Reason("cards.core"))
    previous, place, on_top = attention_modules.set_model_call(model_call), model_call.state(), run.others.on_top
    inside = run.step is None and (run.is_sampled or own_run) and OF_CORE not in options
    replaced: dict[str, Any] = {}
    progress = None
    try:
        model_call.timetable = run.timetable(executor.class_obj, options)
        model_call.code = run.foreign_code(executor.class_obj.diffusion_model)
        if inside:  # not from ComfyUI's own batching, which has asked already in the sampler's thread
            run.step = step_in_loop(options.get("sample_sigmas"))
        grids = 0
        if run.asks_for_sparse:
            grids = _grids(run, executor.class_obj.diffusion_model, args, kwargs)
            schedule = run.whole_schedule(executor.class_obj, options)
            progress = run_progress.begin(model_call.session.progress, run, schedule, options, args[0])
        model_call.begin(options, in_model_call=True, grids=grids)
        replaced = run.others.watch(options)
        if model_call.session.tuner is not None:
            model_call.session.tuner.model_call(options.get("sigmas"))
        output = _guarded(model_call, options, executor, args, kwargs)
        clock, sigma = model_call.session.device_clock, options.get("sigmas")
        sigmas = run.sigmas_of(options) if OF_CORE in options else options.get("sample_sigmas")
        run.run_report.end_of_model_call(clock, args[0].device, sigma, sigmas, run.step)
        if not run.reached:
            run.check_reached(model_call, options)
        return output
    finally:
        if inside:
            run.step = None
        options.update(replaced)
        attention_modules.set_model_call(previous)
        model_call.restore(place)
        if progress is not None:
            run_progress.restore(model_call.session.progress, progress)
        if model_call.in_model_call:  # one inside another, which goes on where it was
            run.others.on_top = on_top
        if own_run or run.over:  # over: the sampler did not wait for this thread
            run.close()


def _grids(run: Run, diffusion_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of this model call's token grids; 0, with a note, where its input cannot be read."""
    family = attention_modules.family_of_model(diffusion_model)
    try:
        return 0 if family is None else run.number_of(grids_of(diffusion_model, family.name, args, kwargs))
    except Exception as error:  # an input of an unknown kind: the calls are computed whole
        if is_out_of_memory(error) or is_cuda_fault(error):  # reading sigmas waits for the device
            raise
        run.note(f"the token grids of this model could not be read: {type(error).__name__}: {error}")
        return 0


def _guarded(
    model_call: ModelCall, options: dict[str, Any], executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The model call, whose output the guard looks at where one is on; see `Guard.model_call`."""
    guard = model_call.session.guard
    if guard is None:
        return executor(*args, **kwargs)
    control = args[4] if len(args) > 4 else None
    kept = None
    if guard.enforces and isinstance(control, dict):  # models take its entries out while they run
        kept = {name: list(parts) if isinstance(parts, list) else parts for name, parts in control.items()}

    def again() -> Any:
        model_call.begin(options, in_model_call=True, grids=model_call.window.grids)
        return executor(*(args if kept is None else (*args[:4], kept, *args[5:])), **kwargs)

    at = None if options.get("sample_sigmas") is None else _place_in_run(model_call, len(options["sample_sigmas"]) - 1)
    return guard.model_call(options.get("sigmas"), lambda: executor(*args, **kwargs), again, at)


def _place_in_run(model_call: ModelCall, steps: int) -> Step:
    """Where in a sampler's run of so many steps this model call is; no sigma is read for it."""
    step, timetable = model_call.run.step, model_call.timetable
    if step is None or timetable is None or not timetable.timed:
        return Step(step, steps)
    return Step(step, steps, timetable.unchanged(step))
