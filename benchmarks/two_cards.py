"""Heads over local cards (`backends/cards`) on a machine with two of them: results, links, times and predictions.

`correct`: calls with each form of mask, grouped heads, cross-attention and causal, divided in several ways; their error
against float64 may be what `tests/tolerance.py` allows, or twice that of the undivided call. `same_bits`: whether all
divisions gave the same bits as the undivided call.
`links`: copies between the cards, as a run measures them, directly where the cards have peer access, and through the
host; and copies of one large tensor between each card and pinned memory.
`calls`: for the shapes of real models what `cost.py` predicted from undivided calls and the link, what such a call
took, and one card against two in pairs, divided as the times of earlier calls decided (`heads_chosen`; null: not at
all, and the pairs are divided half by half).

Run: python benchmarks/two_cards.py [--cards cuda:0 cuda:1] [--backend NAME] [--pairs N] [--json FILE]
FILE gets the figures, FILE with the suffix .md a table. No ComfyUI needed. Exit code 1: a result is wrong.
Without two CUDA devices it says so and exits with 0. `tests/numeric/test_two_cards.py` runs all but `main` on threads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

if "attention_backends" not in sys.modules:
    import conftest  # noqa: F401  # loads this folder as the package attention_backends
import torch  # noqa: E402
from attention_backends.backends.cards.card import Card  # noqa: E402
from attention_backends.backends.cards.cost import Points, predicted  # noqa: E402
from attention_backends.backends.cards.cuda_transport import transports  # noqa: E402
from attention_backends.backends.cards.estimate import Estimate  # noqa: E402
from attention_backends.backends.cards.heads import HeadsOverCards  # noqa: E402
from attention_backends.backends.cards.transport import Transport  # noqa: E402
from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.engine.plan import CallKind, Slot  # noqa: E402
from attention_backends.backends.engine.routers import router_for  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.measure import environment  # noqa: E402
from attention_backends.backends.values.devices import release, synchronise  # noqa: E402
from attention_backends.backends.values.reasons import error_text  # noqa: E402
from attention_backends.backends.values.request import AttentionCall, AttentionRequest  # noqa: E402
from attention_backends.comparison.presets import GRIDS, PRESETS  # noqa: E402
from paired import interval, training_paused  # noqa: E402
from tolerance import Error, allowed, error, truth  # noqa: E402

PAIRS = 11
SHAPES = ("wan22_480p", "wan22_720p", "qwen_image", "flux", "flux2")
"""Names in `comparison/presets.py`."""
UNDIVIDED, MEASURED, FREE = 5, 5, 12
"""Calls before the first divided one is decided on; divided calls behind a prediction; calls that adjust the shares."""
HOST_BYTES, REPEATS = 256 << 20, 5


class Machine:
    """The home card and another one."""

    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    host_bytes = HOST_BYTES

    def __init__(self, home: torch.device, other: torch.device, backend: str) -> None:
        self.home, self.other, self.backend = home, other, backend

    def transport(self) -> Transport:
        """A new one to the other card."""
        (made,) = transports(self.home, [self.home, self.other])
        return made

    def session(self, *, divided: bool) -> Session:
        """On the home card; where it divides, its divider is a `HeadsOverCards`."""
        layers = (AttentionConfig(AttentionSpec(self.backend), source="benchmark", guard="off"),)
        made = Session(router_for(self.home), layers, checks=False, device=self.home)
        if divided:
            made.divider = HeadsOverCards(made, lambda like: [Card(self.transport(), router_for, layers, like)])
        return made

    def now(self) -> float:
        """Seconds, once the home card has done what it was given."""
        synchronise(self.home)
        return perf_counter()


class Case(NamedTuple):
    """A call whose results are compared."""

    heads: int
    kv_heads: int
    keys: int = 0
    """0: as many as queries."""
    mask: str = ""
    is_causal: bool = False
    batch: int = 1


CASES = {
    "no mask": Case(8, 8),
    "odd heads": Case(7, 7),
    "batch of 3": Case(4, 4, batch=3),
    "cross-attention": Case(6, 6, keys=77),
    "grouped heads": Case(12, 4),
    "causal": Case(6, 6, is_causal=True),
    "causal, grouped heads": Case(12, 3, is_causal=True),
    "mask of keys": Case(6, 6, mask="keys"),
    "mask of rows": Case(6, 6, mask="rows"),
    "mask by head": Case(6, 6, mask="heads"),
    "mask by head, grouped": Case(12, 4, mask="heads"),
    "repeated mask": Case(6, 6, mask="repeated"),
    "bias": Case(6, 6, mask="bias"),
    "bias by head": Case(6, 6, mask="head bias"),
}


def made_call(case: Case, tokens: int, dtype: torch.dtype, device: torch.device, dim: int = 64) -> AttentionCall:
    """A call with random tensors, the same on every machine."""
    of = torch.Generator().manual_seed(0)
    keys = case.keys or tokens

    def tensor(heads: int, length: int) -> torch.Tensor:
        return torch.randn(case.batch, heads, length, dim, generator=of).to(device, dtype)

    query, key, value = tensor(case.heads, tokens), tensor(case.kv_heads, keys), tensor(case.kv_heads, keys)
    mask = None
    if case.mask == "keys":
        mask = (torch.arange(keys) < keys - keys // 3).view(1, 1, 1, keys)
    elif case.mask in ("rows", "repeated"):
        mask = torch.rand(1, 1, tokens, keys, generator=of) > 0.3
    elif case.mask == "heads":
        mask = torch.rand(1, case.heads, tokens, keys, generator=of) > 0.3
    elif case.mask:
        mask = torch.randn(1, case.heads if case.mask == "head bias" else 1, tokens, keys, generator=of).to(dtype)
    mask = None if mask is None else mask.to(device)
    if mask is not None and case.mask == "repeated":
        mask = mask.expand(1, case.heads, tokens, keys)
    return AttentionCall(query, key, value, mask, case.is_causal, None, case.heads != case.kv_heads)


def shares_of(groups: int) -> list[tuple[int, int]]:
    """Even and uneven divisions of key heads over two cards."""
    found = [(groups - groups // 2, groups // 2), (1, groups - 1), (groups - 1, 1), (0, groups)]
    return list(dict.fromkeys(found))


class Both:
    """The same calls on one card and over two."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.one, self.two = machine.session(divided=False), machine.session(divided=True)

    @property
    def over(self) -> HeadsOverCards:
        divider = self.two.divider
        assert isinstance(divider, HeadsOverCards)
        return divider

    def slots(self, call: AttentionCall) -> tuple[Slot, Slot]:
        kind = CallKind(call.request(), "self", "self")
        return self.one.plan(kind), self.two.plan(kind)

    def prepared(self, slot: Slot, call: AttentionCall) -> Estimate:
        """Run the calls by whose times a division is decided.

        Raises:
            RuntimeError: the other card cannot be used, or such calls are never divided.
        """
        self.over._estimates.clear()
        for _ in range(UNDIVIDED):
            self.two.attention(slot, call)
            self.machine.now()
        if self.over.off is not None or not self.over._estimates:
            notes = "; ".join(map(str, self.two.run_report.notes))
            raise RuntimeError(notes or "such calls are never divided")
        (estimate,) = self.over._estimates.values()
        return estimate

    def divided(self, slot: Slot, call: AttentionCall, estimate: Estimate, counts: tuple[int, ...]) -> torch.Tensor:
        """A call that is divided so, whatever the times say."""
        estimate.refusal, estimate.counts = None, counts
        return self.two.attention(slot, call)


def correct(machine: Machine, cases: dict[str, Case] = CASES, tokens: int = 1000) -> dict[str, Any]:
    """Divided calls against float64, and against the undivided call."""
    rows: dict[str, Any] = {}
    for dtype in machine.dtypes:
        both = Both(machine)
        for name, case in cases.items():
            call = made_call(case, tokens, dtype, machine.home)
            whole_slot, slot = both.slots(call)
            whole, expected = both.one.attention(whole_slot, call), truth(call)
            limit = Error(*map(max, allowed(call, "half"), (2 * each for each in error(whole, expected))))
            row: dict[str, Any] = {"same_bits": True, "error": 0.0, "limit": limit.total, "wrong": []}
            rows[f"{name}, {str(dtype).removeprefix('torch.')}"] = row
            try:
                estimate = both.prepared(slot, call)
                for counts in shares_of(case.kv_heads):
                    before = _calls_elsewhere(both)
                    output = both.divided(slot, call, estimate, counts)
                    found = error(output, expected)
                    row["error"] = max(row["error"], found.total)
                    row["same_bits"] = row["same_bits"] and torch.equal(output, whole)
                    if not found.within(limit):
                        row["wrong"].append(f"heads {counts}: {found} > {limit}")
                    if _calls_elsewhere(both) == before:
                        row["wrong"].append(f"heads {counts}: the other card computed nothing")
            except Exception as problem:
                row["wrong"].append(error_text(problem))
        both.over.close()
    return rows


def _calls_elsewhere(both: Both) -> int:
    return sum(card.run_report.calls for card in both.over.cards)


def links(machine: Machine) -> dict[str, Any]:
    """Copies between the cards by each way there is, and between each card and the host."""
    transport, found = machine.transport(), dict[str, Any]()
    has_peer_access = bool(getattr(transport, "has_peer_access", False))
    for peer in sorted({has_peer_access, False}, reverse=True):
        transport._link = None
        transport.has_peer_access = peer  # type: ignore[attr-defined]  # of a CudaTransport
        link = transport.link(torch.zeros(1, dtype=machine.dtypes[0], device=machine.home))
        found["peer access" if peer else "through the host"] = {
            "there": _points(link.to), "back": _points(link.back),
        }  # fmt: skip
    transport.release()
    for device in (machine.home, machine.other):
        found[f"{device} and pinned memory"] = _host_copies(device, machine.host_bytes)
    return {"has_peer_access": has_peer_access, "ways": found}


def _points(points: Points) -> dict[str, Any]:
    return {
        "ms_by_bytes": {int(size): round(seconds * 1e3, 4) for size, seconds in points.measured},
        "gb_per_second": round(points.bytes_per_second / 1e9, 3),
    }


def _host_copies(device: torch.device, size: int) -> dict[str, Any]:
    there = torch.zeros(size, dtype=torch.uint8, device=device)
    here = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type != "cpu")
    found = {}
    for way, target, source in (("there", there, here), ("back", here, there)):
        seconds = []
        for _ in range(REPEATS + 1):
            synchronise(device)
            start = perf_counter()
            target.copy_(source, non_blocking=True)
            synchronise(device)
            seconds.append(perf_counter() - start)
        took = statistics.median(seconds[1:])  # the first one may set up the memory
        found[way] = {"ms_by_bytes": {size: round(took * 1e3, 4)}, "gb_per_second": round(size / took / 1e9, 3)}
    return found


def calls(machine: Machine, shapes: dict[str, AttentionRequest], pairs: int = PAIRS) -> Iterator[tuple[str, Any]]:
    """Name and figures of each shape, or why there are none. What is learned of the other card serves later shapes."""
    both = Both(machine)
    for name, request in shapes.items():
        try:
            yield name, _call(both, request, pairs)
        except Exception as problem:  # the card may have no room for this one
            yield name, {"error": error_text(problem)}
            both.over.close()
            both = Both(machine)
        release(machine.home)
        release(machine.other)
    both.over.close()


def _call(both: Both, request: AttentionRequest, pairs: int) -> dict[str, Any]:
    machine, dtype = both.machine, getattr(torch, request.dtype)
    of = torch.Generator(machine.home).manual_seed(0)
    query, key, value = (
        torch.randn(request.batch, heads, length, request.head_dim, generator=of, dtype=dtype, device=machine.home)
        for heads, length in (
            (request.num_heads, request.q_len), *[(request.num_kv_heads or request.num_heads, request.kv_len)] * 2,
        )
    )  # fmt: skip
    call = AttentionCall(query, key, value)
    whole_slot, slot = both.slots(call)
    estimate = both.prepared(slot, call)
    groups, whole_seconds, refusal = estimate.groups, estimate.whole_seconds, estimate.refusal
    counts = estimate.counts or (groups - groups // 2, groups // 2)
    expected = predicted(counts, estimate.volume, whole_seconds / groups, estimate.costs(), 0.0)
    took = statistics.median(
        [_seconds(machine, lambda: both.divided(slot, call, estimate, counts)) for _ in range(MEASURED + 1)][1:]
    )  # the first one is planned there
    if refusal is not None:
        estimate.refuse(refusal)
    for _ in range(FREE):
        both.two.attention(slot, call)
        machine.now()
    chosen = estimate.counts
    final = chosen or counts
    times = _alternated(
        machine,
        lambda: both.one.attention(whole_slot, call),
        lambda: both.divided(slot, call, estimate, final),
        pairs,
    )
    notes = [str(note) for note in both.two.run_report.notes]
    return {
        "call": request.describe(),
        "backend": slot.plan.decision.backend,
        "heads_predicted": counts,
        "undivided_ms": round(whole_seconds * 1e3, 4),
        "predicted_ms": round(expected * 1e3, 4),
        "measured_ms": round(took * 1e3, 4),
        "measured_over_predicted": round(took / expected, 3),
        "heads_chosen": chosen,
        "heads_of_each": final,
        "one_card_ms": round(statistics.median(one for one, _ in times) * 1e3, 4),
        "two_cards_ms": round(statistics.median(two for _, two in times) * 1e3, 4),
        "faster": interval([one / two for one, two in times]),
        "notes": notes,
    }


def _seconds(machine: Machine, work: Callable[[], Any]) -> float:
    start = machine.now()
    work()
    return machine.now() - start


def _alternated(
    machine: Machine, one: Callable[[], Any], two: Callable[[], Any], pairs: int
) -> list[tuple[float, float]]:
    """Seconds of both in each pair, in an order that is drawn anew in each; both run once before."""
    draw, found = random.Random(0), []
    one()
    two()
    for _ in range(pairs):
        first = draw.random() < 0.5
        times = [_seconds(machine, work) for work in ((one, two) if first else (two, one))]
        found.append((times[0], times[1]) if first else (times[1], times[0]))
    return found


def shapes_of(names: Sequence[str] = SHAPES) -> dict[str, AttentionRequest]:
    """The calls of these presets in bfloat16, without a mask and without a grid."""
    known = {**PRESETS, **GRIDS}
    return {known[name].title: known[name].request("bfloat16")._replace(grid=None) for name in names}


def table(found: dict[str, Any]) -> str:
    """The figures as a page of Markdown."""
    wrong = [f"- {name}: {text}" for name, row in found["correct"].items() for text in row["wrong"]]
    same = sum(row["same_bits"] for row in found["correct"].values())
    lines = [
        "# Heads over two cards", "", f"{found['machine']}; {found['versions']}. `{found['command']}`", "",
        f"Results: {len(found['correct'])} calls, {same} of them the same to the bit however they were divided; "
        f"{len(wrong)} wrong.", *wrong, "",
        "| copies | there, GB/s | back, GB/s |", "|---|---|---|",
        *(
            f"| {way} | {of['there']['gb_per_second']} | {of['back']['gb_per_second']} |"
            for way, of in found["links"]["ways"].items()
        ),
        "", "| call | one card, ms | two cards, ms | times as fast | heads of each | measured over predicted |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in found["calls"].items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | | |")
            continue
        faster, heads = row["faster"], " + ".join(map(str, row["heads_of_each"]))
        lines.append(
            f"| {name} | {row['one_card_ms']:.2f} | {row['two_cards_ms']:.2f} | {faster['median']:.2f} "
            f"({faster['low']:.2f}-{faster['high']:.2f}) | {heads}{'' if row['heads_chosen'] else ', not chosen'} | "
            f"{row['measured_over_predicted']:.2f} |"
        )
    return "\n".join([*lines, ""])


def facts(machine: Machine) -> dict[str, Any]:
    """The cards, the versions and the load."""
    platform = detect(machine.home)
    cards = [f"{device} {_name_of(device)}" for device in (machine.home, machine.other)]
    versions = [f"{name} {version}" for name, version in environment.versions(platform).items()]
    driver = environment.driver_of(platform)
    return {
        "machine": ", ".join(cards),
        "versions": ", ".join([*([f"driver {driver}"] if driver else []), *versions]),
        "python": sys.version.split()[0],
        "backend": machine.backend,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _name_of(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    of = torch.cuda.get_device_properties(device)
    return f"{of.name}, {of.total_memory / 2**30:.0f} GiB"


def measured(machine: Machine, shapes: dict[str, AttentionRequest], pairs: int, command: str) -> dict[str, Any]:
    """All figures."""
    found: dict[str, Any] = {"command": command, **facts(machine)}
    found["correct"] = correct(machine)
    found["links"] = links(machine)
    found["calls"] = {}
    for name, row in calls(machine, shapes, pairs):
        print(f"{name}: {row.get('error') or row['faster']}", file=sys.stderr)
        found["calls"][name] = row
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Heads over two local cards: results, links, times, predictions.")
    parser.add_argument("--cards", nargs=2, default=["cuda:0", "cuda:1"], help="the home card and the other one")
    parser.add_argument("--backend", default="torch_sdpa", help="the backend of both")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of calls for each shape")
    parser.add_argument("--json", type=Path, help="write the figures to this file, and the table beside it")
    asked = parser.parse_args(arguments)
    if torch.cuda.device_count() < 2:
        print("skipped: no second CUDA device")
        return 0
    machine = Machine(*map(torch.device, asked.cards), asked.backend)
    torch.cuda.set_device(machine.home)
    command = f"python benchmarks/two_cards.py --cards {' '.join(asked.cards)} --backend {asked.backend}"
    with training_paused(), torch.inference_mode():
        found = measured(machine, shapes_of(), asked.pairs, f"{command} --pairs {asked.pairs} --json FILE")
    page = table(found)
    print(page)
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        asked.json.with_suffix(".md").write_text(page, encoding="utf-8")
    return int(any(row["wrong"] for row in found["correct"].values()))


if __name__ == "__main__":
    sys.exit(main())
