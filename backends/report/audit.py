"""The audit of a run: for each role the backend that was asked for, those that ran, and the reasons of differences.

It reads only the run report, so it also finds a fallback without a recorded reason: a defect of this package, for which
a strict run ends with an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import RECOMMENDED
from ..config.layers import resolve
from ..config.names import AUTO, AUTOTUNE
from ..values.counted import counted
from ..values.reasons import Reason

if TYPE_CHECKING:
    from . import Row, RunReport

AS_ASKED = "as asked"
EXPLAINED = "explained"
UNEXPLAINED = "unexplained"
NOT_FOR_IT = "not for this role"
"""The backend was asked for in all roles, and is for no calls of this one."""
NEVER_CALLED = "role never called"
NOT_REACHED = "not reached"
BY_ANOTHER = "by another"
"""The backend of a row whose calls another pack computed."""


class UnexplainedError(RuntimeError):
    """Strict, and another backend ran without a recorded reason."""


@dataclass(frozen=True)
class Finding:
    """The finding of one role and one source."""

    role: str
    asked: str
    """The backend's id, or `auto`."""
    source: str
    ran: Mapping[str, int]
    """Backend -> calls."""
    reasons: tuple[str, ...]
    """Reasons of fallbacks, each once."""
    verdict: str
    """`as asked`, `not for this role`, `explained`, `unexplained`, `role never called`; `not reached`: no evidence in
    the run."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "role": self.role,
            "asked": self.asked,
            "source": self.source,
            "ran": dict(self.ran),
            "reasons": list(self.reasons),
            "verdict": self.verdict,
        }


def fell_back(row: Mapping[str, Any]) -> bool:
    """Whether a row, as in `RunReport.as_dict`, ran something else than was asked for, by a decision of ours.

    Not where the backend that was asked for in all roles is for no calls of this one.
    """
    return bool(row["reason"]) and row["backend"] != BY_ANOTHER and not row.get("expected")


def asked_and_ran(run_report: RunReport) -> tuple[Finding, ...]:
    """The findings of a run: each role and source with calls, then configured roles without."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in run_report.rows.values():
        if row.calls:
            groups.setdefault((row.role, *_asked(run_report, row)), []).append(row)
    findings = [_finding(role, asked, source, rows) for (role, asked, source), rows in groups.items()]
    called = {role for role, _, _ in groups}
    findings += [
        _elsewhere(run_report, role)
        for role in run_report.categories
        if role not in called and _names(run_report, role)
    ]
    return (*findings, *_never_called(run_report))


def unexplained(findings: Iterable[Finding]) -> str | None:
    """The text of an error about differences without a reason; None without any."""
    bad = [finding for finding in findings if finding.verdict == UNEXPLAINED]
    if not bad:
        return None
    lines = ["another attention backend ran than the one that was asked for, and nothing says why"]
    lines += [f"  role {f.role}: asked for {f.asked} via {f.source}; ran {_counted(f.ran)}" for f in bad]
    lines.append("  what to do: report this with the attention report of the run, or switch strict off")
    return "\n".join(lines)


def merged(audits: Iterable[Iterable[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Merge the audits of several stages, as plain data: calls are summed, the worst verdict is kept.

    `role never called` is dropped for roles that another stage called.
    """
    worst = (NEVER_CALLED, NOT_REACHED, AS_ASKED, NOT_FOR_IT, EXPLAINED, UNEXPLAINED)
    total: dict[tuple[str, str], dict[str, Any]] = {}
    for finding in (finding for audit in audits for finding in audit):
        key = finding["role"], finding["asked"]
        mine = total.setdefault(key, {**finding, "ran": {}, "reasons": []})
        for backend, calls in finding["ran"].items():
            mine["ran"][backend] = mine["ran"].get(backend, 0) + calls
        mine["verdict"] = max(mine["verdict"], finding["verdict"], key=worst.index)
        mine["reasons"].append((finding["verdict"], finding["reasons"]))
    for mine in total.values():
        worst_reasons = [
            reason for verdict, reasons in mine["reasons"] if verdict == mine["verdict"] for reason in reasons
        ]
        mine["reasons"] = list(dict.fromkeys(worst_reasons))
    return list(total.values())


def line(audit: Iterable[Mapping[str, Any]]) -> str:
    """One line, e.g. `Asked and ran: self=cudnn_attn as asked; cross=sage_attn -> torch_sdpa (head_dim 160 > 128)`."""
    return "Asked and ran: " + ("; ".join(_part(finding) for finding in audit) or "nothing")


def _asked(run_report: RunReport, row: Row) -> tuple[str, str]:
    """(asked, source) of a row's calls: from the row, else from the configuration."""
    if row.asked == AUTOTUNE:  # the source ends with autotune's result, which changes during a run
        return AUTOTUNE, row.source.partition(f": {AUTOTUNE}")[0]
    if row.asked is not None:
        return row.asked, row.source
    if row.source.startswith(RECOMMENDED):  # `auto`, exact only, replaces the default
        return AUTO, row.source
    choice = resolve(run_report.layers, row.role, run_report.categories.get(row.role, row.role))
    return (choice.asked, choice.source) if choice.asked is not None else (AUTO, row.source)


def _finding(role: str, asked: str, source: str, rows: list[Row]) -> Finding:
    ran: dict[str, int] = {}
    for row in rows:
        ran[row.backend] = ran.get(row.backend, 0) + row.calls
    other = [row for row in rows if row.by_another or (asked not in (AUTO, AUTOTUNE) and row.backend != asked)]
    reasons = tuple(dict.fromkeys(row.reason for row in other if row.reason))
    verdict = AS_ASKED if not other else EXPLAINED if all(row.reason for row in other) else UNEXPLAINED
    if other and all(row.expected for row in other):
        verdict = NOT_FOR_IT
    return Finding(role, asked, source, ran, reasons, verdict)


def _names(run_report: RunReport, role: str) -> bool:
    return resolve(run_report.layers, role, run_report.categories[role]).asked is not None


def _elsewhere(run_report: RunReport, role: str) -> Finding:
    """The finding of a role whose calls all were computed by another pack."""
    choice = resolve(run_report.layers, role, run_report.categories[role])
    if (why := _why_not_reached(run_report)) is not None:
        return Finding(role, choice.asked or AUTO, choice.source, {}, (why,), NOT_REACHED)
    notes = tuple(note for note in run_report.notes if f"role {role} " in note)
    return Finding(role, choice.asked or AUTO, choice.source, {}, notes, EXPLAINED if notes else UNEXPLAINED)


def _why_not_reached(run_report: RunReport) -> str | None:
    """Why a role without calls is `not reached`; None for a whole run with known calls."""
    if run_report.stopped is not None:
        return run_report.stopped.text or Reason("runs_on")
    return run_report.unused or None


def unseen(run_report: RunReport) -> str:
    """Text about other packs that ran in a compiled model and may have computed attention; empty if none."""
    if not run_report.unseen:
        return ""
    return f"{' and '.join(run_report.unseen)} ran in the compiled model and may have computed attention by itself"


def _never_called(run_report: RunReport) -> list[Finding]:
    """Findings of configured roles that no call had, by name or category."""
    why = _why_not_reached(run_report) or unseen(run_report) or None
    known = {row.role for row in run_report.rows.values() if row.calls}
    known.update(run_report.categories, run_report.categories.values())
    names = ", ".join(sorted(run_report.categories)) or "none"
    findings = {}
    for layer in run_report.layers:
        covered = known | {layer.parent_of(name) for name in known}
        for role, spec in layer.per_role.items():
            if role in covered or spec.is_auto or role in findings:
                continue
            reason = Reason("called.never", role=role, roles=names)
            if role == "self" and "joint" in known:
                reason = Reason("called.never.joint", reason=reason)
            source = f"{layer.source}.per_role[{role!r}]"
            verdict = NEVER_CALLED if why is None else NOT_REACHED
            findings[role] = Finding(role, spec.backend, source, {}, (why or reason,), verdict)
    return list(findings.values())


def _part(finding: Mapping[str, Any]) -> str:
    asked, ran, reasons = finding["asked"], finding["ran"], finding["reasons"]
    head = f"{finding['role']}={asked}"
    if finding["verdict"] == NEVER_CALLED:
        return f"{head} never called"
    if finding["verdict"] == NOT_REACHED:
        return f"{head} not reached" + (f" ({'; '.join(reasons)})" if reasons else "")
    if finding["verdict"] == AS_ASKED:
        return f"{head} -> {_counted(ran)}" if asked in (AUTO, AUTOTUNE) else f"{head} as asked"
    others = {backend: calls for backend, calls in ran.items() if backend != asked}
    shown = _counted(ran if len(ran) > len(others) else others) or "elsewhere"
    why = "; ".join(reason.removeprefix(f"{asked}: ") for reason in reasons)
    return f"{head} -> {shown} ({why or 'no reason recorded'})"


def _counted(ran: Mapping[str, int]) -> str:
    """Backends as text, with calls if there are several."""
    if len(ran) == 1:
        return next(iter(ran))
    return ", ".join(f"{backend} {counted(calls, 'call')}" for backend, calls in ran.items())
