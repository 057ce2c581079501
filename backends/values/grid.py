"""`TokenGrid`: how the tokens of a call lie in frames, height and width, and `Progress`: where in a run a call is made.

A host states them; sparse methods need them. Without torch.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

QUERIES_ONLY = "/queries"
NONE = "0x0x0"


class TokenGrid(NamedTuple):
    """Frames x height x width of the tokens of one sample, in this order, with other tokens before and after."""

    frames: int
    height: int
    width: int
    before: int = 0
    """Tokens before the grid, such as a prompt."""
    after: int = 0
    """Tokens after the grid."""
    queries_only: bool = False
    """The keys are other tokens, as in cross-attention."""
    hidden_before: int = 0
    """Tokens before the grid that are hidden, and are not among the keys."""

    @property
    def cells(self) -> int:
        """Tokens on the grid."""
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        """All tokens of a sample."""
        return self.before + self.cells + self.after

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    def describe(self) -> str:
        """In one word, e.g. 21x30x52, or 512-100+21x30x52+77 with other tokens before and after, 100 of them hidden."""
        text = "x".join(map(str, self.shape))
        if self.before:
            hidden = f"-{self.hidden_before}" if self.hidden_before else ""
            text = f"{self.before}{hidden}+{text}"
        if self.after:
            text = f"{text}+{self.after}"
        return text + QUERIES_ONLY if self.queries_only else text


OFF_GRID = TokenGrid(0, 0, 0)
"""Of calls whose tokens lie on no grid, such as those of sound or text alone; None: nothing is known of them."""


def parse_grid(text: str) -> TokenGrid:
    """Parse what `TokenGrid.describe` gives.

    Raises:
        ValueError: it is no grid; the message says what is expected.
    """
    if text == NONE:
        return OFF_GRID
    parts = text.removesuffix(QUERIES_ONLY).split("+")
    at = next((index for index, part in enumerate(parts) if "x" in part), -1)
    try:
        if at < 0 or at > 1 or len(parts) > at + 2:
            raise ValueError
        frames, height, width = map(int, parts[at].split("x"))
        before, _, hidden = parts[0].partition("-") if at else ("0", "", "")
        others = int(before), int(parts[at + 1]) if len(parts) > at + 1 else 0
        hidden_before = int(hidden or 0)
        if min(frames, height, width) < 1 or min(*others, hidden_before) < 0 or hidden_before > others[0]:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"grid {text[:80]!r} is not FRAMESxHEIGHTxWIDTH, such as 21x30x52; other tokens before and after are added "
            "as in 512+21x30x52+77"
        ) from None
    return TokenGrid(frames, height, width, *others, text.endswith(QUERIES_ONLY), hidden_before)


class Place(NamedTuple):
    """Where in a model a call is made."""

    role: str = "self"
    category: str = "self"
    block: str = ""


@dataclass(slots=True)
class Kept:
    """How much of their work sparse calls computed, of one row of a run report."""

    calls: int = 0
    """Calls that a method selected blocks for."""
    dense: dict[str, int] = field(default_factory=dict)
    """Reason -> calls that were computed whole."""
    total: Any = 0.0
    """Sum of the kept fractions of these calls: a number, or a tensor on their device until it is read."""
    executors: dict[str, int] = field(default_factory=dict)
    """What computed these calls -> how many."""
    read_back: int = 0
    """Of them, those that waited to read from their device."""

    def add(self, share: Any, executor: str, read_back: bool = False) -> None:
        """Count a call with the share of query-key pairs that it computed: a number, or a tensor on its device."""
        self.calls += 1
        self.read_back += read_back
        device = getattr(self.total, "device", None)
        if device is not None and getattr(share, "device", device) != device:  # cards of one run share a row
            share = share.to(device)
        self.total = self.total + share
        self.executors[executor] = self.executors.get(executor, 0) + 1

    def add_dense(self, reason: str) -> None:
        """Count a call that was computed whole."""
        self.dense[reason] = self.dense.get(reason, 0) + 1

    def add_up(self, more: Kept) -> None:
        """Add the calls of another one, of any device; it may wait for the device."""
        self.calls += more.calls
        self.read_back += more.read_back
        self.total = float(self.total) + float(more.total)
        for mine, others in ((self.dense, more.dense), (self.executors, more.executors)):
            for name, count in others.items():
                mine[name] = mine.get(name, 0) + count

    @property
    def fraction(self) -> float | None:
        """Mean kept fraction of the calls with a map; None without any. It may wait for the device."""
        return float(self.total) / self.calls if self.calls else None

    def as_dict(self) -> dict[str, object]:
        """For the run report: the mean kept fraction, calls by executor, calls computed whole by reason, and calls that
        waited for their device.
        """
        fraction = self.fraction
        kept = None if fraction is None else round(fraction, 4)
        return {
            "kept": kept, "dense": dict(self.dense), "executors": dict(self.executors), "read_back": self.read_back,
        }  # fmt: skip


@dataclass(slots=True)
class Progress:
    """Where in a run the current model call is. A host changes it before each model call; kernels read it."""

    step: int | None = None
    """Of the whole schedule, from 0; None outside a sampler."""
    steps: int | None = None
    """Steps of the whole schedule."""
    sigma: float | None = None
    blocks: tuple[str, ...] = ()
    """The blocks of the model, in its order."""
    samples: tuple[Hashable, ...] = ()
    """Identity of each sample of the batch, the same in every step: its conditioning and its context window."""
    calls: int = 0
    """Model calls of this run so far."""
    kept: dict[Hashable, object] = field(default_factory=dict)
    """What methods keep between steps, by their own keys; the host clears it when the run ends."""
