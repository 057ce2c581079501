"""Heads over several cards: divided calls are the same to the bit, faults lose nothing, and measured times decide.

Other cards are threads on the CPU, with a clock that their work advances (`tests/card_workers.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from attention_backends.backends import account, attention, attention_backend, force_backend
from attention_backends.backends.cards.card import Asked, unrepeated
from attention_backends.backends.cards.cost import predicted
from attention_backends.backends.cards.cuda_transport import transports
from attention_backends.backends.cards.divided import DividedKernel
from attention_backends.backends.cards.transport import Transport
from attention_backends.backends.config import AttentionConfig, AttentionSpec
from attention_backends.backends.config.layers import Choice
from attention_backends.backends.engine.plan import CallKind, Slot
from attention_backends.backends.engine.router import Decision
from attention_backends.backends.values.reasons import Reason, reason_id
from attention_backends.backends.values.request import AttentionCall, AttentionRequest
from card_workers import CPU, Bench, make_call, reasons_off, second_worker

BEFORE = 5
"""Calls until the first divided one: one to warm up, three that are timed, and the one that decides."""


def _mask(kind: str, heads: int, tokens: int, keys: int) -> torch.Tensor | None:
    made = torch.Generator().manual_seed(1)
    if kind == "by head":
        return torch.rand(1, heads, tokens, keys, generator=made) > 0.3
    if kind == "bias by head":
        return torch.randn(1, heads, 1, keys, generator=made)
    if kind == "of keys":
        return (torch.arange(keys) < keys - 40).view(1, 1, 1, keys)
    if kind == "repeated":
        return (torch.rand(1, 1, tokens, keys, generator=made) > 0.3).expand(1, heads, tokens, keys)
    return None


CASES = {
    "plain": dict(heads=8),
    "odd heads": dict(heads=7),
    "cross": dict(heads=6, keys=77),
    "batch": dict(heads=4, batch=3),
    "grouped": dict(heads=12, kv_heads=4),
    "one head each": dict(heads=2),
    "causal": dict(heads=6, is_causal=True),
}


def assert_divided(bench: Bench) -> None:
    """Some other worker had a part, and nothing failed."""
    assert any(worker.sent > 9 for worker in bench.workers)  # nine measure the link
    assert bench.estimate().refusal is None
    assert bench.over.off is None
    assert not bench.run_report.notes


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_divided_calls_are_the_same_to_the_bit(case: str, workers: int) -> None:
    bench = Bench(*[1e9] * workers, speeds=(1e8, 1.7e8, 1e8))
    call = make_call(**CASES[case])  # type: ignore[arg-type]
    slot = bench.slot(call)
    whole = bench.run(slot, call)
    divided = bench.run(slot, call, BEFORE)
    assert torch.equal(divided, whole)
    assert_divided(bench)


@pytest.mark.parametrize("kind", ["by head", "bias by head", "of keys", "repeated"])
def test_masks_are_sliced_by_head(kind: str) -> None:
    bench = Bench(1e9, speeds=(1e8, 1.7e8))
    call = make_call(heads=6, mask=_mask(kind, 6, 256, 256))
    slot = bench.slot(call)
    whole = bench.run(slot, call)
    assert torch.equal(bench.run(slot, call, BEFORE), whole)
    assert_divided(bench)


def test_what_a_mask_only_repeats_is_not_sent() -> None:
    mask = torch.zeros(1, 1, 5, 7).expand(2, 3, 5, 7)
    assert unrepeated(mask).shape == (1, 1, 5, 7)


def test_a_group_of_heads_is_never_cut() -> None:
    bench = Bench(1e9, speeds=(1e8, 1e8))
    call = make_call(heads=9, kv_heads=3)
    slot = bench.slot(call)
    bench.run(slot, call, BEFORE)
    assert sum(bench.estimate().counts) == 3
    heads = {slot.plan.request.num_heads for slot in bench.cards[0]._slots.values()}
    assert heads in ({3}, {6})
    assert_divided(bench)


def test_a_faster_card_gets_more_heads() -> None:
    of_speed = {}
    for speed in (0.5e8, 1e8, 3e8):
        bench = Bench(1e9, speeds=(1e8, speed))
        call = make_call(heads=12)
        slot = bench.slot(call)
        bench.run(slot, call, BEFORE + 12)
        of_speed[speed] = bench.estimate().counts[1]
    assert of_speed == {0.5e8: 4, 1e8: 6, 3e8: 9}


def test_what_was_learned_of_a_card_serves_other_calls() -> None:
    bench = Bench(1e9, speeds=(1e8, 3e8))
    first, second = make_call(heads=12), make_call(heads=12, tokens=320)
    bench.run(bench.slot(first), first, BEFORE + 4)
    bench.run(bench.slot(second), second, BEFORE)
    estimates = list(bench.over._estimates.values())
    assert estimates[1].counts[1] > 6


def test_blocks_share_their_times() -> None:
    bench = Bench(1e9, speeds=(1e8, 1e8))
    call = make_call()
    for block in range(BEFORE):
        bench.run(bench.slot(call, f"block.{block}"), call)
    assert bench.estimate().counts == (4, 4)


def test_the_bandwidth_decides() -> None:
    for bandwidth, divides in ((1e9, True), (1e6, False)):
        bench = Bench(bandwidth, speeds=(1e9, 1e9))
        call = make_call()
        bench.run(bench.slot(call), call, BEFORE)
        assert (bench.estimate().counts is not None) == divides
        assert bool(bench.cards[0].run_report.rows) == divides
        kept = [note for note in bench.run_report.notes if reason_id(note) == "cards.home"]
        assert bool(kept) != divides


def test_a_card_that_is_slower_than_assumed_is_left_alone() -> None:
    bench = Bench(1e12, speeds=(1e9, 1e6), latency=0.0)
    call = make_call(heads=2)
    slot = bench.slot(call)
    bench.run(slot, call, BEFORE + 8)
    assert reason_id(bench.estimate().refusal) == "cards.slower"
    sent = bench.workers[0].sent
    bench.run(slot, call, 3)
    assert bench.workers[0].sent == sent


SHAPES = [
    (heads, tokens, keys, dim)
    for heads, dim in ((4, 64), (8, 64), (12, 128), (24, 64))
    for tokens, keys in ((500, 500), (1024, 1024), (1500, 1500), (2048, 77), (700, 2048))
]


def test_times_are_predicted_within_fifteen_percent() -> None:
    bench = Bench(3e8, speeds=(1e10, 0.7e10), computes=False)
    known = make_call(heads=8, tokens=640, dim=64)
    bench.run(bench.slot(known), known, BEFORE + 4)
    wrong = {}
    for heads, tokens, keys, dim in SHAPES:
        call = make_call(heads, tokens=tokens, keys=keys, dim=dim)
        slot = bench.slot(call)
        bench.run(slot, call, BEFORE - 1)
        estimate = list(bench.over._estimates.values())[-1]
        counts = (heads // 2, heads - heads // 2)
        home = estimate.whole_seconds / heads
        expected = predicted(counts, estimate.volume, home, estimate.costs(), 0.0)
        estimate.refusal, estimate.counts = None, counts
        bench.run(slot, call)  # plans it there
        before = bench.home.passed
        bench.run(slot, call)
        ratio = (bench.home.passed - before) / expected
        if not 0.85 < ratio < 1.15:
            wrong[heads, tokens, keys, dim] = ratio
    assert len(SHAPES) == 20
    assert not wrong


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("illegal memory access")])
def test_a_card_that_fails_is_left_out_and_nothing_is_lost(error: Exception) -> None:
    bench = Bench(1e9, 1e9, speeds=(1e8, 1e8, 1e8))
    call = make_call(heads=9)
    slot = bench.slot(call)
    whole = bench.run(slot, call)
    bench.run(slot, call, BEFORE)
    first, second = bench.workers
    before = first.sent, second.sent
    assert min(before) > 9
    second.error = error
    assert torch.equal(bench.run(slot, call), whole)
    notes = [note for note in bench.run_report.notes if reason_id(note) == "cards.left_out"]
    assert len(notes) == 1
    assert "cuda:2" in notes[0]
    second.error = None
    assert torch.equal(bench.run(slot, call, 3), whole)
    assert second.sent == before[1]
    assert first.sent > before[0] + 1
    first.error = error
    assert torch.equal(bench.run(slot, call), whole)
    assert reason_id(bench.over.off) == "cards.none_left"
    assert torch.equal(bench.run(slot, call, 2), whole)


def divided_call() -> tuple[Bench, AttentionCall, Slot, torch.Tensor, DividedKernel]:
    """A call of 8 heads that two workers share: its slot, its output, its kernel."""
    bench = Bench(1e9, speeds=(1e8, 1e8))
    call = make_call()
    slot = bench.slot(call)
    whole = bench.run(slot, call, BEFORE)
    kernel = slot.plan.kernel
    assert isinstance(kernel, DividedKernel)
    return bench, call, slot, whole, kernel


def test_where_no_kernel_of_a_card_runs_a_part_it_is_computed_here() -> None:
    bench, call, slot, whole, _ = divided_call()
    bench.cards[0]._slots.clear()
    tried: list[str] = []

    def failing(decision: Decision, kind: CallKind) -> Callable[[AttentionCall], torch.Tensor]:
        def run(call: AttentionCall) -> torch.Tensor:
            tried.append(decision.backend)
            raise RuntimeError("no image for this card")

        return run

    bench.cards[0].session.kernel = failing  # type: ignore[assignment,method-assign]
    assert torch.equal(bench.run(slot, call), whole)
    assert tried
    assert reason_id(bench.estimate().refusal) == "cards.refused"
    before = len(tried)
    assert torch.equal(bench.run(slot, call), whole)
    assert len(tried) == before
    assert [reason_id(note) for note in bench.run_report.notes] == ["cards.home"]


def test_options_that_change_are_planned_anew() -> None:
    """A schedule may give a backend other options in a later step; role and block of the call are the same."""
    bench, call, slot, _, _ = divided_call()
    card, asked = bench.cards[0], []
    plan = card.session.plan

    def recorded(kind: CallKind, choice: Choice) -> Slot:
        asked.append(dict(choice.extra))
        return plan(kind, choice=Choice(choice.asked, choice.source))

    card.session.plan = recorded  # type: ignore[assignment,method-assign]
    for options in ({"steps": 1}, {"steps": 2}, {"steps": 1}):
        card.compute(Asked(slot.plan.kind, Choice("torch_sdpa", "test", options)), call, torch.empty_like(call.query))
    assert asked == [{"steps": 1}, {"steps": 2}]


def test_a_kernel_that_fails_here_ends_the_others_first() -> None:
    bench, call, slot, whole, kernel = divided_call()

    def failing(call: AttentionCall) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    before, kernel.kernel = bench.workers[0].sent, failing
    with pytest.raises(torch.OutOfMemoryError):
        bench.run(slot, call)
    assert bench.workers[0].sent == before + 1
    assert torch.equal(bench.run(bench.slot(call), call), whole)


def test_a_kernel_that_refuses_a_part_gets_the_whole() -> None:
    bench, call, slot, whole, kernel = divided_call()
    plain = kernel.kernel

    def only_whole(call: AttentionCall) -> torch.Tensor:
        if call.query.shape[1] != 8:
            raise RuntimeError("eight heads at a time")
        return plain(call)

    kernel.kernel = only_whole
    assert torch.equal(bench.run(slot, call, 2), whole)
    assert reason_id(bench.estimate().refusal) == "cards.part"
    assert slot.plan.kernel is kernel


def test_strict_leaves_a_call_here_that_a_card_may_not_run() -> None:
    bench = Bench(1e9, speeds=(1e8, 1e8), config=AttentionConfig(AttentionSpec("torch_sdpa"), strict=True))
    call = make_call()
    slot = bench.slot(call)
    whole = bench.run(slot, call, BEFORE - 1)
    bench.cards[0].session.failed["torch_sdpa", (), call.request()._replace(num_heads=4, num_kv_heads=4)] = (
        "failed before"
    )
    assert torch.equal(bench.run(slot, call, 2), whole)
    assert reason_id(bench.estimate().refusal) == "cards.refused"
    assert bench.over.off is None


def test_workers_have_the_callers_inference_mode() -> None:
    bench = Bench(1e9, speeds=(1e8, 1e8))
    with torch.inference_mode():
        call = make_call()
        output = bench.run(bench.slot(call), call, BEFORE)
    assert output.is_inference()
    assert set(bench.workers[0].is_inference) == {True}
    assert_divided(bench)


def test_gradients_keep_a_call_on_one_card() -> None:
    bench = Bench(1e9, speeds=(1e8, 1e8))
    call = make_call()
    slot = bench.slot(call)
    bench.run(slot, call, BEFORE)
    sent = bench.workers[0].sent
    call.query.requires_grad_()
    bench.run(slot, call, 2).sum().backward()
    assert bench.workers[0].sent == sent
    assert call.query.grad is not None
    assert kept_home(bench) == {"cards.gradients": 1}
    with torch.no_grad():
        bench.run(slot, call)
    assert bench.workers[0].sent == sent + 1


def kept_home(bench: Bench) -> dict[str, int]:
    """Why kinds of call stay on the home card, and how often the report says so."""
    notes = bench.run_report.notes.items()
    return {note.values["reason"].id: count for note, count in notes if reason_id(note) == "cards.home"}  # type: ignore[attr-defined]


def test_a_backend_that_refuses_a_part_keeps_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(1e9, speeds=(1e8, 1e8))
    call = make_call()
    slot = bench.slot(call)
    whole, sent = bench.run(slot, call, BEFORE - 1), bench.workers[0].sent

    def against(backend: str, request: AttentionRequest, *_: object, **__: object) -> tuple[Reason, ...]:
        return (Reason("batch", batch=request.num_heads, max=0),) if request.num_heads == 4 else ()

    monkeypatch.setattr(bench.over.router, "reasons_against", against)
    assert torch.equal(bench.run(slot, call, 3), whole)
    assert bench.workers[0].sent == sent
    assert kept_home(bench) == {"cards.part_refused": 1}
    (note,) = bench.run_report.notes
    assert "batch 4 > 0" in note


@pytest.mark.parametrize("given", ["to the call", "by a block", "by force"])
def test_a_compiled_function_stays_on_its_card(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    workers, config = second_worker(monkeypatch), {"default": "torch_sdpa", "cards": "all"}
    arguments: dict[str, Any] = {"cards": "all"} if given == "to the call" else {}
    around = {"by a block": attention_backend, "by force": force_backend}.get(given, lambda config: nullcontext())

    def function(query: torch.Tensor) -> torch.Tensor:
        return attention(query * 2, query, query, **arguments) + 1

    compiled, query = torch.compile(function, backend="eager"), make_call().query
    with around(config), account() as report:
        for _ in range(BEFORE + 1):
            output = compiled(query)
        assert not workers
        assert reasons_off(report.notes) == ["cards.compiled"]
        assert list(report.notes.values()) == [1]
        for _ in range(BEFORE):
            assert torch.equal(function(query), output)
    assert workers[-1].sent > 9


def test_memory_is_asked_for_before_it_is_used() -> None:
    bench = Bench(1e9, speeds=(1e8, 1e8))
    call = make_call()
    bench.run(bench.slot(call), call, BEFORE + 2)
    half = 4 * call.query.nbytes // 2
    assert len(bench.room) == 1
    assert bench.room[0] >= half


def test_a_lossy_kernel_runs_elsewhere_only_where_it_runs_here() -> None:
    config = AttentionConfig(AttentionSpec("emulated_int8"), source="test")
    bench = Bench(1e9, speeds=(1e8, 1e8), config=config)
    call = make_call()
    slot = bench.slot(call)
    bench.run(slot, call, BEFORE)
    assert {row.backend for row in bench.cards[0].run_report.rows.values()} == {"emulated_int8"}
    bench.session.failed["emulated_int8", (), call.request()] = "failed"
    other = bench.slot(call)
    bench.run(other, call, BEFORE + 1)
    assert other.plan.decision.backend != "emulated_int8"
    here = other.plan.kernel
    assert isinstance(here, DividedKernel)
    assert (here.choice.asked, here.choice.accuracy) == (None, "exact")


def test_the_report_names_what_each_card_ran() -> None:
    bench = Bench(1e9, speeds=(1e8, 1e8))
    call = make_call()
    bench.run(bench.slot(call), call, BEFORE + 3)
    (ran,) = bench.run_report.of_cards()
    assert (ran.values["card"], ran.values["backend"], ran.values["calls"]) == ("cuda:1", "torch_sdpa", 4)
    assert ran in bench.run_report.as_dict()["notes"]  # type: ignore[operator]
    assert ran in bench.run_report.summary()
    assert bench.run_report.calls == BEFORE + 3


@pytest.mark.parametrize(
    ("config", "call", "reason"),
    [
        ("torch_sdpa", make_call(heads=1), "cards.one_head"),
        ("torch_sdpa", make_call(heads=8, kv_heads=1), "cards.one_head"),
        ("radial_attn", make_call(heads=4), "cards.sparse"),
    ],
)
def test_what_is_never_divided_gets_the_plain_kernel(config: str, call: AttentionCall, reason: str) -> None:
    bench = Bench(1e9, config=AttentionConfig(AttentionSpec(config), source="test", accuracy="sparse"))
    slot = bench.slot(call)
    assert not isinstance(slot.plan.kernel, DividedKernel) or slot.plan.decision.backend != config
    if slot.plan.decision.backend == config:
        (note,) = (note for note in bench.run_report.notes if reason_id(note) == "cards.home")
        assert reason_id(note.values["reason"]) == reason  # type: ignore[attr-defined]


def test_a_session_without_other_cards_has_the_same_kernel() -> None:
    bench = Bench(1e9)
    bench.session.divider = None
    call = make_call()
    slot = bench.slot(call)
    assert not isinstance(slot.plan.kernel, DividedKernel)


def test_a_second_worker_of_the_same_device_copies_nothing() -> None:
    worker = Transport("cpu:1", CPU)
    tensor = torch.zeros(3)
    assert worker.send([tensor])[0] is tensor


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")


@pytest.mark.gpu
@needs_two
@pytest.mark.parametrize("shape", [(1, 8, 4096, 64), (2, 5, 1000, 128), (1, 24, 33, 64)])
def test_copies_between_two_cards(shape: tuple[int, ...]) -> None:
    home, other = torch.device("cuda:0"), torch.device("cuda:1")
    (link,) = transports(home, [home, other])
    for has_peer_access in {link.has_peer_access, False}:  # type: ignore[attr-defined]
        link.has_peer_access = has_peer_access  # type: ignore[attr-defined]
        source = torch.randn(shape, device=home, dtype=torch.float16)[:, 1:]
        mask = torch.rand(shape, device=home) > 0.5
        target = torch.empty_like(source)

        def there_and_back(
            source: torch.Tensor = source, mask: torch.Tensor = mask, target: torch.Tensor = target
        ) -> None:
            sent, of_mask = link.send([source, mask])
            assert sent.device == of_mask.device == other
            link.bring(sent, target)
            assert torch.equal(of_mask.cpu(), mask.cpu())

        link.end(link.begin(there_and_back))
        assert torch.equal(source, target)
