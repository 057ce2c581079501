"""The record of a run as plain data for a picture's metadata, so that a later run can use the same kernels.

For each kind of call and block it has the kernel with its options, and the machine; no paths, and nothing of the graph.
`run_recorder.py` collects it, `config/recorded.py` reads it as a configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from ...config.layers import settings_of
from ...config.recorded import FORMAT, MARK, normal
from ...measure.environment import machine_of, own_version
from ...report.kept import of_rows
from ...values.request import AttentionRequest
from .run_recorder import KernelUsed, RunRecorder

if TYPE_CHECKING:
    from ...report import RunReport

_NUMBERED = re.compile(r"(.*?)(0|[1-9]\d{0,5})")


def of_run(run_report: RunReport) -> dict[str, Any] | None:
    """One sampling run as plain data; None if it was not recorded.

    Where the host divided the model calls over several devices, `card` is the first one, and `cards` has what ran on
    each of the others, in the same form.
    """
    recorder = run_report.recorder
    if not isinstance(recorder, RunRecorder):
        return None
    decisions = _decisions(recorder)
    used = {ran["backend"] for decision in decisions for ran in decision["ran"]}
    sparse = any(row.kept for row in run_report.rows.values())
    kept = of_rows(run_report.own_rows()) if sparse else []
    alarms = [row.guard for row in run_report.rows.values() if row.guard is not None and row.guard.alarms]
    return {
        "node_id": run_report.node_id,
        "model": run_report.model,
        "steps": run_report.steps,
        "model_calls": run_report.timeline.model_calls,
        "machine": machine_of(next(iter(recorder.platforms)), used) if recorder.platforms else {},
        "settings": settings_of(run_report.layers)._asdict(),
        "steady": not recorder.changes and not recorder.not_repeated,
        "changes": list(recorder.changes),
        "not_repeated": list(recorder.not_repeated),
        "guard_alarms": sum(findings.alarms for findings in alarms),
        "first_alarm": alarms[0].first_alarm if alarms else None,
        "decisions": decisions,
        **({"sparse": kept} if kept else {}),  # what sparse backends kept and gained, for display only
        **({"card": run_report.card} if run_report.card else {}),
        **({"cards": [of_run(other) for other in run_report.split.values()]} if run_report.split else {}),
    }


def as_record(
    runs: Iterable[Mapping[str, Any]],
    made_by: Mapping[str, str],
    not_recorded: Sequence[Mapping[str, str]] = (),
    before: object = None,
) -> dict[str, Any]:
    """The record of these runs, oldest first.

    Args:
        made_by: programs and their versions.
        not_recorded: samplers whose decisions are unknown, each with a reason.
        before: the record already in the picture's metadata, from another branch of the graph.
    """
    all_runs, missing = list(runs), list(not_recorded)
    if isinstance(before, Mapping) and before.get(MARK) == FORMAT:
        earlier, earlier_missing = before.get("runs"), before.get("not_recorded")
        if _are_mappings(earlier) and _are_mappings(earlier_missing):  # else another program's entry
            all_runs = [*(run for run in earlier if run not in all_runs), *all_runs]
            missing = [*(entry for entry in earlier_missing if entry not in missing), *missing]
    return {MARK: FORMAT, "made_by": {"attention_backends": own_version(), **made_by}, "runs": all_runs,
            "not_recorded": missing}  # fmt: skip


def _are_mappings(value: object) -> TypeGuard[list[Mapping[str, Any]]]:
    return isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value)


def facts_of(request: AttentionRequest) -> dict[str, Any]:
    """A request as plain data, without default values."""
    defaults = {
        **AttentionRequest._field_defaults,
        "num_kv_heads": request.num_heads,
        "v_head_dim": request.head_dim,
    }
    facts = normal(request)._asdict()
    if request.grid is not None:
        facts["grid"] = request.grid.describe()
    return {name: value for name, value in facts.items() if name not in defaults or value != defaults[name]}


def ranges(blocks: Iterable[str]) -> list[str]:
    """Blocks with consecutive ones joined, such as `blocks.0-3`, in order of first appearance."""
    series: dict[str, list[int]] = {}
    for block in blocks:
        match = _NUMBERED.fullmatch(block)
        series.setdefault(match[1] if match else block, []).extend([int(match[2])] if match else [])
    texts = []
    for prefix, numbers in series.items():
        texts += [prefix] if not numbers else []
        rising = sorted(set(numbers))
        for first in (number for number in rising if number - 1 not in rising):
            last = next(number for number in range(first, rising[-1] + 1) if number + 1 not in rising)
            texts.append(f"{prefix}{first}" if first == last else f"{prefix}{first}-{last}")
    return texts


def _decisions(recorder: RunRecorder) -> list[dict[str, Any]]:
    """Decisions as plain data; blocks and kinds of call with equal decisions share an entry."""
    blocks: dict[tuple[str, AttentionRequest, str], list[str]] = {}
    ran_of: dict[str, tuple[tuple[int, KernelUsed], ...]] = {}
    for kind, ran in recorder.decisions():
        ran_of[repr(ran)] = ran
        blocks.setdefault((kind.role, kind.request, repr(ran)), []).append(kind.block)
    calls: dict[tuple[str, tuple[str, ...], str], list[AttentionRequest]] = {}
    for (role, request, ran_key), names in blocks.items():
        calls.setdefault((role, tuple(ranges(names)), ran_key), []).append(request)
    return [
        {
            "role": role,
            "category": recorder.categories.get(role, role),
            "blocks": list(names),
            "calls": [facts_of(request) for request in requests],
            "ran": [{"from_model_call": number, **_ran(ran)} for number, ran in ran_of[ran_key]],
        }
        for (role, names, ran_key), requests in calls.items()
    ]


def _ran(ran: KernelUsed) -> dict[str, Any]:
    optional = {
        "member": ran.member,
        "options": dict(ran.options),
        "asked": ran.asked if ran.asked != ran.backend else None,
        "reason": ran.reason,
    }
    return {
        "backend": ran.backend,
        "accuracy": ran.accuracy,
        "source": ran.source,
        **{name: value for name, value in optional.items() if value},
    }
