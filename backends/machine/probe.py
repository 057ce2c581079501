"""Runs a kernel on a tiny problem, in a process of its own, and says what became of it.

A kernel that is there and loads may still crash, never return, or compute something else. `probe` starts a child of
the same interpreter for one backend, from this folder whatever it is called; `child` is what runs there. Each probe
has a fresh process, so that a GPU context that one kernel left unusable is none of the next one's business.
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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from ..backend import HALF, Backend
from ..faults import OUT_OF_MEMORY
from ..kernels import BACKENDS
from ..names import COMFY
from ..platform import Platform, detect
from ..request import AttentionCall, AttentionRequest
from ..router import Router
from .devices import device_named, synchronise
from .isolated import run, same_interpreter, words_of
from .remembered import Outcome

if TYPE_CHECKING:
    import torch

CHILD = "probe-child"
"""The first argument that makes the command line a child; no command for people."""

TIMEOUT = 120.0
"""Seconds: a first call may compile (flex_attention on a CPU took 22 s, FlashInfer runs nvcc)."""

STACK = "stack.txt"
STARTING, LOADING, RUNNING = "while starting", "while loading", "while running"

EXACT_FACTOR = 3.0
"""An exact kernel may err so many times as much as plain arithmetic in its dtype, both against float64."""

LOSSY_LIMIT = {"quantized": 0.08, "sparse": float("inf")}
"""Relative L2 by accuracy class. INT8 scores with FP8 values, emulated on these very problems, err by 0.040; twice
that. What a sparse kernel skips matters fully on random numbers, so only finite output is asked of it."""

LIMIT_OF = {"sage_attn_3": 0.4}
"""FP4, emulated on these very problems, errs by 0.20."""


def problems() -> Iterator[AttentionRequest]:
    """Small calls, the best test first: half precision, and keys that fill no block."""
    for dtype in (*HALF, "float32"):
        for kv_len in (200, 256):
            for head_dim in (64, 128):
                yield AttentionRequest(batch=1, num_heads=2, q_len=256, kv_len=kv_len, head_dim=head_dim, dtype=dtype)


def harder(backend: Backend, platform: Platform, plain: AttentionRequest) -> list[AttentionRequest]:
    """The same call with what a build may drop without a word: a mask, grouped heads, a scale, causality.

    As many of them as the backend takes, one after another; several in one call where it takes them together.
    """
    kv_heads: dict[str, object] = {"num_heads": 4, "num_kv_heads": 2}
    wanted: list[dict[str, object]] = [
        {**kv_heads, "scale": 0.05, "mask": "key_padding"},
        {**kv_heads, "scale": 0.05, "is_causal": True, "kv_len": plain.q_len},
        {"mask": "key_padding"},
        {"mask": "bool"},
        kv_heads,
        {"scale": 0.05},
        {"is_causal": True, "kv_len": plain.q_len},
    ]
    taken: list[AttentionRequest] = []
    covered: set[str] = set()
    for changes in wanted:
        request = plain._replace(**changes)  # type: ignore[arg-type]  # each value has its field's type
        new = {name for name in ("mask", "num_kv_heads", "scale", "is_causal") if name in changes} - covered
        if new and not backend.unsupported_reasons(request, platform):
            taken.append(request)
            covered |= new
    return taken


def probe(backend_id: str, timeout: float = TIMEOUT, source: str = "") -> Outcome:
    """Run one backend in a child, which is killed with all that it started after `timeout` seconds.

    Args:
        source: `module:attribute` of a mapping of backends, in place of ours.
    """
    folder = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory(prefix="attention-backends-", ignore_cleanup_errors=True) as scratch:
        answer = Path(scratch, "answer.json")
        ended = run([*same_interpreter(), str(folder), CHILD, backend_id, str(answer), source], timeout)
        stage, outcome = _read(answer)
        place = _place(answer.with_name(STACK))
    if outcome is not None:
        return outcome if outcome.status == "ok" else _with_tail(outcome, ended.tail)
    if ended.status is None:
        status, reason = "hung", f"no answer within {timeout:g} s {stage}"
    else:
        ends = words_of(ended.status) if ended.status else "ended by itself with exit code 0"
        status, reason = "crashed", f"{ends} {stage}{place}"
    if stage == STARTING:  # Python or torch itself, before anything of the kernel
        status, reason = "untested", f"{status}: {reason}"
    return Outcome(status, reason, stderr=ended.tail)


def _with_tail(outcome: Outcome, tail: tuple[str, ...]) -> Outcome:
    return Outcome(outcome.status, outcome.reason, outcome.relative_l2, outcome.ms, tail)


def _read(answer: Path) -> tuple[str, Outcome | None]:
    """How far the child came, and its outcome if it came to one."""
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
    import torch  # before the kernel gets the blame for it

    with torch.inference_mode():
        platform = detect()
        outcome = judge(backend_id, platform, _backends(source[0] if source else ""), file)
    _write(file, asdict(outcome))
    if outcome.status != "ok":
        print(outcome.words, file=sys.stderr)
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
    router = Router(platform, backends, recalls=False)
    backend = backends[backend_id]
    if backend_id == COMFY:
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
    import torch

    device = device_named("cuda" if platform.kind == "rocm" else platform.kind)
    _write(stages, {"stage": RUNNING})
    try:
        outcome = _tried(router, backend, request, device)
        for other in harder(backend, platform, request):
            if outcome.status != "ok":
                break
            found = _tried(router, backend, other, device)
            if found.status != "ok":
                outcome = replace(found, reason=f"{found.reason} (with {_different(other, request)})")
    except (Exception, SystemExit) as error:  # whatever a kernel raises is what is asked for here
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        no_memory = isinstance(error, torch.OutOfMemoryError) or any(word in text.lower() for word in OUT_OF_MEMORY)
        return Outcome("untested", f"out of memory: {text}") if no_memory else Outcome("failed", f"raised {text}")
    return outcome


def _different(request: AttentionRequest, plain: AttentionRequest) -> str:
    asked = ("mask", "num_kv_heads", "scale", "is_causal")
    names = [name for name in asked if getattr(request, name) != getattr(plain, name)]
    return ", ".join(f"{name} {getattr(request, name)}" for name in names)


def _tried(router: Router, backend: Backend, request: AttentionRequest, device: torch.device) -> Outcome:
    """Run one call and compare it.

    Raises:
        Exception: whatever the kernel raises.
    """
    import torch

    call = call_of(request)
    query, key, value, mask = call.query, call.key, call.value, call.attn_mask
    moved = AttentionCall(
        query.to(device, copy=True),
        key.to(device, copy=True),
        value.to(device, copy=True),
        None if mask is None else mask.to(device),
        call.is_causal,
        call.scale,
        call.enable_gqa,
    )
    start = perf_counter()
    output = router.kernel(backend.id)(moved)
    synchronise(device)
    ms = (perf_counter() - start) * 1e3
    output = output.cpu()
    after = [tensor.cpu() for tensor in (moved.query, moved.key, moved.value)]
    reason, error_of = compare(output, call, backend)
    same = all(map(torch.equal, after, (query, key, value)))
    if not reason and not same and not backend.changes_inputs:
        reason = "wrong: it changed its inputs"
    return Outcome("failed" if reason else "ok", reason, error_of, round(ms, 3))


def call_of(request: AttentionRequest) -> AttentionCall:
    """A problem as a call on the CPU; a mask hides the last third of the keys, kind bool one key less in odd rows."""
    import torch

    query, key, value = tensors(request)
    mask = None
    if request.mask != "none":
        visible = torch.arange(request.kv_len) < request.kv_len * 2 // 3
        mask = visible.expand(1, 1, 1, -1).contiguous()
        if request.mask == "bool":
            rows = torch.arange(request.q_len)[:, None] % 2
            mask = (torch.arange(request.kv_len)[None] < request.kv_len * 2 // 3 + rows)[None, None]
    return AttentionCall(query, key, value, mask, request.is_causal, request.scale, request.grouped)


def tensors(request: AttentionRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of a problem, normal random numbers from one seed, on the CPU."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def rand(length: int, heads: int) -> torch.Tensor:
        shape = (request.batch, heads, length, request.head_dim)
        return torch.randn(shape, generator=generator).to(getattr(torch, request.dtype))

    kv_heads = request.num_kv_heads or request.num_heads
    return rand(request.q_len, request.num_heads), rand(request.kv_len, kv_heads), rand(request.kv_len, kv_heads)


def compare(output: torch.Tensor, call: AttentionCall, backend: Backend) -> tuple[str, float | None]:
    """What is wrong with an output, empty if nothing, and its relative L2 distance from float64; all on the CPU."""
    wide = AttentionCall(
        call.query.double(), call.key.double(), call.value.double(),
        call.attn_mask, call.is_causal, call.scale, call.enable_gqa,
    )  # fmt: skip
    expected = BACKENDS["reference"].load(Platform("cpu"))(wide)
    if output.shape != expected.shape:
        return f"wrong: output {tuple(output.shape)} is not {tuple(expected.shape)}", None
    if not output.isfinite().all():
        kind = "NaN" if output.isnan().any() else "infinite numbers"
        return f"wrong: {kind} in the output", None

    def distance(tensor: torch.Tensor) -> float:
        return float((tensor.double() - expected).norm() / expected.norm())

    found = distance(output)
    limit = LIMIT_OF.get(backend.id, LOSSY_LIMIT.get(backend.accuracy, EXACT_FACTOR * distance(_in_steps(call))))
    return (f"wrong: relative L2 {found:.1e} > {limit:.1e}" if found > limit else ""), found


def _in_steps(call: AttentionCall) -> torch.Tensor:
    """Attention with every step rounded to the dtype of the call."""
    import torch

    group = call.query.shape[1] // call.key.shape[1]
    key, value = call.key.repeat_interleave(group, 1), call.value.repeat_interleave(group, 1)
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = call.query @ key.transpose(-2, -1) * scale
    visible = call.attn_mask
    if call.is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    attended: torch.Tensor = scores.softmax(dim=-1) @ value
    return attended


def _write(file: Path | None, data: Mapping[str, object]) -> None:
    if file is None:
        return
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(data), encoding="utf-8")
    partial.replace(file)
