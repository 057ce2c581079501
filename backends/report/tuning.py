"""What became of the calls of a run for which `autotune` was asked for: a few counts for its account.

Boundary: words and numbers; who decides is `observe/autotune/tuner.py`.
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
        """`state` is None where nobody asked for `autotune`, `tuning` where this run tries, else `measured`."""
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
        """What the account says of a run that tried kernels; None of any other."""
        states = list(self.kinds.values())
        tried = states.count(OPEN) + states.count(DECIDED)
        return f"autotune: tuning ({tried} kinds of call; later runs use what was found)" if tried else None
