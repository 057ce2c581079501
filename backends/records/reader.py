"""Reading a record: from plain data, which may come from anywhere, to what `replay.py` asks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..config import AttentionSpec, ConfigError
from ..config.layers import Choice
from ..family import Family
from ..kernels import BACKENDS
from ..measured.key import TuningKey, key_of
from ..request import DTYPES, MASK_KINDS, AttentionRequest
from .record import FORMAT, MARK, normal
from .replay import Held, Recorded, RecordedRun

FIELDS = (MARK, "made_by", "runs", "not_recorded")
MOST_BLOCKS = 10_000
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
    if value[MARK] != FORMAT:
        raise ConfigError(
            f"{source}: a record of format {value[MARK]!r}, and this version reads {FORMAT}; "
            "update attention-backends, or repeat the run"
        )
    data = {name: value[name] for name in FIELDS if name in value}
    data.setdefault("not_recorded", [])
    reader.mapping(data.setdefault("made_by", {}), "made_by")
    for number, one in enumerate(reader.items(data, "not_recorded", "")):
        reader.mapping(one, f"not_recorded[{number}]")
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
        return found

    def count(self, value: Mapping[str, Any], name: str, where: str, least: int) -> int:
        found = value.get(name)
        if isinstance(found, bool) or not isinstance(found, int) or found < least:
            raise self.fail(f"{where}.{name}", f"expected a whole number from {least}, not {found!r}")
        return found

    def run(self, value: object, where: str) -> RecordedRun:
        run = self.mapping(value, where)
        model = self.text(run, "model", where)
        self.items({"changes": [], **run}, "changes", f"{where}.")
        exact: dict[tuple[str, str, AttentionRequest], Held] = {}
        near: dict[tuple[str, TuningKey], Held] = {}
        all_held: list[Held] = []
        for number, entry in enumerate(self.items(run, "decisions", f"{where}.")):
            place = f"{where}.decisions[{number}]"
            decision = self.mapping(entry, place)
            role = self.text(decision, "role", place)
            held = self.held(decision, place, model)
            all_held.append(held)
            requests = [
                self.request(call, f"{place}.calls[{index}]")
                for index, call in enumerate(self.items(decision, "calls", f"{place}."))
            ]
            for block in self.blocks(decision, place):
                for request in requests:
                    exact[role, block, request] = held
                    near.setdefault((block, key_of(role, request)), held)
        return RecordedRun(
            self.text(run, "node_id", where),
            model,
            self.count(run, "model_calls", where, 0),
            self.mapping(run.get("machine", {}), f"{where}.machine"),
            tuple(map(str, self.items({"not_repeated": [], **run}, "not_repeated", f"{where}."))),
            tuple(sorted(set().union(*(held.changes() for held in all_held)))),
            exact,
            tuple(all_held),
            near,
        )

    def held(self, decision: Mapping[str, Any], where: str, model: str) -> Held:
        found: list[tuple[int, Choice]] = []
        for index, entry in enumerate(self.items(decision, "ran", f"{where}.")):
            place = f"{where}.ran[{index}]"
            ran = self.mapping(entry, place)
            start = self.count(ran, "from_model_call", place, 1)
            if found and start <= found[-1][0]:
                raise self.fail(place, f"from_model_call {start} is not after {found[-1][0]}")
            found.append((start, self.choice(ran, place, model)))
        if not found:
            raise self.fail(f"{where}.ran", "expected what ran, and it is empty")
        starts, choices = zip(*found, strict=True)
        return Held(starts, choices)

    def choice(self, ran: Mapping[str, Any], where: str, model: str) -> Choice:
        name, member = self.text(ran, "backend", where), self.text(ran, "member", where)
        if not name:
            raise self.fail(f"{where}.backend", "no backend")
        if isinstance(BACKENDS.get(name), Family) and member in BACKENDS:
            name = member  # the family might take another one here
        options = dict(self.mapping(ran.get("options", {}), f"{where}.options"))
        if name in BACKENDS:  # a later version's backend falls back as one that is not there
            try:
                AttentionSpec(name, options)
            except ConfigError as error:
                raise self.fail(where, str(error)) from error
        return Choice(name, f"record of {model or 'a model'} ({self.source})", options)

    def request(self, value: object, where: str) -> AttentionRequest:
        facts = self.mapping(value, where)
        unknown = [str(name) for name in facts if name not in AttentionRequest._fields]
        if unknown:
            raise self.fail(where, f"unknown entry {', '.join(unknown)}")
        for name in ("batch", "num_heads", "q_len", "kv_len", "head_dim"):
            self.count(facts, name, where, 1)
        for name in ("num_kv_heads", "v_head_dim"):
            self.count({name: 0, **facts}, name, where, 0)
        for name, known in (("dtype", DTYPES), ("mask", MASK_KINDS)):
            if facts.get(name, known[0]) not in known:
                raise self.fail(f"{where}.{name}", f"{facts.get(name)!r} is not one of {', '.join(known)}")
        if "dtype" not in facts:
            raise self.fail(f"{where}.dtype", "not given")
        scale = facts.get("scale")
        if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
            raise self.fail(f"{where}.scale", f"expected a number, not {scale!r}")
        return normal(AttentionRequest(**facts))

    def blocks(self, decision: Mapping[str, Any], where: str) -> Iterator[str]:
        total = 0
        for name in self.items(decision, "blocks", f"{where}."):
            if not isinstance(name, str):
                raise self.fail(f"{where}.blocks", f"expected text, not {name!r}")
            match = _RANGE.fullmatch(name)
            numbers = range(int(match[2]), int(match[3]) + 1) if match else range(1)
            total += len(numbers)
            if total > MOST_BLOCKS or not numbers:
                raise self.fail(f"{where}.blocks", f"{name!r}: expected at most {MOST_BLOCKS} blocks, and at least one")
            yield from (f"{match[1]}{number}" for number in numbers) if match else [name]
