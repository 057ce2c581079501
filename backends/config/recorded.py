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
from itertools import chain
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
    """For calls of other lengths: by block and `TuningKey`, which has lengths in buckets. Batch 0: any batch."""
    card: str = ""
    """The device, where the host divided the model calls over several; else empty."""
    others: Mapping[str, RecordedRun] = field(default_factory=dict)
    """What ran on the other devices, by their names; in the run of the first one alone."""

    @property
    def by_card(self) -> dict[str, RecordedRun]:
        """What ran on each device, the first one's first; empty where there was one."""
        return {self.card: self, **self.others} if self.others else {}

    def part(self, model_call: int) -> int:
        """The number of the part of the run that a model call is in."""
        return bisect_right(self.starts, model_call)

    def choice(
        self, role: str, block: str, request: AttentionRequest, model_call: int, card: str = ""
    ) -> Choice | None:
        """The choice for a call with these facts; None if the record does not have it.

        Args:
            card: the device, where the host divides model calls over several. A record of one device is then searched
                for calls of any batch, and so the reverse: prompts that one device batches are divided.
        """
        request, key = normal(request), key_of(role, request)
        timeline = self.exact.get((role, block, request)) or self.near.get((block, key))
        if timeline is None and bool(card) != bool(self.card):
            timeline = self.near.get((block, key._replace(batch=0)))
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

    def run_of(self, node_id: str, card: str = "") -> RecordedRun:
        """The run that a sampler repeats: of the node with its id, else by the component's number.

        `transformer` is the first run, `transformer_2` the second. `card`: the device, where the host divides model
        calls over several; one that the record does not have repeats what ran on the first.
        """
        own = [run for run in self.runs if node_id and run.node_id == node_id]
        found = own[0] if own else self.runs[min(self._index, len(self.runs) - 1)]
        return found.others.get(card, found)

    def backends(self) -> set[str]:
        """Every backend that ran."""
        runs = chain.from_iterable((run, *run.others.values()) for run in self.runs)
        choices = (choice for run in runs for timeline in run.timelines for choice in timeline.choices)
        return {choice.asked for choice in choices if choice.asked is not None}

    @property
    def _index(self) -> int:
        number = re.search(r"_(\d{1,3})$", self.component)
        return max(int(number[1]) - 1, 0) if number else 0

    def remarks(self, node_id: str, platform: Platform, card: str = "") -> list[str]:
        """Notes before this sampler runs here: another node, other versions, events that are not repeated.

        `card`: as in `run_of`.
        """
        run = self.run_of(node_id, card)
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

    def after(self, node_id: str, model_calls: int, by_card: Mapping[str, int] | None = None) -> list[str]:
        """Notes after a whole run: other devices, or another number of model calls.

        Args:
            model_calls: of the first device.
            by_card: model calls of each device, the first one's first, where the host divided them over several.
        """
        run, made = self.run_of(node_id), by_card or {}
        if run.by_card.keys() != made.keys():
            return [_other_cards(run, tuple(made))]
        notes = []
        for card, number in (made or {"": model_calls}).items():
            on = self.run_of(node_id, card)
            if on.model_calls != number:
                where = f"{card}: " if card else ""
                moved = ", and changes of kernel in the middle of it are at other places" if on.starts else ""
                both = f"the record is of {on.model_calls} model calls, and this run made {number}"
                notes.append(f"{where}{both}: other steps or another sampler{moved}")
        return notes


def _other_cards(run: RecordedRun, now: tuple[str, ...]) -> str:
    """The note about a run on other devices than the recorded one; `now`: its devices, empty for one."""
    then = ", ".join(run.by_card)
    if not then:
        return f"the record is of a run on one GPU, and this run was divided over {', '.join(now)}: each repeated it"
    other = any(_kernels(one) != _kernels(run) for one in run.others.values())
    kernels = ", where other kernels ran than on the others" if other else ""
    if not now:
        repeated = f"this run was on one GPU: it repeated what ran on {run.card}{kernels}"
    else:
        repeated = f"this run over {', '.join(now)}: each without a record repeated what ran on {run.card}{kernels}"
    return f"the record is of a run that was divided over {then}, and {repeated}"


def _kernels(run: RecordedRun) -> set[tuple[str, TuningKey, tuple[tuple[str | None, str], ...]]]:
    """Each kind of call, of any batch, with what ran it."""
    return {
        (block, key, tuple((choice.asked, repr(sorted(choice.extra.items()))) for choice in timeline.choices))
        for (block, key), timeline in run.near.items()
        if not key.batch
    }


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
