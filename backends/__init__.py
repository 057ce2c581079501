"""Routing of attention calls to kernels: what can run, what should run, and what did run.

Nothing in this package imports ComfyUI, and importing it imports neither torch nor any kernel package.
Start reading at `values/request.py` (what a call is), then `kernels/backend.py` and `engine/router.py` (which kernel
it gets), `engine/plan.py` and
`engine/session.py` (how it runs, and what else runs where it fails). Programs call what is named here, such as
`attention` and
`attention_backend`; it lives in `api.py`.

Folders, by what a call goes through:
    config    what a person asked for, from every form it is written in; `options` of backends, `schedule` over a run
    mask      what a mask hides, and the cheapest exact way to honour it
    kernels   one file for each backend; `kernel_support` is what several of them share
    measured  which kernel is fastest, found out in real runs and kept
    guard     lossy kernels compared with exact attention on a few rows
    trace     the account: what ran, how often, how long, and why
    records   the decisions of a run as data, to repeat it
    machine   packages, devices, probes, and how to get what is missing

Files beside them:
    api, calls, scopes               what programs call, one such call, and what is in force around it
    request, call_checks             what a call is, and a look over it before it runs
    platform, routes, route_report   a machine as a value, and in which order it tries backends
    backend, family, limits, memory  what every backend declares
    tolerance                        how far a kernel of each arithmetic may be off
    router, plan, session, faults    which kernel a call gets, how it runs, and errors after which nothing is tried
    names, systems, recommended      ids, what other systems call them, and what is known by model family
    versions                         how versions are compared
    bounded                          limits for what comes from outside
    bench, bench_inputs, presets     the benchmark, its tensors, and the calls of real models
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import (
        CheckError,
        account,
        attention,
        attention_backend,
        checks,
        force_backend,
        read_environment,
    )

__all__ = [
    "CheckError",
    "account",
    "attention",
    "attention_backend",
    "checks",
    "force_backend",
    "read_environment",
]


def __getattr__(name: str) -> object:
    """Import what programs call only when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)
