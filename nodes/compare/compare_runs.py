"""The runs of a comparison: every backend or patched model on the same set-up, in turn, cancelled as one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ...backends.config import AttentionSpec
from ...backends.config.names import COMFY
from ...backends.values.errors import NoBackendError
from ...comparison import tables
from ...comparison.calls import compare_calls
from ...comparison.contenders import REFERENCE, RefusedError, parse_backends, spec_of, split_backends
from ...comparison.report import ComparisonError, Report, Row
from ...comparison.rounds import Entry, round_robin
from ..history import runs
from ..hook import patch
from ..hook.run import router_for
from .attention_time import timed
from .capture import capturing
from .compare_setup import SetUp, make_report

log = logging.getLogger("attention_backends")


class Variant:
    """One patched model in the race; what `rounds.round_robin` asks of an attention."""

    def __init__(self, row: Row, model: Any) -> None:
        self.row = row
        self.model, self._timed = timed(model)
        self.report: dict[str, Any] | None = None
        self._asked_before: dict[str, Any] | None = None

    @property
    def ran(self) -> str | None:
        """Every backend that computed attention in the last run."""
        rows = self.report["rows"] if self.report else []
        return " + ".join(dict.fromkeys(row["member"] or row["backend"] for row in rows)) or None

    @property
    def note(self) -> str:
        """What is to be said of the last run beside its figures: another pack computed some of its calls, or all."""
        text = self.report["outcome"]["text"] if self.report else ""
        return f"{self.row.label or self.row.asked}: {text}" if text else ""

    def attention_ms(self, device: torch.device) -> float | None:
        """Time in attention since the last call of this method; None if it was not measured for every call.

        On a GPU the device is idle by now, so its events can be read.
        """
        report = self.report if self.report is not self._asked_before else None
        self._asked_before = self.report
        if self._timed is not None and self._timed.times(device):
            milliseconds, counted = self._timed.milliseconds()
            calls = 0 if report is None else sum(row["calls"] for row in report["rows"])
            return milliseconds if 0 < calls == counted else None
        if report is None or any(row["timed"] != row["calls"] for row in report["rows"]):
            return None
        return float(sum(row["ms"] for row in report["rows"]))


def make_variants(model: Any, backends: str, patched: dict[str, Any]) -> list[Variant]:
    """The rows: the reference, what ComfyUI would run, each named backend, each connected model."""
    if not backends.strip() and not patched:
        raise ComparisonError("nothing to compare: name backends, or connect patched models")
    router = router_for(model.load_device)
    variants = []
    for name in backend_names(backends):
        spec = spec_of(name)
        row = Row(name, failed="; ".join(router.unavailable(spec.backend)) or None)
        sparse = router.backends[spec.backend].sparse
        default = AttentionSpec(REFERENCE) if sparse else spec  # cross-attention has no grid, and strict would stop
        patched_model = patch.set_default(
            model, default.backend, accuracy="sparse", strict=True, guard="off", extra=default.extra
        )
        variants.append(Variant(row, patch.set_role(patched_model, "self", spec) if sparse else patched_model))
    variants += [Variant(Row(name, label=name.replace("_", " ")), given) for name, given in patched.items()]
    return variants


def backend_names(backends: str) -> list[str]:
    """The ids that are named, the reference first and what ComfyUI would run second."""
    names = parse_backends(split_backends(backends)) if backends.strip() else [REFERENCE]
    if COMFY not in names:
        names.insert(1, COMFY)
    return names


def compare(setup: SetUp, variants: list[Variant], repeat: int) -> tuple[Report, list[torch.Tensor | None]]:
    """Run every variant, warmed up and interleaved; a row that cannot run says why, finished rows are kept."""
    device = setup.guider.model_patcher.load_device
    entries = {id(variant): Entry(variant.row, variant) for variant in variants}  # type: ignore[arg-type]  # see Entry
    able = [variant for variant in variants if variant.row.failed is None]
    progress = Steps(setup.steps, repeat, len(able))
    by_entry = {id(entries[id(variant)]): variant for variant in variants}
    cancelled = Cancelled()

    def run(
        entry: Entry, lap: Callable[[], None], sigmas: torch.Tensor, kept: list[runs.FinishedRun], warm_up: bool
    ) -> list[torch.Tensor]:
        variant = by_entry[id(entry)]

        def on_step(*_: Any) -> None:
            progress.bar.update(1)
            lap()

        before = len(kept)
        try:
            with cancelled:
                result = setup.sample(variant.model, sigmas, on_step)
            variant.report = kept[-1].report if len(kept) > before else None
        except NoBackendError as error:
            raise RefusedError(first_reason(error)) from error
        finally:
            if warm_up:
                del kept[before:]
        if not warm_up and variant.report is not None:
            entry.row.fell_back += sum(
                row["calls"] for row in variant.report["rows"] if row["reason"] and not row.get("expected")
            )
        return [result]

    def begin_run(what: str, done: int, total: int) -> None:
        with cancelled:
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.begin_run(done)

    with runs.together() as kept:
        round_robin(
            [entries[id(variant)] for variant in able], repeat,
            lambda entry, lap: run(entry, lambda: None, setup.sigmas[:2], kept, True),
            lambda entry, lap: run(entry, lap, setup.sigmas, kept, False),
            device, begin_run,
        )  # fmt: skip
    report = make_report(setup, [variant.row for variant in variants])
    report.notes += [note for variant in variants if (note := variant.note)]
    cancelled.go_on(report)
    progress.end()
    return report, [entries[id(variant)].result[0] if entries[id(variant)].result else None for variant in variants]


def compare_attention(setup: SetUp, backends: str, patched: dict[str, Any], repeat: int) -> Report:
    """Every backend on the same calls, one of each role and shape, from a step in the middle of sampling."""
    if patched:
        raise ComparisonError("mode attention compares backends by name: disconnect model_1 to model_4")
    if not backends.strip():
        raise ComparisonError("nothing to compare: name backends, such as sdpa_math")
    router = router_for(setup.guider.model_patcher.load_device)
    names = backend_names(backends)
    rows = [Row(name, failed="; ".join(router.unavailable(spec_of(name).backend)) or None) for name in names]
    model, calls = capturing(setup.guider.model_patcher)
    setup.sample(model)
    if not calls:
        raise ComparisonError("no attention call of this model reached the hook: there is nothing to compare")
    able = [row.asked for row in rows if row.failed is None]
    progress_bar = comfy.utils.ProgressBar((repeat + 1) * len(able))

    cancelled = Cancelled()

    def progress(what: str, done: int, total: int) -> None:
        with cancelled:
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress_bar.update_absolute(done, total)

    measured, _ = compare_calls(list(calls.values()), able, router, repeat, progress)
    found = {row.asked: row for row in measured}
    report = make_report(setup, [found.get(row.asked, row) for row in rows])
    report.relate()
    cancelled.go_on(report)
    progress_bar.update_absolute(progress_bar.total)
    report.notes.append("one call of each role and shape, from one step in the middle of sampling")
    return report


class Cancelled:
    """Around what ComfyUI can cancel: tells it to `round_robin` as a keyboard's interrupt, and keeps it."""

    error: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, run_report: Any) -> None:
        if isinstance(error, comfy.model_management.InterruptProcessingException):
            self.error = error
            raise KeyboardInterrupt from error

    def go_on(self, report: Report) -> None:
        """Go on cancelling, if that was asked for; what was measured before is in the log then."""
        if self.error is not None:
            report.relate()
            log.info("the comparison was cancelled; what was measured before:\n%s", tables.console(report))
            raise self.error


class Steps:
    """The progress bar over all runs: warm-ups of one step each, then `repeat` rounds of whole runs."""

    def __init__(self, steps: int, repeat: int, rows: int) -> None:
        self.steps = steps
        self.rows = rows
        self.bar = comfy.utils.ProgressBar(rows * (1 + steps * repeat))

    def begin_run(self, done: int) -> None:
        """Go to where run number `done` begins, also past runs that failed before their end."""
        if done:
            self.bar.update_absolute(min(done, self.rows) + max(0, done - self.rows) * self.steps)

    def end(self) -> None:
        """All is done, whatever failed."""
        self.bar.update_absolute(self.bar.total)


def first_reason(error: NoBackendError) -> str:
    """The named backend's own reasons out of a strict refusal."""
    lines = str(error).splitlines()
    return lines[3].strip() if len(lines) > 3 else lines[0]
