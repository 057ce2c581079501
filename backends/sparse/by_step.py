"""What options of sparse methods mean in a step: values that change by step, and steps and layers that stay dense."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor
from typing import TYPE_CHECKING

from ..values.options import Option
from .block_map import Dense
from .layers import counted_together

if TYPE_CHECKING:
    from .method import Where

DENSE_STEPS = Option("dense_steps", int, 0, "Steps at the beginning that are computed whole.", minimum=0)
DENSE_LAYERS = Option("dense_layers", int, 0, "Layers at the beginning that are computed whole.", minimum=0)


def value_at(value: object, where: Where) -> float:
    """The value in this step; outside a sampler the last one.

    Args:
        value: a number; a list with one for each step, spread over a schedule of another length; or a mapping with
            `from` and `to`, between which it changes evenly from the share `start` of the schedule to the share `end`.
    """
    if isinstance(value, list):
        at = len(value) - 1 if where.step is None else where.step * len(value) // (where.steps or len(value))
        return float(value[min(at, len(value) - 1)])
    if isinstance(value, Mapping):
        first, last = float(value["from"]), float(value["to"])
        if where.step is None or not where.steps:
            return last
        start, end = float(value.get("start", 0)), float(value.get("end", 1))
        along = (where.step / max(where.steps - 1, 1) - start) / (end - start)
        return first + (last - first) * min(max(along, 0.0), 1.0)
    return float(str(value))


def computed_whole(where: Where, options: Mapping[str, object], *, steps: str, layers: str) -> Dense | None:
    """Whether a call lies in the first steps of this schedule, or in the first layers, that are computed whole.

    Args:
        steps, layers: a method's own names of `dense_steps` and `dense_layers`, of which the larger number counts.
    """
    for at, unit, names in (
        (where.step, "steps", ("dense_steps", steps)),
        (where.layer, "layers", ("dense_layers", layers)),
    ):
        most = max(_number(options.get(name)) for name in names)
        if at is not None and at < most:
            return Dense(f"the first {most} {unit}")
    return None


def whole_at_first(where: Where, *, steps: object, layers: object) -> Dense | None:
    """Whether a call lies in the first steps or layers that Sparse VideoGen computes whole.

    Args:
        steps, layers: a number of them, or a share up to 1, of which the whole part counts; of steps at least one.
    """
    first = _first(layers, len(counted_together(where.block, where.blocks)))
    if where.layer is not None and where.layer < first:
        return Dense(f"the first {first} layers")
    first = max(_first(steps, where.steps or 0), 1 if steps else 0)  # as other published dense steps in short runs
    if where.step is not None and where.step < first:
        return Dense(f"the first {first} steps")
    return None


def _first(value: object, of: int) -> int:
    """Of a number, or of a share up to 1 of so many."""
    number = float(str(value))
    return floor(number * of + 1e-9) if number <= 1 else int(number)


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
