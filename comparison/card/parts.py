"""What `card` measures, a function for each part, with the probes, presets and comparisons of the other commands.

Importing this needs no torch. Each function runs in its own process (`work.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...backends.engine.router import Router
from ...backends.kernels.backend import HALF
from ...backends.kernels.registry import detect
from ...backends.measure import environment
from ...backends.values.faults import is_cuda_fault
from ...backends.values.request import AttentionRequest
from ..bench_report import CUDNN, SDPA
from ..presets import PRESETS
from .work import Skipped, Work

if TYPE_CHECKING:
    import torch

    from ..bench_run import Asked

CPU_TOKENS = 256
"""The longest side of a preset on a CPU, where full lengths take hours; whole figures are for an accelerator."""
GUARD_TOKENS = 4096
MASK_TOKENS = {"cpu": 512}
SLOW_CALL = 25.0
"""Seconds that must be left for a call that is compiled; flex_attention on a CPU took 22."""
NO_CUDA = "no CUDA device"
ALL_LOST = "every backend crashed or hung before"
HUNYUAN_MASKS = ("key_padding", "bias")

PLAIN = AttentionRequest(batch=1, num_heads=2, q_len=256, kv_len=200, head_dim=64, dtype="bfloat16")
VARIED: list[dict[str, Any]] = [
    {},
    *({"head_dim": size} for size in (40, 72, 96, 128, 160, 256)),
    *({"q_len": q_len, "kv_len": kv_len} for q_len, kv_len in ((1, 256), (256, 1), (77, 77), (1000, 1100))),
    *({"mask": kind} for kind in ("key_padding", "bool", "bias")),
    {"batch": 2, "mask": "bool", "head_dim": 128},
    {"is_causal": True, "kv_len": 256},
    {"num_heads": 4, "num_kv_heads": 2},
    {"scale": 0.05},
]
"""What differs from the plain call, each in every dtype."""


def machine(work: Work) -> None:
    """Which card this is, and the versions."""
    platform = detect()
    card = " ".join(filter(None, (platform.name, platform.sm or platform.gfx)))
    work.results.update(
        device=platform.kind,
        card=card or platform.kind,
        machine=environment.in_words(platform),
        driver=environment.driver_of(platform),
        versions=environment.versions(platform),
    )


def doctor(work: Work) -> None:
    """The rows of `doctor --probe`."""
    from ...backends.doctor.doctor import examine, probe_all
    from ...backends.doctor.install import running_interpreter
    from ...backends.doctor.probe import TIMEOUT, probe

    router = Router(detect())
    for name in work.each(list(router.backends)):
        # Half of the time, so that it ends before this process does: one that hangs is known as such.
        found = probe_all(router, [name], lambda name: probe(name, min(TIMEOUT, work.left() / 2)), lambda text: None)
        (row,) = examine(router, running_interpreter(), [name])
        work.results[name] = {**row.as_dict(), "probed": asdict(found[name])}


def numerics(work: Work) -> None:
    """Every kernel that runs here on small calls, against float64 and the tolerance of its arithmetic."""
    import torch

    torch.set_num_threads(1)  # on tensors this small, threads mostly wait for each other
    router = Router(detect())
    for name in work.each(_kernels(work, router)):
        slow = router.backends[name].avoid_reasons(PLAIN, router.platform)
        work.results[name] = _calls_of(work, router, name, SLOW_CALL if slow else 0.0)


def _kernels(work: Work, router: Router) -> list[str]:
    """The dense backends that run here and did not crash before; those that take long to start come last."""
    dense = {name for name, backend in router.backends.items() if not backend.hosted and not backend.sparse}
    able = [name for name in router.backends if name in dense and name not in work.lost]
    able = [name for name in able if not router.unavailable(name)]
    if not able:
        raise Skipped(ALL_LOST)
    return sorted(able, key=lambda name: bool(router.backends[name].avoid_reasons(PLAIN, router.platform)))


def _calls_of(work: Work, router: Router, name: str, least: float) -> dict[str, Any]:
    """The calls of one kernel, each begun only where at least so many seconds are left."""
    from ...backends.doctor.problems import tried
    from ..bench_inputs import device_of

    backend, device = router.backends[name], device_of(router.platform)
    ran, refused, wrong, errors = 0, 0, [], [0.0]
    requests = [PLAIN._replace(dtype=dtype, **changes) for changes in VARIED for dtype in (*HALF, "float32")]
    for request in requests:
        if backend.unsupported_reasons(request, router.platform):
            refused += 1
            continue
        if work.left() <= least:
            break
        ran += 1
        try:
            outcome = tried(router, backend, request, device)
        except Exception as error:  # what a kernel raises is the result
            if is_cuda_fault(error):
                work.lose(f"{type(error).__name__} with {request.describe()}")
            wrong.append(f"{request.describe()}: raised {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        errors.append(outcome.relative_l2 or 0.0)
        if outcome.status != "ok":
            wrong.append(f"{request.describe()}: {outcome.reason}")
    return {
        "accuracy": backend.accuracy,
        "arithmetic": backend.arithmetic_on(router.platform),
        "limit": backend.tolerance_on(router.platform).relative_l2,
        "worst_relative_l2": max(errors),
        "calls": ran,
        "refused": refused,
        "not_reached": len(requests) - ran - refused,
        "wrong": wrong,
    }


def masks(work: Work) -> None:
    """What the plan of a mask gains over SDPA with the mask, by the mask's form."""
    import torch

    from .costs import HEAD_DIM, HEADS, call_of, mask_cost, mask_forms

    device, dtype = _device()
    tokens = MASK_TOKENS.get(device.type, GUARD_TOKENS)
    forms, call = mask_forms(tokens), call_of((1, HEADS, tokens, HEAD_DIM), device, dtype)
    with torch.inference_mode():
        for name in work.each(list(forms)):
            found = mask_cost(call.query, call.key, call.value, forms[name].to(device))
            work.results[name] = {"tokens": tokens, **found}


def presets(work: Work) -> None:
    """The command `bench`, a preset at a time, with and without a mask."""
    from ..bench_run import Asked

    router = Router(detect())
    for name in work.each(list(PRESETS)):
        asked = Asked(name, "", tokens=CPU_TOKENS if router.platform.kind == "cpu" else 0)
        work.results[name] = _bench(work, router, name, asked)


def hunyuan_cudnn(work: Work) -> None:
    """HunyuanVideo's attention on cuDNN by name, against what PyTorch chooses."""
    from ..bench_run import Asked

    router = Router(detect())
    if router.platform.kind != "cuda":
        raise Skipped(NO_CUDA)
    lost = [name for name in (CUDNN, SDPA) if name in work.lost]
    for kind in () if lost else work.each(HUNYUAN_MASKS):
        work.results[kind] = _bench(work, router, kind, Asked("hv15", f"{CUDNN},{SDPA}", mask_kind=kind))
    missing = [kind for kind in HUNYUAN_MASKS if not _both_ran(work.results.get(kind))]
    if missing and not work.not_reached:
        why = "; ".join(f"{name} was lost before: {work.lost[name]}" for name in lost) or "one of the two did not run"
        raise Skipped(f"could not compare with {', '.join(missing)}: {why}")


def _both_ran(report: dict[str, Any] | None) -> bool:
    """Whether each case of a report has both sides of the comparison."""
    cases = report["cases"] if report else [{"rows": []}]
    return all({CUDNN, SDPA} <= {row["backend"] for row in case["rows"] if row["rank"]} for case in cases)


def _bench(work: Work, router: Router, item: str, asked: Asked) -> dict[str, Any]:
    """A report of `bench`, without what crashed before; as far as it came where there was no more time."""
    from ..bench_run import choose_backends, measure

    names = [name for name in choose_backends(asked.backends, router) if not router.backends[name].hosted]
    asked.backends = ",".join(name for name in names if name not in work.lost)
    if not asked.backends:  # an empty list would mean all
        raise Skipped(ALL_LOST)

    def progress(what: str, done: int, total: int) -> None:
        work.doing = what.rpartition(": ")[2]
        work.keep()
        if work.is_over():
            work.not_reached = [item]
            raise KeyboardInterrupt

    report = measure(asked, router, progress=progress)
    found = report.as_dict()
    if report.ended is not None and not work.not_reached:  # a fault of the device: the others need a new process
        work.results[item] = found
        work.lose(report.ended)
    return found


def overhead(work: Work) -> None:
    """What our path costs for each call, over SDPA itself, where the work is next to nothing."""
    import torch

    from .costs import call_cost

    device, _ = _device()
    if device.type == "cpu":
        torch.set_num_threads(1)  # as for numerics
    with torch.inference_mode():
        work.results.update(call_cost(device))


def guard(work: Work) -> None:
    """What a check of the guard costs, and how often it and a watched call wait for the device."""
    import torch

    from .costs import guard_cost, waits

    device, dtype = _device()
    shape = (1, 8, GUARD_TOKENS, 64) if device.type == "cpu" else (1, 24, GUARD_TOKENS, 128)
    with torch.inference_mode():
        work.results["cost"] = guard_cost(shape, device, dtype)
        work.keep()
        work.results["synchronisations"] = (
            waits(shape, device, dtype) if device.type == "cuda" else f"skipped: {NO_CUDA}"
        )


def compiled(work: Work) -> None:
    """The embedded model under torch.compile with our attention in it, against itself as written."""
    import torch

    from ...backends.api import attention
    from ...backends.measure.device_clock import timed
    from ...backends.measure.error import relative_l2
    from ...demo.model import load

    device, _ = _device()
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    model = load().to(device, dtype)
    draw = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 16, 1, 32, 32, generator=draw).to(device, dtype)
    text, at = torch.randn(2, 20, 4096, generator=draw).to(device, dtype), torch.full((2,), 500.0, device=device)

    def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, role: str, block: int) -> torch.Tensor:
        return attention(query, key, value, backend=SDPA, role=role)

    def median(run: Callable[..., torch.Tensor]) -> float:
        return statistics.median(timed(device, run, latent, at, text, ours)[1] for _ in range(10))

    with torch.inference_mode():
        wanted, _ = timed(device, model, latent, at, text, ours)
        work.results["eager_ms"] = median(model)
        work.doing = "torch.compile"
        work.keep()
        fast = torch.compile(model)
        found, first = timed(device, fast, latent, at, text, ours)
        error = relative_l2(found, wanted)
        work.results.update(first_call_s=first / 1e3, compiled_ms=median(fast), relative_l2=error)


def pictures(work: Work) -> None:
    """The command `compare`: the embedded model end to end on every kernel that runs here, with its picture."""
    from ..contenders import default_backends, router_for
    from ..picture import draw, save
    from ..run import compare
    from ..scene import Settings

    def progress(what: str, done: int, total: int) -> None:
        if work.is_over():
            work.not_reached = ["further runs"]
            raise KeyboardInterrupt

    if SDPA in work.lost:  # the others are compared with it
        raise Skipped(f"could not compare: {SDPA} was lost before: {work.lost[SDPA]}")
    router = router_for(None)
    names = [name for name in default_backends(router) if name not in work.lost]
    found = compare(Settings(), names, router=router, progress=progress)
    work.results.update(found.report.as_dict())
    work.keep()
    save(draw(found.report, found.pictures), work.file.with_name("comparison.png"))


def _device() -> tuple[torch.device, torch.dtype]:
    """This machine's device, and the type that models have on it."""
    import torch

    from ..bench_inputs import device_of

    device = device_of(detect())
    return device, torch.float32 if device.type == "cpu" else torch.bfloat16


PARTS: dict[str, Callable[[Work], None]] = {
    "machine": machine,
    "doctor": doctor,
    "numerics": numerics,
    "masks": masks,
    "presets": presets,
    "hunyuan_cudnn": hunyuan_cudnn,
    "overhead": overhead,
    "guard": guard,
    "compile": compiled,
    "pictures": pictures,
}
"""In order of worth."""
