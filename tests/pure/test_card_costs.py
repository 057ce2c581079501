"""The division of a call over local cards: heads, times, links; without torch."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
from attention_backends.backends.cards.cost import CardCost, Link, Points, best, predicted, volume_of
from attention_backends.backends.cards.estimate import Estimate, Speed, Times
from attention_backends.backends.cards.links import LINKS, link_of
from attention_backends.backends.cards.parts import parts_of, request_of
from attention_backends.backends.config import AttentionConfig
from attention_backends.backends.config.card_names import card_names
from attention_backends.backends.config.layers import cards_of
from attention_backends.backends.config.print import to_flags, to_json, to_yaml
from attention_backends.backends.config.text import parse_config
from attention_backends.backends.values.errors import ConfigError
from attention_backends.backends.values.reasons import Reason, reason_id
from attention_backends.backends.values.request import AttentionRequest

ROOT = Path(__file__).resolve().parents[2]
WAN = AttentionRequest(1, 40, 32760, 32760, 128, "bfloat16", 40, 128)
NO_TIME = Link(Points([(0, 0.0), (1e9, 0.0)]), Points([(0, 0.0), (1e9, 0.0)]))


def test_groups_of_heads_stay_together() -> None:
    request = AttentionRequest(1, 12, 8, 8, 16, "float32", 4, 16)
    parts = parts_of((1, 0, 3), request)
    assert [part and (part.heads, part.kv_heads) for part in parts] == [
        (slice(0, 3), slice(0, 1)), None, (slice(3, 12), slice(1, 4)),
    ]  # fmt: skip
    of = request_of(parts[2], request)  # type: ignore[arg-type]  # it has heads
    assert (of.num_heads, of.num_kv_heads) == (9, 3)


@pytest.mark.parametrize("groups", [1, 2, 7, 12])
@pytest.mark.parametrize("seconds", [(1.0,), (0.3,), (5.0,), (1.0, 0.4), (2.0, 0.1)])
@pytest.mark.parametrize("rate", [1e9, 1e5])
def test_no_other_division_is_faster(groups: int, seconds: tuple[float, ...], rate: float) -> None:
    request = AttentionRequest(1, groups, 100, 100, 16, "float32", groups, 16)
    link = Link(Points([(0, 0.1), (rate, 1.1)]), Points([(0, 0.1), (rate, 1.1)]))
    volume, cards = volume_of(request), [CardCost(link, each) for each in seconds]
    found = best(groups, volume, 1.0, cards)
    every = [counts for counts in product(range(groups + 1), repeat=len(cards) + 1) if sum(counts) == groups]
    assert found.seconds == pytest.approx(min(predicted(counts, volume, 1.0, cards, 0.0) for counts in every))
    assert sum(found.counts) == groups


def test_points_are_joined_and_continued() -> None:
    points = Points([(100, 2.0), (1000, 3.0), (2000, 5.0)])
    assert [points.seconds(size) for size in (0, 10, 100, 550, 1500, 3000)] == [0.0, 2.0, 2.0, 2.5, 4.0, 7.0]
    assert points.bytes_per_second == 500.0


def test_the_bytes_of_a_call() -> None:
    request = AttentionRequest(2, 8, 10, 30, 16, "bfloat16", 4, 32)
    volume = volume_of(request, mask_bytes=600)
    assert volume.sent == 2 * 2 * (2 * 10 * 16 + 30 * 16 + 30 * 32)
    assert (volume.shared, volume.returned) == (600, 2 * 2 * 2 * 10 * 32)
    assert volume_of(request, 600, mask_by_head=True).sent == volume.sent + 150


def test_the_link_decides() -> None:
    request = AttentionRequest(1, 16, 4096, 4096, 64, "float16", 16, 64)
    home = 4 * 4096**2 * 64 / 200e12
    of_link = {name: best(16, volume_of(request), home, [CardCost(link_of(name), home)]).counts for name in LINKS}
    assert of_link["PCIe 3.0 x4"] == (16, 0)
    assert of_link["PCIe 5.0 x16"][1] in range(1, 8)
    assert of_link["NVLink 4 (H100)"][1] > of_link["PCIe 5.0 x16"][1]


def test_the_table_of_the_page_is_computed() -> None:
    page = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:PCIe|NVLink)[^|]*) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 7
    volume, work = volume_of(WAN), 4 * 40 * 32760**2 * 128
    for name, *gains in rows:
        for teraflops, gain in zip((50, 150, 400), gains, strict=True):
            home = work / 40 / (teraflops * 1e12)
            found = best(40, volume, home, [CardCost(link_of(name), home)])
            assert f"{40 * home / found.seconds:.2f}" == gain, (name, teraflops)


def _timed(estimate: Estimate, whole: float) -> tuple[int, ...] | None:
    for _ in range(4):
        assert estimate.next() is None
        if estimate.times_whole:
            estimate.add_whole(whole)
    return estimate.next()


def test_whole_calls_come_first() -> None:
    estimate = Estimate(8, volume_of(WAN), [Speed(NO_TIME)])
    assert _timed(estimate, 8.0) == (4, 4)


def test_divided_calls_that_are_slower_stop() -> None:
    estimate = Estimate(8, volume_of(WAN), [Speed(NO_TIME)])
    counts = _timed(estimate, 8.0)
    assert counts is not None
    for _ in range(5):
        estimate.add_divided(counts, 8.5, 4.0, {0: Times(0.0, 4.0, 0.0)})
    assert reason_id(estimate.refusal) == "cards.slower"  # type: ignore[arg-type]
    assert estimate.next() is None


def test_a_call_that_loaded_a_kernel_counts_for_nothing() -> None:
    speed = Speed(NO_TIME)
    estimate = Estimate(8, volume_of(WAN), [speed])
    counts = _timed(estimate, 8.0)
    assert counts is not None
    for _ in range(6):
        estimate.add_divided(counts, 90.0, 50.0, {0: Times(0.0, 90.0, 0.0, cold=True)})
    assert (estimate.next(), speed.relative) == (counts, 1.0)


def test_a_card_that_slows_down_gets_less() -> None:
    estimate = Estimate(8, volume_of(WAN), [Speed(NO_TIME)])
    counts = _timed(estimate, 8.0)
    for slow in (4.0, 4.0, 4.0, 4.0, 7.0, 7.0, 7.0, 7.0):
        assert counts is not None
        estimate.add_divided(counts, max(slow, 4.0), 4.0, {0: Times(0.0, slow, 0.0)})
        counts = estimate.next()
    assert counts == (5, 3)


def test_cards_that_are_left_out_get_nothing() -> None:
    speeds = [Speed(NO_TIME), Speed(NO_TIME)]
    estimate = Estimate(9, volume_of(WAN), speeds)
    assert _timed(estimate, 9.0) == (3, 3, 3)
    speeds[0].out = Reason("cards.none_left")
    estimate.forget(0)
    counts = estimate.next()
    assert counts is not None
    assert counts[1] == 0
    assert counts[2] in (4, 5)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("all", ("all",)),
        ("ALL", ("all",)),
        ("cuda:0, cuda:1", ("cuda:0", "cuda:1")),
        ("0,1 1", ("cuda:0", "cuda:1")),
        (["cuda:2", "cuda:02"], ("cuda:2",)),
        ("off", ()),
        (False, ()),
        ("", ()),
        (1, ("cuda:1",)),
    ],
)
def test_names_of_cards(given: object, names: tuple[str, ...]) -> None:
    assert card_names(given) == names
    assert card_names(names) == names


@pytest.mark.parametrize(
    "given", ["cpu", "cuda", "cuda:0;cuda:1", "all, cuda:1", "cuda:123", {"a": 1}, True, 1.5, "0 " * 65]
)
def test_what_names_no_card_is_refused(given: object) -> None:
    with pytest.raises(ConfigError):
        card_names(given)


@pytest.mark.parametrize("cards", [("all",), ("cuda:0", "cuda:3"), ()])
def test_every_form_keeps_the_cards(cards: tuple[str, ...]) -> None:
    config = AttentionConfig(cards=cards, source="config")
    for text in (to_json(config), to_yaml(config), to_flags(config)):
        assert parse_config(text, "config").cards == cards


def test_the_highest_configuration_names_the_cards() -> None:
    layers = AttentionConfig(), AttentionConfig(cards=()), AttentionConfig(cards=("all",))
    assert cards_of(layers) == ()
    assert cards_of(layers[2:]) == ("all",)
    assert cards_of(layers[:1]) == ()
