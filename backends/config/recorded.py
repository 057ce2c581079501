"""A record of a run, as part of a configuration: the kernels that ran become choices.

Precedence: a record beats the default, and loses to roles and windows of later nodes. Calls that it does not have are
resolved without it, and the run report notes that.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..kernels import BACKENDS
from ..measure.call_key import TuningKey, key_of
from ..measure.environment import machine_of, own_version
from ..values.request import AttentionRequest
from .layers import Choice

if TYPE_CHECKING:
    from ..values.platform import Platform

MARK = "attention_backends_record"
"""The entry that marks a mapping as a record; its value is the format."""
FORMAT = 1


def normal(request: AttentionRequest) -> AttentionRequest:
    """The request with `num_kv_heads` and `v_head_dim` filled in where they are 0."""
    return request._replace(
        num_kv_heads=request.num_kv_heads or request.num_heads, v_head_dim=request.v_head_dim or request.head_dim
    )


class ChoiceTimeline:
    """The choices for one kind of call over a run, each with its first model call."""

    def __init__(self, starts: tuple[int, ...], choices: tuple[Choice, ...]) -> None:
        self.starts = starts
        self.choices = choices

    def changes(self) -> set[int]:
        """Model calls at which the choice changes."""
        pairs = zip(self.choices, self.choices[1:], self.starts[1:], strict=False)
        return {start for before, after, start in pairs if before != after}

    def at(self, model_call: int) -> Choice:
        """The choice at a model call."""
        return self.choices[max(bisect_right(self.starts, model_call) - 1, 0)]


@dataclass(frozen=True)
class RecordedRun:
    node_id: str
    model: str
    model_calls: int
    machine: Mapping[str, Any]
    not_repeated: tuple[str, ...]
    starts: tuple[int, ...]
    """Model calls at which any choice changes, in rising order: the starts of the run's segments."""
    exact: Mapping[tuple[str, str, AttentionRequest], ChoiceTimeline]
    timelines: tuple[ChoiceTimeline, ...]
    """One per decision of the record, in its order."""
    near: Mapping[tuple[str, TuningKey], ChoiceTimeline]
    """For calls of other lengths: by block and `TuningKey`, which has lengths in buckets."""

    def part(self, model_call: int) -> int:
        """The number of the part of the run that a model call is in."""
        return bisect_right(self.starts, model_call)

    def choice(self, role: str, block: str, request: AttentionRequest, model_call: int) -> Choice | None:
        """The choice for a call with these facts; None if the record does not have it."""
        request = normal(request)
        timeline = self.exact.get((role, block, request)) or self.near.get((block, key_of(role, request)))
        return None if timeline is None else timeline.at(model_call)


@dataclass(frozen=True)
class Recorded:
    """A record as part of a configuration."""

    text: str
    """As JSON; compared for equality."""
    source: str
    component: str
    runs: tuple[RecordedRun, ...] = field(compare=False)

    @property
    def data(self) -> dict[str, Any]:
        """The record as plain data."""
        data: dict[str, Any] = json.loads(self.text)
        return data

    def run_of(self, node_id: str) -> RecordedRun:
        """The run that a sampler repeats: of the node with its id, else by the component's number.

        `transformer` is the first run, `transformer_2` the second.
        """
        own = [run for run in self.runs if node_id and run.node_id == node_id]
        return own[0] if own else self.runs[min(self._index, len(self.runs) - 1)]

    def backends(self) -> set[str]:
        """Every backend that ran."""
        choices = (choice for run in self.runs for timeline in run.timelines for choice in timeline.choices)
        return {choice.asked for choice in choices if choice.asked is not None}

    @property
    def _index(self) -> int:
        number = re.search(r"_(\d{1,3})$", self.component)
        return max(int(number[1]) - 1, 0) if number else 0

    def remarks(self, node_id: str, platform: Platform) -> list[str]:
        """Notes before this sampler runs here: another node, other versions, events that are not repeated."""
        run = self.run_of(node_id)
        notes = []
        if len(self.runs) > 1 and run.node_id != node_id:
            notes.append(
                f"the record has {len(self.runs)} runs and none of this sampler: that of node {run.node_id or '?'} "
                f"({run.model}) is used"
            )
        elif len([other for other in self.runs if other.node_id == run.node_id]) > 1:
            notes.append(f"the record has several runs of node {run.node_id}: the first is used")
        other = differences(run.machine, platform, str(self.data["made_by"].get("attention_backends", "")))
        if other:
            notes.append(f"the same seed may give another picture: {'; '.join(other)}")
        return notes + [f"the record does not repeat everything: {text}" for text in run.not_repeated]

    def after(self, node_id: str, model_calls: int) -> list[str]:
        """Notes after a whole run: another number of model calls."""
        run = self.run_of(node_id)
        if run.model_calls == model_calls:
            return []
        moved = ", and changes of kernel in the middle of it are at other places" if run.starts else ""
        made = f"the record is of {run.model_calls} model calls, and this run made {model_calls}"
        return [f"{made}: other steps or another sampler{moved}"]


def differences(then: Mapping[str, Any], platform: Platform, version: str = "") -> list[str]:
    """Where this machine differs from the recorded one: `torch 2.11.0 -> 2.13.0`.

    Args:
        version: ours when the record was made; empty: not compared. Nor is what the record lacks.
    """
    recorded = _flat(then)
    now = _flat(machine_of(platform, BACKENDS))
    changes = [
        f"{name} {recorded.get(name) or 'none'} -> {now.get(name) or 'none'}"
        for name in recorded
        if recorded[name] != now.get(name)
    ]
    if version and version != own_version():
        changes.append(f"attention-backends {version} -> {own_version()}")
    return changes


def _flat(machine: Mapping[str, Any]) -> dict[str, str]:
    packages = machine.get("packages") or {}
    plain = {name: str(value) for name, value in machine.items() if name != "packages"}
    return {**plain, **{str(name): str(version) for name, version in packages.items()}}
