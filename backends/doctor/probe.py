"""Runs a kernel on a tiny problem in a separate process and returns the outcome.

A kernel that is there and loads may still crash, never return, or compute something else. `probe` starts a child of
the same interpreter for one backend, from this folder whatever it is called; `child` is what runs there. Each probe
has a fresh process, so that a GPU context that one kernel left unusable does not affect the next. The problems are in
`problems.py`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.router import Router
from ..kernels import BACKENDS
from ..kernels.backend import Backend
from ..kernels.registry import detect
from ..measure.remembered import Outcome
from ..values.devices import device_named
from ..values.faults import is_out_of_memory
from ..values.platform import Platform
from ..values.request import AttentionRequest
from . import sparse_executors
from .isolated import run, same_interpreter, words_of
from .problems import harder, problems, tried

if TYPE_CHECKING:
    import torch

CHILD = "probe-child"
"""The first argument of a child process; not a command for people."""

TIMEOUT = 120.0
"""Seconds: a first call may compile (flex_attention on a CPU took 22 s, FlashInfer runs nvcc)."""

STACK = "stack.txt"
STARTING, LOADING, RUNNING = "while starting", "while loading", "while running"


def probe(backend_id: str, timeout: float = TIMEOUT, source: str = "") -> Outcome:
    """Run one backend in a child, which is killed with all that it started after `timeout` seconds.

    Args:
        source: `module:attribute` of a mapping of backends to use instead of ours.
    """
    folder = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory(prefix="attention-backends-", ignore_cleanup_errors=True) as scratch:
        answer = Path(scratch, "answer.json")
        ended = run([*same_interpreter(), str(folder), CHILD, backend_id, str(answer), source], timeout)
        stage, outcome = _read(answer)
        crash_site = _place(answer.with_name(STACK))
    if outcome is not None:
        return outcome if outcome.status == "ok" else replace(outcome, stderr=ended.tail)
    if ended.status is None:
        status, reason = "hung", f"no answer within {timeout:g} s {stage}"
    else:
        ends = words_of(ended.status) if ended.status else "ended early with exit code 0"
        status, reason = "crashed", f"{ends} {stage}{crash_site}"
    if stage == STARTING:  # Python or torch itself, before anything of the kernel
        status, reason = "untested", f"{status}: {reason}"
    return Outcome(status, reason, stderr=ended.tail)


def _read(answer: Path) -> tuple[str, Outcome | None]:
    """The stage that the child reached, and its outcome if there is one."""
    try:
        data = json.loads(answer.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return STARTING, None
    if "stage" in data:
        return data["stage"], None
    return RUNNING, Outcome(**{**data, "stderr": tuple(data["stderr"])})


def _place(stack: Path) -> str:
    """The Python function that a crash happened in or below, from faulthandler's file; empty where there is none."""
    with contextlib.suppress(OSError):
        found = re.search(r'File "(.+)", line (\d+) in (.+)', stack.read_text(encoding="utf-8", errors="replace"))
        return f", in {found[3]} ({found[1]}, line {found[2]})" if found else ""
    return ""


# What runs in the child


def child(arguments: list[str]) -> int:
    """Probe one backend here: `ID ANSWER_FILE [MODULE:ATTRIBUTE]`. Does not return where there is an answer."""
    backend_id, answer, *source = arguments
    file = Path(answer)
    _write(file, {"stage": STARTING})
    stack = file.with_name(STACK).open("w", encoding="utf-8")
    faulthandler.enable(stack, all_threads=False)  # where a crash happened; not on stderr, which it would fill
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import torch  # so that its failure is not reported as the kernel's

    with torch.inference_mode():
        platform = detect()
        if backend_id.startswith(sparse_executors.PREFIX):
            _write(file, {"stage": RUNNING})
            executor = sparse_executors.by_id(backend_id.removeprefix(sparse_executors.PREFIX))
            outcome = sparse_executors.judge(executor, platform, _device(platform))
        else:
            outcome = judge(backend_id, platform, _backends(source[0] if source else ""), file)
    _write(file, asdict(outcome))
    if outcome.status != "ok":
        print(outcome.summary, file=sys.stderr)
    with contextlib.suppress(Exception):  # a package may have put anything there
        sys.stderr.flush()
    # Libraries that crash while Python shuts down are no fault of the kernel's.
    os._exit(0)


def _backends(source: str) -> Mapping[str, Backend]:
    if not source:
        return BACKENDS
    module, _, attribute = source.partition(":")
    found: Mapping[str, Backend] = getattr(importlib.import_module(module), attribute)
    return found


def judge(backend_id: str, platform: Platform, backends: Mapping[str, Backend], stages: Path | None = None) -> Outcome:
    """Load and run one backend in this process and compare it with attention in float64."""
    router = Router(platform, backends, use_probe_results=False)
    backend = backends[backend_id]
    if backend.hosted:
        return Outcome("untested", "runs inside ComfyUI only")
    _write(stages, {"stage": LOADING})
    reasons = router.unavailable(backend_id)
    if reasons:
        return Outcome("unavailable", "; ".join(reasons))
    able = (request for request in problems() if not backend.unsupported_reasons(request, platform))
    request = next(able, None)
    if request is None:
        why = backend.unsupported_reasons(next(problems()), platform)
        return Outcome("untested", f"takes none of the probe's calls: {'; '.join(why)}")

    device = _device(platform)
    _write(stages, {"stage": RUNNING})
    try:
        outcome = tried(router, backend, request, device)
        for other in harder(backend, platform, request):
            if outcome.status != "ok":
                break
            found = tried(router, backend, other, device)
            if found.status != "ok":
                outcome = replace(found, reason=f"{found.reason} (with {_different(other, request)})")
    except (Exception, SystemExit) as error:  # what a kernel raises is the outcome
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        if is_out_of_memory(error):
            return Outcome("untested", f"out of memory: {text}")
        return Outcome("failed", f"raised {text}")
    return outcome


def _device(platform: Platform) -> torch.device:
    return device_named("cuda" if platform.kind == "rocm" else platform.kind)


def _different(request: AttentionRequest, plain: AttentionRequest) -> str:
    varied = ("mask", "num_kv_heads", "scale", "is_causal")
    names = [name for name in varied if getattr(request, name) != getattr(plain, name)]
    return ", ".join(f"{name} {getattr(request, name)}" for name in names)


def _write(file: Path | None, data: Mapping[str, object]) -> None:
    if file is None:
        return
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(data), encoding="utf-8")
    partial.replace(file)
