"""The account of one run: what ran for each role and block, how often, how long, and why not something else."""

from __future__ import annotations

from dataclasses import dataclass, field

from .audit import asked_and_ran
from .config import AttentionConfig
from .guard_findings import Findings, worst_first
from .timeline import Timeline


@dataclass(slots=True)
class Row:
    """Calls of one role in one block that took the same path. The counters are written by `session.py`."""

    role: str
    block: str
    backend: str
    source: str
    mask: str
    """The kind of mask, and how it was honoured: `none`; `bool`, passed on; `key_padding, trimmed`; and so on."""
    reason: str | None = None
    """Why this backend ran instead of the one that was asked for; None when it was the one."""
    asked: str | None = None
    member: str | None = None
    """Which kernel of a family ran; None where the backend is one kernel."""
    calls: int = 0
    nanoseconds: int = 0
    """Wall time on the host. Meaningful on the CPU; on an accelerator calls return before the work is done."""
    guard: Findings | None = None
    """What the guard found; None where it looked at no call."""


@dataclass
class Trace:
    """Rows and notes of one run."""

    model: str = ""
    device: str = "cpu"
    steps: int = 0
    seconds: float | None = None
    """From the first model call to the end of the run, the device synchronised; loading and decoding left out."""
    bypass: str = ""
    """Attention of this model family that never reaches the hook, so that nothing here can count it."""
    rows: dict[tuple[str, str, str, str, str | None, str], Row] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    """What else a person should know, each with how often it happened."""
    layers: tuple[AttentionConfig, ...] = ()
    """The configurations that held for the whole of it, highest first; empty where they changed."""
    categories: dict[str, str] = field(default_factory=dict)
    """The category of each role that was called, whoever computed it."""
    timeline: Timeline = field(default_factory=Timeline)

    def row(
        self, role: str, block: str, backend: str, source: str, mask: str, reason: str | None, asked: str | None
    ) -> Row:
        """The row for this path, made when it is new."""
        key = (role, block, backend, mask, reason, source)
        row = self.rows.get(key)
        if row is None:
            row = self.rows[key] = Row(role, block, backend, source, mask, reason, asked)
        return row

    def note(self, text: str) -> bool:
        """Count a note; True when it is new, so that the caller can log it once."""
        self.notes[text] = self.notes.get(text, 0) + 1
        return self.notes[text] == 1

    def end_of_model_call(self) -> None:
        """Note in the timeline what was counted since the last model call."""
        self.timeline.end_of_model_call(list(self.rows.values()), self.device == "cpu")

    def windows(self) -> list[dict[str, object]]:
        """The timeline as plain data; see `Timeline.as_list`."""
        return self.timeline.as_list(list(self.rows.values()), self.device == "cpu")

    @property
    def calls(self) -> int:
        """Attention calls that were routed."""
        return sum(row.calls for row in self.rows.values())

    def as_dict(self) -> dict[str, object]:
        """The run as plain data. `ms` is None on devices whose calls return before the work is done."""
        timed = self.device == "cpu"
        rows = [
            {
                "role": row.role,
                "block": row.block,
                "backend": row.backend,
                "member": row.member,
                "calls": row.calls,
                "ms": round(row.nanoseconds / 1e6, 3) if timed else None,
                "mask": row.mask,
                "asked": row.asked,
                "source": row.source,
                "reason": row.reason,
            }
            for row in self.rows.values()
            if row.calls
        ]
        notes = [text if count == 1 else f"{text} ({count} times)" for text, count in self.notes.items()]
        return {
            "model": self.model,
            "device": self.device,
            "steps": self.steps,
            "seconds": self.seconds,
            "bypass": self.bypass,
            "rows": rows,
            "guard": worst_first(self.rows.values()),
            "audit": [finding.as_dict() for finding in asked_and_ran(self)],
            "notes": notes,
        }

    def summary(self) -> str:
        """One line: each role with its backends and calls, then how many calls fell back."""
        totals: dict[tuple[str, str], int] = {}
        fallbacks = 0
        for row in self.rows.values():
            if row.calls:
                totals[row.role, row.backend] = totals.get((row.role, row.backend), 0) + row.calls
                fallbacks += row.calls if row.reason else 0
        parts = [f"{role} {backend} {calls} calls" for (role, backend), calls in totals.items()]
        return ", ".join(parts or ["no attention call reached us"]) + (f"; {fallbacks} fallbacks" if fallbacks else "")
