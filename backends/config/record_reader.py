"""Reading a record: from plain data, which may come from anywhere, to what `recorded.py` asks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..kernels import BACKENDS
from ..kernels.group import BackendGroup
from ..measure.call_key import TuningKey, key_of
from ..values.data import check_data
from ..values.errors import ConfigError
from ..values.request import DTYPES, MASK_KINDS, MOST_SIZE, AttentionRequest
from . import AttentionSpec
from .layers import Choice
from .recorded import FORMAT, MARK, Held, Recorded, RecordedRun, normal

FIELDS = (MARK, "made_by", "runs", "not_recorded")
MOST_BLOCKS = 10_000
"""Of one decision."""
MOST_CALLS = 50_000
"""Of a whole record: the blocks of each decision times the calls of each block; and its calls times what ran them. A
run of 60 blocks, 6 roles and 20 kinds of call has 7200."""
LONGEST_TEXT = 2000
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
    reader.texts(data.setdefault("made_by", {}), "made_by")
    for number, one in enumerate(reader.items(data, "not_recorded", "")):
        reader.texts(one, f"not_recorded[{number}]")
    runs = tuple(reader.run(run, f"runs[{number}]") for number, run in enumerate(reader.items(data, "runs", "")))
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

    def fail(self, where: str, text: str) -> ConfigError:
        return ConfigError(f"{self.source}: this record is damaged: {where}: {text}")

    def mapping(self, value: object, where: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.fail(where, f"expected a mapping, not {type(value).__name__}")
        return value

    def items(self, value: Mapping[str, Any], name: str, where: str) -> list[Any]:
        found = value.get(name)
        if not isinstance(found, list):
            raise self.fail(f"{where}{name}", f"expected a list, not {type(found).__name__}")
        return found

    def text(self, value: Mapping[str, Any], name: str, where: str) -> str:
        found = value.get(name, "")
        if not isinstance(found, str):
            raise self.fail(f"{where}.{name}", f"expected text, not {type(found).__name__}")
        if len(found) > LONGEST_TEXT:
            raise self.fail(f"{where}.{name}", f"a text of {len(found)} characters > {LONGEST_TEXT}")
        return found

    def texts(self, value: object, where: str) -> Mapping[str, Any]:
        """A mapping of texts, as programs and their versions; a number or nothing in place of one does no harm."""
        for name, one in self.mapping(value, where).items():
            if not isinstance(one, str | int | float | None) or len(str(one)) > LONGEST_TEXT:
                raise self.fail(f"{where}.{name}", f"expected a text of at most {LONGEST_TEXT} characters")
        return self.mapping(value, where)

    def listed(self, value: Mapping[str, Any], name: str, where: str) -> list[str]:
        """A list of texts that may be left out."""
        found = self.items({name: [], **value}, name, f"{where}.")
        for number, one in enumerate(found):
            self.text({name: one}, name, f"{where}.{name}[{number}]")
        return found

    def count(self, value: Mapping[str, Any], name: str, where: str, least: int) -> int:
        found = value.get(name)
        if type(found) is not int or not least <= found < MOST_SIZE:
            raise self.fail(f"{where}.{name}", f"expected a whole number from {least}, not {found!r}")
        return found

    def run(self, value: object, where: str) -> RecordedRun:
        run = self.mapping(value, where)
        model = self.text(run, "model", where)
        self.listed(run, "changes", where)
        exact: dict[tuple[str, str, AttentionRequest], Held] = {}
        near: dict[tuple[str, TuningKey], Held] = {}
        all_held: list[Held] = []
        for number, entry in enumerate(self.items(run, "decisions", f"{where}.")):
            place = f"{where}.decisions[{number}]"
            decision = self.mapping(entry, place)
            if "role" not in decision:
                raise self.fail(f"{place}.role", "not given")
            role = self.text(decision, "role", place)
            calls, ran = (self.items(decision, name, f"{place}.") for name in ("calls", "ran"))
            blocks = self.blocks(decision, place)
            self.count_up(sum(len(numbers) for _, numbers in blocks), len(calls), len(ran), place)
            held = self.held(ran, place, f"record of {model or 'a model'} ({self.source})")
            all_held.append(held)
            requests = [self.request(call, f"{place}.calls[{index}]") for index, call in enumerate(calls)]
            known = [(request, key_of(role, request)) for request in requests]
            for prefix, numbers in blocks:
                for block in (f"{prefix}{one}" for one in numbers):
                    for request, key in known:
                        exact[role, block, request] = held
                        near.setdefault((block, key), held)
        for name in ("settings", "steps", "steady", "guard_alarms", "first_alarm"):
            self.plain(run.get(name), f"{where}.{name}")
        return RecordedRun(
            self.text(run, "node_id", where),
            model,
            self.count(run, "model_calls", where, 0),
            self.machine(run.get("machine", {}), f"{where}.machine"),
            tuple(self.listed(run, "not_repeated", where)),
            tuple(sorted(set().union(*(held.changes() for held in all_held)))),
            exact,
            tuple(all_held),
            near,
        )

    def count_up(self, blocks: int, calls: int, ran: int, where: str) -> None:
        """Look at what a decision stands for before anything is made of it."""
        self._calls += blocks * calls
        self._ran += ran * calls
        if max(self._calls, self._ran) > MOST_CALLS:
            raise self.fail(where, f"blocks, calls and what ran them stand for more than {MOST_CALLS} calls")

    def plain(self, value: object, where: str) -> None:
        """What is shown and decides nothing: nothing, a number, a text or a mapping of such."""
        self.texts(value if isinstance(value, Mapping) else {"": value}, where)

    def machine(self, value: object, where: str) -> Mapping[str, Any]:
        machine = self.mapping(value, where)
        self.texts({name: one for name, one in machine.items() if name != "packages"}, where)
        packages = machine.get("packages")
        self.texts({} if packages is None else packages, f"{where}.packages")
        return machine

    def held(self, entries: list[Any], where: str, source: str) -> Held:
        found: list[tuple[int, Choice]] = []
        for index, entry in enumerate(entries):
            place = f"{where}.ran[{index}]"
            ran = self.mapping(entry, place)
            start = self.count(ran, "from_model_call", place, 1)
            if found and start <= found[-1][0]:
                raise self.fail(place, f"from_model_call {start} is not after {found[-1][0]}")
            found.append((start, self.choice(ran, place, source)))
        if not found:
            raise self.fail(f"{where}.ran", "expected what ran, and it is empty")
        starts, choices = zip(*found, strict=True)
        return Held(starts, choices)

    def choice(self, ran: Mapping[str, Any], where: str, source: str) -> Choice:
        name, member = self.text(ran, "backend", where), self.text(ran, "member", where)
        if not name:
            raise self.fail(f"{where}.backend", "no backend")
        if isinstance(BACKENDS.get(name), BackendGroup) and member in BACKENDS:
            name = member  # the group might take another one here
        options = dict(self.mapping(ran.get("options", {}), f"{where}.options"))
        if name in BACKENDS:  # a later version's backend falls back as one that is not there
            try:
                AttentionSpec(name, options)
            except ConfigError as error:
                raise self.fail(where, str(error)) from error
        return Choice(name, source, options)

    def request(self, value: object, where: str) -> AttentionRequest:
        facts = self.mapping(value, where)
        unknown = [str(name) for name in facts if name not in AttentionRequest._fields]
        if unknown:
            raise self.fail(where, f"unknown entry {', '.join(unknown)}")
        for name in ("batch", "num_heads", "q_len", "kv_len", "head_dim"):
            self.count(facts, name, where, 1)
        for name in ("num_kv_heads", "v_head_dim"):
            self.count({name: 0, **facts}, name, where, 0)
        for name in ("is_causal", "exact_only", "lse"):
            if not isinstance(facts.get(name, False), bool):
                raise self.fail(f"{where}.{name}", f"expected true or false, not {facts[name]!r}")
        for name, known in (("dtype", DTYPES), ("mask", MASK_KINDS)):
            if facts.get(name, known[0]) not in known:
                raise self.fail(f"{where}.{name}", f"{facts.get(name)!r} is not one of {', '.join(known)}")
        if "dtype" not in facts:
            raise self.fail(f"{where}.dtype", "not given")
        scale = facts.get("scale")
        if scale is not None and (type(scale) not in (int, float) or not math.isfinite(scale)):
            raise self.fail(f"{where}.scale", f"expected a number, not {scale!r}")
        return normal(AttentionRequest(**facts))

    def blocks(self, decision: Mapping[str, Any], where: str) -> list[tuple[str, Sequence[int | str]]]:
        """The blocks of a decision, each text as what stands before the numbers, and the numbers; or one empty one."""
        found: list[tuple[str, Sequence[int | str]]] = []
        total = 0
        for number, name in enumerate(self.items(decision, "blocks", f"{where}.")):
            self.text({"blocks": name}, "blocks", f"{where}.blocks[{number}]")
            match = _RANGE.fullmatch(name)
            prefix, numbers = (match[1], range(int(match[2]), int(match[3]) + 1)) if match else (name, ("",))
            total += len(numbers)
            if total > MOST_BLOCKS or not numbers:
                raise self.fail(f"{where}.blocks", f"{name!r}: expected at most {MOST_BLOCKS} blocks, and at least one")
            found.append((prefix, numbers))
        return found
