"""Stored outcomes of probes: kernels that were correct, wrong, or crashed on this machine.

A JSON file in the user's cache folder, read at most once per process. An outcome is valid for one environment: card,
driver, torch, package versions, interpreter and our version. Only `doctor --probe` and `doctor --forget` write it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from ..values.bounded import read_file
from ..values.fields import Fields
from ..values.plain_data import load_json
from ..values.platform import Platform
from ..values.reasons import Reason
from .environment import probe_key

log = logging.getLogger("attention_backends")

CACHE_VARIABLE = "ATTENTION_BACKENDS_CACHE"
FILE = "probes.json"
FORMAT = 1
MOST = 500
"""Outcomes kept; the oldest are dropped first."""
MOST_BYTES, MOST_VALUES = 4 << 20, 100_000
"""Limits of the file, and of the values in it."""

LASTING = ("ok", "failed", "crashed", "hung")
"""Statuses that are stored; others, such as `unavailable`, do not depend on the kernel."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one kernel on a tiny problem."""

    status: str
    """`ok`; `failed`: raised, or wrong numbers; `crashed`; `hung`; `unavailable`; `untested`: for another reason."""
    reason: str = ""
    relative_l2: float | None = None
    ms: float | None = None
    """Wall time of the first call, compilation included."""
    stderr: tuple[str, ...] = ()
    """Last lines of the process's stderr."""

    @property
    def summary(self) -> str:
        """`ok (relative L2 5.1e-04, first call 12 ms)`, `crashed (signal 11 (SIGSEGV) while running)`."""
        if self.status == "ok" and self.relative_l2 is not None and self.ms is not None:
            return f"ok (relative L2 {self.relative_l2:.1e}, first call {self.ms:.0f} ms)"
        return f"{self.status} ({self.reason})" if self.reason else self.status


def refusal(backend_id: str, platform: Platform) -> Reason | None:
    """The reason against a backend that crashed, hung or was wrong in a probe, with the remedy; else None."""
    outcome = recall(backend_id, platform)
    if outcome is None or outcome.status == "ok":
        return None
    return Reason("probe", outcome=outcome.summary, backend=backend_id)


def recall(backend_id: str, platform: Platform) -> Outcome | None:
    """The stored outcome for this environment; None for a described machine."""
    if platform.described:
        return None
    known = _outcomes(path())
    return known.get(probe_key(backend_id, platform)) if known else None


def remember(outcomes: Mapping[str, Outcome], platform: Platform) -> None:
    """Store the outcomes of these backends; only for this process if the file cannot be written."""
    file = path()
    _outcomes.cache_clear()  # other processes may have written since
    known = _outcomes(file)
    for backend_id, outcome in outcomes.items():
        if outcome.status in LASTING:
            known.pop(probe_key(backend_id, platform), None)
            known[probe_key(backend_id, platform)] = outcome
    for old in list(known)[:-MOST]:
        del known[old]
    _write(file, known)


def forget(ids: Iterable[str] = ()) -> int:
    """Delete the outcomes of these backends, or of all, in every environment; returns how many."""
    file = path()
    _outcomes.cache_clear()
    known = _outcomes(file)
    wanted = set(ids)
    gone = [entry for entry in known if not wanted or entry.split(" | ")[0] in wanted]
    for entry in gone:
        del known[entry]
    if gone:
        _write(file, known)
    return len(gone)


def path() -> Path:
    """The file; ATTENTION_BACKENDS_CACHE is its folder instead of the platform's cache folder."""
    override = os.environ.get(CACHE_VARIABLE, "").strip()
    if override:
        return Path(os.path.expanduser(override)) / FILE
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        folder = home / "Library" / "Caches"
    else:
        given = Path(os.environ.get("XDG_CACHE_HOME") or "")
        folder = given if given.is_absolute() else home / ".cache"  # XDG: ignore relative paths
    return folder / "attention-backends" / FILE


@lru_cache(maxsize=4)
def _outcomes(file: Path) -> dict[str, Outcome]:
    """The outcomes of the file; an invalid file is set aside."""
    try:
        return _parsed(read_file(file, MOST_BYTES).decode("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return _set_aside(file, error)


def _parsed(text: str) -> dict[str, Outcome]:
    data = Fields(load_json(text, "its text", most_bytes=MOST_BYTES, most_entries=MOST_VALUES))
    if data.data.get("format") != FORMAT:
        raise ValueError(f"format {data.data.get('format')!r} is not {FORMAT}")
    known = {}
    outcomes = data.inner("outcomes")
    for entry in outcomes.data:
        fields = outcomes.inner(entry)
        known[entry] = Outcome(
            fields.one_of("status", LASTING),
            fields.text("reason"),
            None if fields.data["relative_l2"] is None else fields.number("relative_l2"),
            None if fields.data["ms"] is None else fields.number("ms"),
            tuple(map(str, fields.items("stderr"))),
        )
    return known


def _set_aside(file: Path, error: Exception) -> dict[str, Outcome]:
    aside = file.with_name(f"{file.name}.damaged")
    try:
        file.replace(aside)
        now = f"it is {aside} now"
    except OSError as trouble:
        now = f"it cannot be moved away ({trouble})"
    log.warning("remembered probes in %s cannot be read (%s: %s); %s", file, type(error).__name__, error, now)
    return {}


def _write(file: Path, known: Mapping[str, Outcome]) -> None:
    """Replace the file atomically."""
    data = {"format": FORMAT, "outcomes": {entry: asdict(outcome) for entry, outcome in known.items()}}
    partial = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f"{file.name}.", dir=file.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(data, stream, indent=1)
        os.replace(partial, file)
    except OSError as error:
        log.warning("outcomes of probes are known to this process only: %s cannot be written (%s)", file, error)
        if partial is not None and os.path.exists(partial):
            os.unlink(partial)
