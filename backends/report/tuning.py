"""How many kinds of call of a run autotune decided, tries or left: counts for the run report.

Boundary: text and numbers; `observe/autotune/tuner.py` decides.
"""

from __future__ import annotations

from ..measure.call_key import TuningKey

OPEN, DECIDED = "tuning", "decided"
"""Kinds of call that are tried, and those that were decided in this very run."""
FROM_STORE = "store"
NOT_TUNED = "not tuned"
"""Under a millisecond, or there is nothing to choose between."""


class Tuning:
    """Kinds of call, each with its state now."""

    def __init__(self) -> None:
        self.kinds: dict[TuningKey, str] = {}

    def as_dict(self) -> dict[str, object]:
        """`state` is None where `autotune` was not asked for, `tuning` where this run tries, else `measured`."""
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
        """The run report's note of a run that tried kernels; None for another."""
        states = list(self.kinds.values())
        tried = states.count(OPEN) + states.count(DECIDED)
        return f"autotune: tuning ({tried} kinds of call; later runs use what was found)" if tried else None
