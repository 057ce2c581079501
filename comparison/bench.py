"""Times and checks kernels on plain tensors: the protocol of the benchmark, without reports and without files.

Inputs come from a fixed seed, and several sets of them are cycled, so that no call finds its tensors in a cache. Three
warm-up calls, then the median of ten, the device synchronised around each. Accuracy is relative L2 and cosine against
attention by its definition in float64, on some query rows. A backend that cannot run is a row that says why; nothing
falls back. Presets are in `presets.py`, tables and files in `bench_report.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from ..backends.engine.router import Router
from ..backends.kernels.support.workspace import lacking_memory
from ..backends.measure.device_clock import timed
from ..backends.measure.error import cosine, exact_rows, relative_l2
from ..backends.values.devices import release
from ..backends.values.faults import KernelFaultError, is_cuda_fault, is_out_of_memory
from ..backends.values.grid import Kept, Place
from ..backends.values.grid import Progress as RunProgress
from ..backends.values.request import AttentionRequest, Host, HostedCall
from .bench_inputs import Problem, make_inputs
from .presets import Preset

if TYPE_CHECKING:
    import torch

    from ..backends.kernels.backend import Kernel

WARM_UP, TIMED = 3, 10
SHARES = (0.5, 0.25, 0.125)
"""Shares of blocks that sparse methods keep, where a method has such an option."""
MOST_SHORT = 4096
"""Cells below which a method's limit for short calls is set to 0: such a case is scaled down."""
CHECKED_ROWS = 256
"""Query rows of every head that are computed exactly: one row of hv15 is 112 KiB of float64 scores, all are 39 GB."""
OUTSIDE_COMFYUI = "runs in ComfyUI only: use the node Attention Benchmark"
INTERRUPTED = "interrupted: the rows are those that were finished"

Progress = Callable[[str, int, int], None]
"""progress(what, done, all): called before each row, outside any `try`; what it raises ends the run."""


@dataclass
class KernelResult:
    """One backend on one problem. Milliseconds and bytes; figures are None where it did not run."""

    backend: str
    accuracy: str
    """The class that it declares: exact, quantized or sparse."""
    status: str = "ok"
    """`ok`, or why there is no time, or what is wrong with the output."""
    ms: float | None = None
    low: float | None = None
    high: float | None = None
    relative_l2: float | None = None
    cosine: float | None = None
    peak_bytes: int | None = None
    """Most memory beyond the inputs, the output included; None where the device does not count it."""
    member: str | None = None
    """What ran, where the backend is a group or ComfyUI's own choice."""
    options: str = ""
    """Its options, as `name=value` pairs."""
    kept: float | None = None
    """Of a sparse backend: share of query-key pairs that was computed."""
    whole: str = ""
    """Of a sparse backend: why the call was computed whole."""

    @property
    def label(self) -> str:
        """The backend with its options."""
        return f"{self.backend} {self.options}".strip()


@dataclass
class Case:
    """One preset with one kind of mask, and what came of it."""

    name: str
    request: AttentionRequest
    hidden: int = 0
    """Keys at the end that the mask hides."""
    preset: Preset | None = None
    rows: list[KernelResult] = field(default_factory=list)
    input_sets: int = 0
    checked_rows: int = 0

    def row(self, backend: str) -> KernelResult | None:
        """The row of a backend with its defaults, or None where the run ended before it."""
        return next((row for row in self.rows if row.label == backend), None)


def make_cases(presets: Sequence[Preset], dtype: str, masks: str, kind: str) -> tuple[list[Case], list[str]]:
    """The cases of `masks` (masked, unmasked or both), and a note for each preset that has no masked one."""
    cases, notes = [], []
    for preset in presets:
        if masks != "masked":
            cases.append(Case(f"{preset.name}, no mask", preset.request(dtype), preset=preset))
        if masks != "unmasked" and preset.padded:
            cases.append(Case(f"{preset.name}, masked", preset.request(dtype, kind), preset.padded, preset))
        elif masks != "unmasked":
            why = "this model hides no keys" if preset.grid is None else "with a token grid none is measured"
            notes.append(f"{preset.name}: no masked case, {why}")
    return cases, notes


Contender = tuple[str, Mapping[str, object]]
"""A backend and its options."""


def contenders(case: Case, backends: Sequence[str], sparse: Sequence[str], router: Router) -> list[Contender]:
    """The rows of a case: `backends`; where it has a grid, `sparse` too, at each of `SHARES` where they take one."""
    from .contenders import spec_of

    specs = {name: spec_of(name) for name in backends}
    if case.request.grid is None:
        return [(spec.backend, dict(spec.extra)) for spec in specs.values()]
    found: list[Contender] = []
    for name in dict.fromkeys((*backends, *sparse)):
        if name in specs and specs[name].extra:
            found.append((specs[name].backend, dict(specs[name].extra)))
            continue
        knobs = {option.name for option in router.backends[name].options} if router.backends[name].sparse else set()
        short = {"min_seq_len": 0} if "min_seq_len" in knobs and case.request.grid.cells < MOST_SHORT else {}
        if "topk" in knobs:
            found += [(name, {"topk": share, **short}) for share in SHARES]
        elif "sparsity" in knobs:
            found += [(name, {"sparsity": 1 - share, **short}) for share in SHARES]
        else:
            found.append((name, {}))
    return found


def run_cases(
    cases: Sequence[Case],
    backends: Sequence[str],
    router: Router,
    device: torch.device,
    *,
    seed: int = 0,
    sparse: Sequence[str] = (),
    host: Host | None = None,
    host_name: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> str | None:
    """Fill in the rows of each case, in the order of `backends`. Returns None, or why the run ended early.

    `sparse`: further backends, for cases with a grid. `host` runs a call with the host's own function (the backend
    `comfy`); None outside a host. A kernel that leaves the device unusable ends the run, and so does a person; the rows
    that were finished are kept.
    """
    import torch

    asked = [contenders(case, backends, sparse, router) for case in cases]
    steps, ended = sum(map(len, asked)), None
    try:
        # Triton launches on the current device, whatever device the tensors are on.
        with torch.inference_mode(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            try:
                for number, case in enumerate(cases):
                    before = sum(map(len, asked[:number]))

                    def tell(position: int, case: Case = case, number: int = number, before: int = before) -> None:
                        progress(f"{case.name}: {asked[number][position][0]}", before + position, steps)

                    _run_case(case, asked[number], router, device, seed, host, host_name, tell)
                    release(device)
            except KernelFaultError as fault:
                ended = str(fault)
            except KeyboardInterrupt:
                ended = INTERRUPTED
    except Exception:
        if ended is None:  # else leaving the context of an unusable device raises again
            raise
    return ended


def _run_case(
    case: Case,
    asked: Sequence[Contender],
    router: Router,
    device: torch.device,
    seed: int,
    host: Host | None,
    host_name: str | None,
    tell: Callable[[int], None],
) -> None:
    problem: Problem | None = None
    lost = ""
    for row_index, (name, options) in enumerate(asked):
        tell(row_index)
        refused = _refusal(name, options, case.request, router, host)
        text = " ".join(f"{option}={value}" for option, value in options.items())
        if refused is None and problem is None and not lost:
            problem, lost = _prepare(case, device, seed, host)
        if refused is not None or problem is None:
            case.rows.append(KernelResult(name, router.backends[name].accuracy, refused or lost, options=text))
            continue
        backend = router.backends[name]
        member = host_name if backend.hosted else backend.kernel_name(case.request, router.platform)
        row = KernelResult(name, backend.accuracy, member=member, options=text)
        try:
            _measure(row, options, case.request, router, problem, device)
        except Exception as error:  # one kernel that fails is a row, and the others still run
            row.status = _why(error)
            if is_cuda_fault(error):
                case.rows.append(row)
                raise KernelFaultError(
                    f"{row.label} left the GPU unusable in {case.name}: {error}; rows before it are kept; to go on, "
                    "start again without it"
                ) from error
        case.rows.append(row)
        if row.status != "ok":
            release(device)  # the traceback keeps the tensors of a failed call alive until here


def _refusal(
    name: str, options: Mapping[str, object], request: AttentionRequest, router: Router, host: Host | None
) -> str | None:
    """Why a backend is not called; None if it is."""
    if router.backends[name].hosted and host is None:
        return OUTSIDE_COMFYUI
    return "; ".join(router.reasons_against(name, request, options=options)) or lacking_memory(
        router.backends[name], request, router.platform
    )


def _prepare(case: Case, device: torch.device, seed: int, host: Host | None) -> tuple[Problem | None, str]:
    """The tensors of a case and the rows to check against; or None and why there are none."""
    try:
        calls = make_inputs(case.request, case.hidden, device, seed, WARM_UP + TIMED)
        if host is not None:
            calls = [HostedCall(call, host) for call in calls]
        rows, exact = exact_rows(calls[0], CHECKED_ROWS)
    except Exception as error:  # a preset that does not fit is the reason of its rows, the next one may fit
        if is_cuda_fault(error):
            raise KernelFaultError(f"the GPU is unusable: {error}; restart this program") from error
        return None, f"{_why(error)} (while the inputs were made)"
    case.input_sets, case.checked_rows = len(calls), len(rows)
    return Problem(calls, rows, exact), ""


def _measure(
    row: KernelResult,
    options: Mapping[str, object],
    request: AttentionRequest,
    router: Router,
    problem: Problem,
    device: torch.device,
) -> None:
    """Run the protocol and write what came of it into `row`."""
    import torch

    from .contenders import REFERENCE

    kernel, kept = router.kernel(row.backend, options), Kept()
    if router.backends[row.backend].sparse:
        backend = router.backends[row.backend]

        def dense(named: str = REFERENCE) -> Kernel:
            return router.kernel(named)

        progress = RunProgress(samples=tuple(range(request.batch)))  # what is kept between steps is kept between calls
        kernel = backend.bind(kernel, request, Place(), progress, kept, dense)
    counted = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if counted else 0
    times: list[float] = []
    for turn in range(WARM_UP + TIMED):
        call = problem.calls[turn % len(problem.calls)]
        output, ms = timed(device, kernel, call)
        times.append(ms)
        if turn == 0:
            _score(row, output, problem)
            if counted:
                torch.cuda.reset_peak_memory_stats(device)  # the memory of the check is not the kernel's
        del output
    row.peak_bytes = torch.cuda.max_memory_allocated(device) - before if counted else None
    times = times[WARM_UP:]
    row.ms, row.low, row.high = median(times), min(times), max(times)
    if kept.calls or kept.dense:
        row.kept, row.whole = round(kept.fraction or 1.0, 4), "; ".join(kept.dense)


def _score(row: KernelResult, output: torch.Tensor, problem: Problem) -> None:
    """Compare the checked rows of the first set with the exact ones; say what is not finite anywhere."""
    import torch

    broken = output.numel() - int(torch.isfinite(output).sum())
    if broken:
        row.status = f"NaN or infinity in {100 * broken / output.numel():.2g} % of the output"
        return
    wanted = problem.exact
    found = output[:, :, problem.rows.to(output.device)].to(wanted.dtype)
    if found.shape != wanted.shape:
        raise RuntimeError(f"output of shape {tuple(output.shape)} for {problem.calls[0].request().describe()}")
    row.relative_l2, row.cosine = relative_l2(found, wanted), cosine(found, wanted)


def _why(error: BaseException) -> str:
    """An error as a reason in one line."""
    line = " ".join(str(error).split())
    if is_out_of_memory(error):
        return f"out of memory: {line}"[:200]
    return f"failed: {type(error).__name__}: {line}"
