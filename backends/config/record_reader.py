"""Reads and validates a record: untrusted plain data to `recorded.Recorded`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..kernels import BACKENDS
from ..kernels.group import BackendGroup
from ..measure.call_key import TuningKey, key_of
from ..values.errors import ConfigError
from ..values.fields import LONGEST_TEXT, Fields
from ..values.grid import parse_grid
from ..values.plain_data import check_data
from ..values.request import DTYPES, MASK_KINDS, AttentionRequest
from . import AttentionSpec
from .layers import Choice
from .recorded import FORMAT, MARK, ChoiceTimeline, Recorded, RecordedRun, normal

FIELDS = (MARK, "made_by", "runs", "not_recorded")
MOST_BLOCKS = 10_000
"""Most blocks of one decision."""
MOST_CALLS = 50_000
"""Limit of a record, for the sums over its decisions of blocks * calls and of calls * kernels. A run of 60 blocks, 6
roles and 20 kinds of call has 7200."""
_RANGE = re.compile(r"(.*?)(0|[1-9]\d{0,5})-(0|[1-9]\d{0,5})")


def is_record(value: object) -> bool:
    """Whether it is a mapping with the entry `MARK`."""
    return isinstance(value, Mapping) and MARK in value


def read(value: Mapping[str, Any], source: str, component: str = "transformer") -> Recorded:
    """Read a record; other entries of the mapping are ignored.

    Raises:
        ConfigError: another format, or invalid; the message says where.
    """
    reader = _Reader(source)
    check_data(value, source)
    if type(value[MARK]) is not int or value[MARK] != FORMAT:
        raise ConfigError(
            f"{source}: a record of format {value[MARK]!r}, and this version reads {FORMAT}; "
            "update attention-backends, or repeat the run"
        )
    data = {name: value[name] for name in FIELDS if name in value}
    data.setdefault("not_recorded", [])
    _texts(reader.fields({"made_by": data.setdefault("made_by", {})}).inner("made_by"))
    top = reader.fields(data)
    for number, missing in enumerate(top.items("not_recorded")):
        _texts(reader.fields(missing, f"not_recorded[{number}]"))
    runs = tuple(reader.run(reader.fields(run, f"runs[{number}]")) for number, run in enumerate(top.items("runs")))
    if not runs:
        raise ConfigError(f"{source}: a record without a run: the Attention Record node found none; nothing to repeat")
    try:
        text = json.dumps(data, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: not plain data: {error}") from error
    return Recorded(text, source, component, runs)


class _Reader:
    """Reads the parts of a record; errors have the path of the field."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._calls = self._ran = 0
        """Sums over the decisions so far: blocks * calls, and calls * kernels."""

    def fields(self, value: object, where: str = "") -> Fields:
        return Fields(value, where, lambda text: ConfigError(f"{self.source}: this record is damaged: {text}"))

    def run(self, run: Fields) -> RecordedRun:
        model = run.text("model", "")
        _listed(run, "changes")
        exact: dict[tuple[str, str, AttentionRequest], ChoiceTimeline] = {}
        near: dict[tuple[str, TuningKey], ChoiceTimeline] = {}
        timelines: list[ChoiceTimeline] = []
        for number, entry in enumerate(run.items("decisions")):
            decision = self.fields(entry, f"{run.where}.decisions[{number}]")
            role = decision.text("role")
            calls, ran = decision.items("calls"), decision.items("ran")
            blocks = self.blocks(decision)
            self.count_up(sum(len(numbers) for _, numbers in blocks), len(calls), len(ran), decision)
            timeline = self.timeline(ran, decision, f"record of {model or 'a model'} ({self.source})")
            timelines.append(timeline)
            requests = [
                self.request(self.fields(call, f"{decision.where}.calls[{index}]")) for index, call in enumerate(calls)
            ]
            known = [(request, key_of(role, request)) for request in requests]
            for prefix, numbers in blocks:
                for block in (f"{prefix}{one}" for one in numbers):
                    for request, key in known:
                        exact[role, block, request] = timeline
                        near.setdefault((block, key), timeline)
                        near.setdefault((block, key._replace(batch=0)), timeline)
        for name in ("settings", "steps", "steady", "guard_alarms", "first_alarm"):  # for display only
            shown = run.data.get(name)
            _texts(run.inner(name) if isinstance(shown, Mapping) else self.fields({name: shown}, run.where))
        machine = run.inner("machine", {})
        _texts(machine, but="packages")
        if machine.data.get("packages") is not None:
            _texts(machine.inner("packages"))
        return RecordedRun(
            run.text("node_id", ""),
            model,
            run.whole("model_calls", 0),
            machine.data,
            tuple(_listed(run, "not_repeated")),
            tuple(sorted(set().union(*(timeline.changes() for timeline in timelines)))),
            exact,
            tuple(timelines),
            near,
            run.text("card", ""),
            self.others(run),
        )

    def others(self, run: Fields) -> dict[str, RecordedRun]:
        """What ran on the other devices of a run that was divided over several."""
        others: dict[str, RecordedRun] = {}
        for number, entry in enumerate(run.items("cards", [])):
            other = self.fields(entry, f"{run.where}.cards[{number}]")
            card = other.text("card", least=1)
            if card in others or card == run.data.get("card") or "cards" in other.data:
                raise other.wrong("card", f"{card!r}: expected each device once")
            others[card] = self.run(other)
        return others

    def count_up(self, blocks: int, calls: int, ran: int, decision: Fields) -> None:
        """Check `MOST_CALLS` before a decision is expanded."""
        self._calls += blocks * calls
        self._ran += ran * calls
        if max(self._calls, self._ran) > MOST_CALLS:
            raise decision.wrong("", f"blocks, calls and what ran them stand for more than {MOST_CALLS} calls")

    def timeline(self, entries: list[Any], decision: Fields, source: str) -> ChoiceTimeline:
        choices_by_start: list[tuple[int, Choice]] = []
        for index, entry in enumerate(entries):
            ran = self.fields(entry, f"{decision.where}.ran[{index}]")
            start = ran.whole("from_model_call", 1)
            if choices_by_start and start <= choices_by_start[-1][0]:
                raise ran.wrong("", f"from_model_call {start} is not after {choices_by_start[-1][0]}")
            choices_by_start.append((start, self.choice(ran, source)))
        if not choices_by_start:
            raise decision.wrong("ran", "expected what ran, and it is empty")
        starts, choices = zip(*choices_by_start, strict=True)
        return ChoiceTimeline(starts, choices)

    def choice(self, ran: Fields, source: str) -> Choice:
        name, member = ran.text("backend", least=1), ran.text("member", "")
        if isinstance(BACKENDS.get(name), BackendGroup) and member in BACKENDS:
            name = member  # the group might load another member here
        options = dict(ran.inner("options", {}).data)
        if name in BACKENDS:  # an unknown one, of a later version, falls back
            try:
                AttentionSpec(name, options)
            except ConfigError as error:
                raise ran.wrong("", str(error)) from error
        return Choice(name, source, options)

    def request(self, facts: Fields) -> AttentionRequest:
        unknown = [str(name) for name in facts.data if name not in AttentionRequest._fields]
        if unknown:
            raise facts.wrong("", f"unknown entry {', '.join(unknown)}")
        for name in ("batch", "num_heads", "q_len", "kv_len", "head_dim"):
            facts.whole(name, 1)
        for name in ("num_kv_heads", "v_head_dim"):
            facts.whole(name, 0, 0)
        for name in ("is_causal", "exact_only", "lse"):
            facts.flag(name, False)
        facts.one_of("dtype", DTYPES)
        facts.one_of("mask", MASK_KINDS, "none")
        if facts.data.get("scale") is not None:
            facts.number("scale")
        data = dict(facts.data)
        if data.get("grid") is not None:
            try:
                data["grid"] = parse_grid(facts.text("grid"))
            except ValueError as error:
                raise facts.wrong("", str(error)) from error
        return normal(AttentionRequest(**data))

    def blocks(self, decision: Fields) -> list[tuple[str, Sequence[int | str]]]:
        """(prefix, numbers) for each text of a decision's blocks, such as `blocks.0-3`; one empty pair without any."""
        pairs: list[tuple[str, Sequence[int | str]]] = []
        total = 0
        for name in _listed(decision, "blocks", required=True):
            match = _RANGE.fullmatch(name)
            prefix, numbers = (match[1], range(int(match[2]), int(match[3]) + 1)) if match else (name, ("",))
            total += len(numbers)
            if total > MOST_BLOCKS or not numbers:
                raise decision.wrong("blocks", f"{name!r}: expected at most {MOST_BLOCKS} blocks, and at least one")
            pairs.append((prefix, numbers))
        return pairs


def _texts(fields: Fields, but: str = "") -> None:
    """Check the length of texts such as versions; numbers and null are accepted."""
    for name, value in fields.data.items():
        if name != but and (not isinstance(value, str | int | float | None) or len(str(value)) > LONGEST_TEXT):
            raise fields.wrong(str(name), f"expected a text of at most {LONGEST_TEXT} characters")


def _listed(fields: Fields, name: str, required: bool = False) -> list[str]:
    texts = fields.items(name, None if required else [])
    if not all(isinstance(text, str) and len(text) <= LONGEST_TEXT for text in texts):
        raise fields.wrong(name, f"expected texts of at most {LONGEST_TEXT} characters")
    return texts
