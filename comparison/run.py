"""One comparison on the embedded model, from settings to a report with pictures.

Boundary: it puts together what the other modules do; it writes no file and prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backends.config.names import COMFY
from ..backends.engine.router import Router
from ..backends.measure import environment
from ..backends.measure.error import cosine, relative_l2
from ..demo.model import TinyWan
from ..demo.sampling import SHIFT
from . import metrics
from .calls import captured, compare_calls
from .contenders import REFERENCE, Routed, router_for, spec_of
from .report import ComparisonError, Report, Row
from .rounds import Entry, Progress, Work, round_robin, why
from .scene import Scene, Settings, picture_of

NO_MEMORY_COUNT = "peak memory: not measured on the {}: PyTorch keeps no count there that can be reset"


@dataclass
class Comparison:
    """A report and a picture (frames, height, width, 3) in 0..1 for each row, None where nothing came out."""

    report: Report
    pictures: list[Tensor | None] = field(default_factory=list)
    interrupted: bool = False


def quiet(what: str, done: int, total: int) -> None:
    """Progress for those who watch none."""


def compare(
    settings: Settings,
    backends: Sequence[str],
    *,
    router: Router | None = None,
    model: TinyWan | None = None,
    noise: Tensor | None = None,
    progress: Progress = quiet,
) -> Comparison:
    """Run the embedded model once per backend id and compare with `torch_sdpa`, which always runs, and first.

    Args:
        router: None for the machine's own, on the settings' device.
        model: None for the shipped model.
        noise: the latent to start from, (1, 16, frames, height, width); None for that of the seed.

    Raises:
        ComparisonError: no backend is given, the device cannot be used, memory does not suffice to begin, or the
            latent has another shape than the settings say.
    """
    if not backends:
        raise ComparisonError("no backends chosen: name at least one, such as sdpa_math")
    router = router or router_for(settings.device)
    device = torch.device(settings.device or {"rocm": "cuda"}.get(router.platform.kind, router.platform.kind))
    with _said_plainly("the model and its noise"):
        scene = Scene(settings, device, model, noise)
    report = Report(
        settings.mode, scene.name, settings.prompt, settings.seed, settings.width, settings.height, settings.frames,
        settings.steps, settings.guidance, f"euler, simple, shift {SHIFT:g}", scene.dtype,
        environment.in_words(router.platform), environment.versions(router.platform),
    )  # fmt: skip
    able, report.rows = sort_out(list(dict.fromkeys([REFERENCE, *backends])), router)
    if settings.mode == "attention":
        with _said_plainly("sampling with torch_sdpa, to get calls to compare"):
            calls = captured(scene, router)
        rows, interrupted = compare_calls(calls, able, router, settings.repeat, progress)
        results: dict[str, Tensor] = {}
    else:
        rows, interrupted, results = _compare_pictures(scene, able, router, progress)
    measured = {row.asked: row for row in rows}
    report.rows = [measured.get(row.asked, row) for row in report.rows]
    pictures = [picture_of(results[row.asked]) if row.asked in results else None for row in report.rows]
    _judge(report, pictures, results)
    if all(row.peak_memory is None for row in report.rows):
        report.notes.append(NO_MEMORY_COUNT.format({"cpu": "CPU"}.get(device.type, device.type)))
    if interrupted:
        report.notes.append("interrupted: what was finished before is shown")
    return Comparison(report, pictures, interrupted)


@contextmanager
def _said_plainly(what: str) -> Iterator[None]:
    """Turn a failure before the first comparison into a sentence."""
    try:
        yield
    except ValueError:
        raise  # says already what is wrong
    except Exception as error:
        raise ComparisonError(f"{what}: {why(error)}") from error


def sort_out(backends: Sequence[str], router: Router) -> tuple[list[str], list[Row]]:
    """The backends that are available here, and a row for each, with the reasons of those that are not."""
    rows = []
    for backend in backends:
        spec = spec_of(backend)
        reasons = router.unavailable(spec.backend)
        if not reasons and spec.extra:
            reasons = tuple(map(str, router.backends[spec.backend].option_reasons(router.platform, spec.extra)))
        if backend == COMFY:  # available as such, but only ComfyUI can hand over what it would run
            reasons = ("runs only inside ComfyUI",)
        rows.append(Row(backend, failed="; ".join(reasons) or None))
    return [row.asked for row in rows if row.failed is None], rows


def _compare_pictures(
    scene: Scene, backends: Sequence[str], router: Router, progress: Progress
) -> tuple[list[Row], bool, dict[str, Tensor]]:
    """Rows, whether a person interrupted it, and the latent of each backend that finished a run."""
    entries = [Entry(Row(backend), Routed(router, backend, scene.grid)) for backend in backends]
    warm_up, work = _one_step(scene, router) if scene.settings.mode == "one_step" else _end_to_end(scene)
    interrupted = round_robin(entries, scene.settings.repeat, warm_up, work, scene.device, progress)
    return [entry.row for entry in entries], interrupted, {e.row.asked: e.result[0] for e in entries if e.result}


def _end_to_end(scene: Scene) -> tuple[Work, Work]:
    def warm_up(entry: Entry, lap: Callable[[], None]) -> list[Tensor]:
        return [scene.sample(entry.attention, steps=1)]

    def work(entry: Entry, lap: Callable[[], None]) -> list[Tensor]:
        steps = scene.settings.steps

        def on_step(index: int, latent: Tensor) -> None:
            lap()
            entry.attention.at_step(index + 1, steps)

        entry.attention.begin(scene.samples)
        entry.attention.at_step(0, steps)
        try:
            return [scene.sample(entry.attention, on_step)]
        finally:
            entry.attention.at_step(None, steps)

    return warm_up, work


def _one_step(scene: Scene, router: Router) -> tuple[Work, Work]:
    with _said_plainly("sampling with torch_sdpa, to get a latent to start from"):
        latent, sigma = scene.halfway(Routed(router, REFERENCE))

    def work(entry: Entry, lap: Callable[[], None]) -> list[Tensor]:
        predicted = scene.predict(latent, sigma, entry.attention)
        lap()
        return [predicted]

    return work, work


def _judge(report: Report, pictures: Sequence[Tensor | None], results: dict[str, Tensor]) -> None:
    """Fill in what each row says against the first."""
    report.relate()
    reference = pictures[0]
    for row, picture in zip(report.rows, pictures, strict=True):
        if picture is None:
            continue
        row.broken = metrics.what_is_not_finite(results[row.asked])
        if reference is not None:
            metrics.score(row, picture, reference)
            row.relative_l2 = relative_l2(results[row.asked], results[report.rows[0].asked])
            row.cosine = cosine(results[row.asked], results[report.rows[0].asked])
