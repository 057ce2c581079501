"""Schedule entries: another backend for some steps, sigmas or blocks of a run, above the roles.

A `ScheduleEntry` is what a person writes; `Timetable` (`timetable.py`) resolves the entries of a run for its sigmas and
blocks. The step of a model call comes from the host, else from its sigma; model calls are not counted, so they may be
skipped, doubled or resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..values.errors import ConfigError
from . import CATEGORY_PARENT, LONGEST_ROLE, AttentionConfig, AttentionSpec
from .layers import advisories_of
from .windows import Numbers, Span, parse_flag, parse_numbers, parse_percent, parse_sigmas

ROUNDING = 1e-4
"""Relative difference up to which two sigmas are equal: samplers compute in float32."""

OUTSIDE_A_SAMPLER = "a schedule over steps, percent or sigmas has no effect here: no sampler of ComfyUI runs"

TIMES = ("steps", "percent", "sigmas")
"""Units of time windows; an entry has at most one of them."""


@dataclass(frozen=True)
class ScheduleEntry:
    """A backend, and where it applies: steps, percent or sigmas; blocks; role; masks. Unset: everywhere.

    Windows are given as text and stored parsed. `role` matches a role's name or category.

    Raises:
        ConfigError: a window is malformed, or there are two time windows.
    """

    spec: AttentionSpec
    steps: tuple[Numbers, ...] = ()
    percent: tuple[Span, ...] = ()
    sigmas: tuple[Span, ...] = ()
    blocks: tuple[Numbers, ...] = ()
    role: str = ""
    masked: bool = False
    """Only calls with a mask that hides or weighs keys, even if they are trimmed before the kernel runs."""

    def __post_init__(self) -> None:
        readers: Mapping[str, Callable[[object], object]] = {
            "steps": lambda value: parse_numbers(value, "steps"),
            "percent": parse_percent,
            "sigmas": parse_sigmas,
            "blocks": lambda value: parse_numbers(value, "blocks"),
        }
        for name, read in readers.items():
            value = getattr(self, name)
            if not (isinstance(value, tuple) and all(isinstance(part, (Numbers, Span)) for part in value)):
                object.__setattr__(self, name, read(value))
        if isinstance(self.spec, str):
            object.__setattr__(self, "spec", AttentionSpec(self.spec))
        if not isinstance(self.role, str):
            raise ConfigError(f"role must be text, not {self.role!r}")
        if len(self.role) > LONGEST_ROLE:
            raise ConfigError(f"role {self.role!r}: {len(self.role)} characters > {LONGEST_ROLE}")
        object.__setattr__(self, "role", self.role.strip())
        object.__setattr__(self, "masked", parse_flag(self.masked, "masked"))
        times = [name for name in TIMES if getattr(self, name)]
        if len(times) > 1:
            raise ConfigError(f"{' and '.join(times)} in one entry; give one of them, and another entry for the other")
        if not times and not self.blocks and not self.role and not self.masked:
            raise ConfigError(
                "an entry of a schedule says where it holds: steps, percent, sigmas, blocks, role or masked"
            )

    def windows(self) -> dict[str, str]:
        """The windows as text; reading it gives the same entry."""
        texts = {name: ",".join(map(str, getattr(self, name))) for name in (*TIMES, "blocks")}
        texts |= {"role": self.role, "masked": "true" if self.masked else ""}
        return {name: text for name, text in texts.items() if text}

    def describe(self) -> str:
        """Where it applies, in one line."""
        parts = (f"{name} {text}" for name, text in self.windows().items() if name != "masked")
        return ", ".join([*parts, "masked calls"] if self.masked else parts)

    def takes(self, role: str, category: str, parent_of: Callable[[str], str | None] = CATEGORY_PARENT.get) -> bool:
        """Whether it applies to this role; `parent_of`: of its configuration."""
        parent: str | None = category
        while self.role and parent and self.role not in (role, parent):
            parent = parent_of(parent)
        return not self.role or bool(parent)


def step_of(sigma: float, schedule: Sequence[float]) -> int:
    """The step of a model call, from 0, by its sigma: the last of the sampler's sigmas not below it, within 1e-4."""
    bound = sigma * (1 - ROUNDING)
    return max((i for i, value in enumerate(schedule) if value >= bound), default=0)


def is_scheduled(layers: tuple[AttentionConfig, ...]) -> bool:
    """Whether a choice can depend on more than the role."""
    return any(layer.schedule for layer in layers) or bool(advisories_of(layers))
