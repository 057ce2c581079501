"""Reading a record: from plain data, which may come from anywhere, to what `recorded.py` asks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..kernels import BACKENDS
from ..kernels.group import BackendGroup
from ..measure.call_key import TuningKey, key_of
from ..values.data import check_data
from ..values.errors import ConfigError
from ..values.fields import LONGEST_TEXT, Fields
from ..values.request import DTYPES, MASK_KINDS, AttentionRequest
from . import AttentionSpec
from .layers import Choice
from .recorded import FORMAT, MARK, ChoiceTimeline, Recorded, RecordedRun, normal

FIELDS = (MARK, "made_by", "runs", "not_recorded")
MOST_BLOCKS = 10_000
"""Of one decision."""
MOST_CALLS = 50_000
"""Of a whole record: the blocks of each decision times the calls of each block; and its calls times what ran them. A
run of 60 blocks, 6 roles and 20 kinds of call has 7200."""
_RANGE = re.compile(r"(.*?)(0|[1-9]\d{0,5})-(0|[1-9]\d{0,5})")


def is_record(value: object) -> bool:
    """True for a mapping that says of itself that it is a record."""
    return isinstance(value, Mapping) and MARK in value


def read(value: Mapping[str, Any], source: str, component: str = "transformer") -> Recorded:
    """Read a record; entries that are not of a record are left to the caller.

    Raises:
        ConfigError: it is of another format, or damaged; the message says where.
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
    for number, one in enumerate(top.items("not_recorded")):
        _texts(reader.fields(one, f"not_recorded[{number}]"))
    runs = tuple(reader.run(reader.fields(run, f"runs[{number}]")) for number, run in enumerate(top.items("runs")))
    if not runs:
        raise ConfigError(f"{source}: a record without a run: the Attention Record node found none; nothing to repeat")
    try:
        text = json.dumps(data, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: not plain data: {error}") from error
    return Recorded(text, source, component, runs)


class _Reader:
    """Reads the parts of a record and says where something is wrong."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._calls = self._ran = 0
        """What the decisions so far stand for: blocks times calls, and calls times what ran them."""

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
        for name in ("settings", "steps", "steady", "guard_alarms", "first_alarm"):  # shown, and decide nothing
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
        )

    def count_up(self, blocks: int, calls: int, ran: int, decision: Fields) -> None:
        """Look at what a decision stands for before anything is made of it."""
        self._calls += blocks * calls
        self._ran += ran * calls
        if max(self._calls, self._ran) > MOST_CALLS:
            raise decision.wrong("", f"blocks, calls and what ran them stand for more than {MOST_CALLS} calls")

    def timeline(self, entries: list[Any], decision: Fields, source: str) -> ChoiceTimeline:
        found: list[tuple[int, Choice]] = []
        for index, entry in enumerate(entries):
            ran = self.fields(entry, f"{decision.where}.ran[{index}]")
            start = ran.whole("from_model_call", 1)
            if found and start <= found[-1][0]:
                raise ran.wrong("", f"from_model_call {start} is not after {found[-1][0]}")
            found.append((start, self.choice(ran, source)))
        if not found:
            raise decision.wrong("ran", "expected what ran, and it is empty")
        starts, choices = zip(*found, strict=True)
        return ChoiceTimeline(starts, choices)

    def choice(self, ran: Fields, source: str) -> Choice:
        name, member = ran.text("backend", least=1), ran.text("member", "")
        if isinstance(BACKENDS.get(name), BackendGroup) and member in BACKENDS:
            name = member  # the group might take another one here
        options = dict(ran.inner("options", {}).data)
        if name in BACKENDS:  # a later version's backend falls back as one that is not there
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
        return normal(AttentionRequest(**facts.data))

    def blocks(self, decision: Fields) -> list[tuple[str, Sequence[int | str]]]:
        """The blocks of a decision, each text as what stands before the numbers, and the numbers; or one empty one."""
        found: list[tuple[str, Sequence[int | str]]] = []
        total = 0
        for name in _listed(decision, "blocks", required=True):
            match = _RANGE.fullmatch(name)
            prefix, numbers = (match[1], range(int(match[2]), int(match[3]) + 1)) if match else (name, ("",))
            total += len(numbers)
            if total > MOST_BLOCKS or not numbers:
                raise decision.wrong("blocks", f"{name!r}: expected at most {MOST_BLOCKS} blocks, and at least one")
            found.append((prefix, numbers))
        return found


def _texts(fields: Fields, but: str = "") -> None:
    """Look at texts, such as programs and their versions; a number or nothing in place of one does no harm."""
    for name, one in fields.data.items():
        if name != but and (not isinstance(one, str | int | float | None) or len(str(one)) > LONGEST_TEXT):
            raise fields.wrong(str(name), f"expected a text of at most {LONGEST_TEXT} characters")


def _listed(fields: Fields, name: str, required: bool = False) -> list[str]:
    """A list of texts."""
    found = fields.items(name, None if required else [])
    if not all(isinstance(one, str) and len(one) <= LONGEST_TEXT for one in found):
        raise fields.wrong(name, f"expected texts of at most {LONGEST_TEXT} characters")
    return found
