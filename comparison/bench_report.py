"""What a kernel benchmark found: ranks, ratios, each row in words, and JSON.

Boundary: numbers and words; what is measured and how is in `bench.py`, tables are in `bench_tables.py`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..backends.config.names import COMFY
from ..backends.engine.priorities import LAST_RESORT
from .bench import TIMED, WARM_UP, Case, KernelResult
from .tables import ROUNDING

SDPA, CUDNN = LAST_RESORT, "cudnn_attn"
"""The backends that ratios are to."""
"""What every row is set against."""

NO_MODEL = (
    "query and key are random numbers without a model's structure: errors of sparse rows say nothing of a model, "
    "compare its pictures"
)
KIND = "attention-backends kernel benchmark"
FACTS = ("dtype", "seed", "tokens", "device", "card", "machine", "versions", "command", "ended", "notes")


@dataclass
class BenchReport:
    """One run of the benchmark on one machine."""

    cases: list[Case]
    dtype: str
    seed: int
    tokens: int
    """The longest side that lengths were scaled down to; 0 for the full size."""
    device: str
    """Kind of device, one of `platform.KINDS`."""
    card: str
    machine: str
    versions: dict[str, str]
    command: str = ""
    ended: str | None = None
    """Why the run ended early; None when it did not."""
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold: what is not finite becomes null."""
        facts = {name: getattr(self, name) for name in FACTS}
        protocol = {"warm_up": WARM_UP, "timed": TIMED, "reference": "float64"}
        return {"kind": KIND, **facts, "protocol": protocol, "cases": [_case_data(case) for case in self.cases]}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"


def ranking(case: Case) -> list[KernelResult]:
    """The rows that ran and gave a finite result, fastest first."""
    return sorted((row for row in case.rows if row.status == "ok"), key=lambda row: row.ms or 0.0)


def ratio(row: KernelResult, case: Case, base: str) -> float | None:
    """The time of `base` divided by this row's; None where one of them has none."""
    other = case.row(base)
    if other is None or other.status != "ok" or row.status != "ok" or not other.ms or not row.ms:
        return None
    return other.ms / row.ms


def overlap(one: KernelResult, other: KernelResult) -> bool:
    """True when the times of two rows that ran do not tell which is faster."""
    spans = [(row.low or 0.0, row.high or 0.0) for row in (one, other)]
    return spans[0][0] <= spans[1][1] and spans[1][0] <= spans[0][1]


def blanks(case: Case) -> list[str]:
    """Why a column of ratios in this case is empty."""
    reasons = []
    for title, base in (("vs SDPA", SDPA), ("vs cuDNN", CUDNN)):
        row = case.row(base)
        if row is None or row.status != "ok":
            reasons.append(
                f"{title} is blank: {base} " + (f"did not run: {row.status}" if row else "was not asked for")
            )
    return reasons


def title(case: Case) -> str:
    """The case in words: `HunyuanVideo 1.5, no mask`; its own name where it is no preset's."""
    if case.preset is None:
        return case.name
    return case.name.replace(case.preset.name, case.preset.title, 1)


def in_words(case: Case) -> str:
    """Which kernel won: `HunyuanVideo 1.5, no mask: flash_attn is 1.4x faster than torch_sdpa`."""
    ranked = ranking(case)
    if not ranked:
        return f"{title(case)}: nothing ran"
    best = ranked[0]
    lossy = "" if best.accuracy == "exact" else f" ({best.accuracy})"
    if best.backend == SDPA or (gain := ratio(best, case, SDPA)) is None:
        return f"{title(case)}: {best.label} is fastest{lossy}"
    base = case.row(SDPA)
    about = "about " if base is not None and overlap(best, base) else ""
    return f"{title(case)}: {best.label} is {about}{gain:.2g}x as fast as {SDPA}{lossy}"


def subject(case: Case) -> str:
    """The call in one line: its facts, what the mask hides, what was scaled."""
    parts = [case.request.describe()]
    if case.request.mask != "none":
        parts.append(f"last {case.hidden} keys hidden")
    preset = case.preset
    if preset is not None and preset.full is not None:
        q_len, kv_len, padded = preset.full
        hidden = f", {padded} hidden" if case.request.mask != "none" else ""
        parts.append(f"scaled down from q_len {q_len}, kv_len {kv_len}{hidden}")
    if case.input_sets:
        parts.append(
            f"{case.input_sets} sets of inputs, {case.checked_rows} of {case.request.q_len} query rows checked"
        )
    return "; ".join(parts)


def result(row: KernelResult, case: Case) -> str:
    """A row in a few words."""
    base = case.row(SDPA)
    if row.status != "ok" or row.relative_l2 is None:
        return row.status
    if row.whole:
        return f"computed whole: {row.whole}"
    if base is None or not base.relative_l2 or row is base:
        return "ok"
    if row.relative_l2 <= ROUNDING * base.relative_l2:
        return "rounding only"
    wrong = ", though it is declared exact" if row.accuracy == "exact" and row.backend != COMFY else ""
    return f"error {100 * row.relative_l2:.2g} % of the result{wrong}"


def notes(report: BenchReport) -> list[str]:
    """What a reader must know, the early end first."""
    first = [f"ended early: {report.ended}"] if report.ended else []
    if all(row.peak_bytes is None for case in report.cases for row in case.rows):
        first.append(f"peak MB is blank: torch counts memory on CUDA devices only, this is {report.device}")
    if any(row.kept is not None for case in report.cases for row in case.rows):
        first.append(NO_MODEL)
    return [*first, *report.notes]


def _case_data(case: Case) -> dict[str, Any]:
    ranked = ranking(case)
    rows = [
        {
            **{name: _plain(value) for name, value in asdict(row).items()},
            "rank": ranked.index(row) + 1 if row in ranked else None,
            "ratio_to_sdpa": _plain(ratio(row, case, SDPA)),
            "ratio_to_cudnn": _plain(ratio(row, case, CUDNN)),
            "result": result(row, case),
        }
        for row in case.rows
    ]
    facts = {"name": case.name, "hidden": case.hidden, "input_sets": case.input_sets, "checked_rows": case.checked_rows}
    preset = None if case.preset is None else asdict(case.preset)
    return {**facts, "request": case.request._asdict(), "preset": preset, "rows": rows}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
