"""Counts of the kinds of call that autotune decided, is trying, or did not tune, for the run report."""

from __future__ import annotations

from ..measure.call_key import TuningKey
from ..values.reasons import Reason

OPEN, DECIDED = "tuning", "decided"
"""States: under trial; decided in this run."""
FROM_STORE = "store"
NOT_TUNED = "not tuned"
"""State: under a millisecond, or only one backend can run it."""


class Tuning:
    """Kinds of call with their states."""

    def __init__(self) -> None:
        self.kinds: dict[TuningKey, str] = {}

    def as_dict(self) -> dict[str, object]:
        """Plain data; `state`: None without `autotune`, `tuning` during trials, else `measured`."""
        states = list(self.kinds.values())
        tried = states.count(OPEN) + states.count(DECIDED)
        return {
            "state": None if not states else "tuning" if tried else "measured",
            "kinds": len(states),
            "open": states.count(OPEN),
            "decided": states.count(DECIDED),
            "from_store": states.count(FROM_STORE),
            "not_tuned": states.count(NOT_TUNED),
        }

    def note(self) -> str | None:
        """The run report's note about trials; None without any."""
        states = list(self.kinds.values())
        tried = states.count(OPEN) + states.count(DECIDED)
        return Reason("autotune.tuned", count=tried) if tried else None
