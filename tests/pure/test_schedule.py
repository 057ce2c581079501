"""Schedules without ComfyUI: windows as they are written, entries in every form of a configuration, the step rule."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from attention_backends.backends.config import AttentionConfig, AttentionSpec
from attention_backends.backends.config import print as printed
from attention_backends.backends.config.layers import resolve
from attention_backends.backends.config.names import UnknownBackendError
from attention_backends.backends.config.print import to_dict, to_flags
from attention_backends.backends.config.schedule import ScheduleEntry, step_of
from attention_backends.backends.config.text import parse_config
from attention_backends.backends.config.timetable import Timetable
from attention_backends.backends.config.windows import MOST_PARTS, parse_numbers, parse_percent, parse_sigmas
from attention_backends.backends.engine.plan import CallKind
from attention_backends.backends.engine.router import Router
from attention_backends.backends.engine.session import Session
from attention_backends.backends.kernels.registry import detect
from attention_backends.backends.values.errors import ConfigError
from attention_backends.backends.values.request import AttentionCall
from attention_backends.cli import main
from hypothesis import given
from hypothesis import strategies as st
from syrupy.assertion import SnapshotAssertion

FLOW = (1.0, 0.9, 0.75, 0.5, 0.25, 0.0)


def entry(backend: str = "sdpa_math", **said: Any) -> ScheduleEntry:
    return ScheduleEntry(AttentionSpec(backend), **said)


def config(*entries: ScheduleEntry, default: str = "torch_sdpa", **more: Any) -> AttentionConfig:
    return AttentionConfig(AttentionSpec(default), schedule=entries, **more)


def asked(
    table: Timetable, sigma: float | None, role: str = "self", category: str = "self", block: str = "blocks.0"
) -> str | None:
    return table.resolve(table.at(sigma), role, category, block)[0].asked


def steps_that_hold(text: str, count: int) -> list[int]:
    sigmas = [1 - i / count for i in range(count)] + [0.0]
    table = Timetable((config(entry(steps=text)),), sigmas)
    return [step for step in range(count) if asked(table, sigmas[step]) == "sdpa_math"]


# Windows as they are written


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("0-3", [0, 1, 2, 3]),
        ("2", [2]),
        (2, [2]),
        ("last 2", [4, 5]),
        ("first 2", [0, 1]),
        ("4-", [4, 5]),
        ("0-1,3,last 2", [0, 1, 3, 4, 5]),
        ([0, "last 1"], [0, 5]),
        ("  0 - 1 ,  LAST  1 ", [0, 1, 5]),
        ("last 9", [0, 1, 2, 3, 4, 5]),
        ("4-9", [4, 5]),
        ("6-9", []),
    ],
)
def test_steps_as_they_are_written(text: Any, steps: list[int]) -> None:
    assert steps_that_hold(text, 6) == steps


@pytest.mark.parametrize(
    ("read", "text"),
    [
        ("steps", "3-0"),
        ("steps", "last"),
        ("steps", "last 0"),
        ("steps", "0-1,,3"),
        ("steps", "-1"),
        ("steps", "0.5"),
        ("steps", "double_blocks.0"),
        ("steps", True),
        ("steps", 1.5),
        ("blocks", "double_blocks.x"),
        ("percent", "20-80"),
        ("percent", "20%-180%"),
        ("percent", "0.8-0.2"),
        ("percent", "0.2"),
        ("sigmas", "0.5"),
        ("sigmas", "50%-20%"),
        ("sigmas", "nan-1"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_accepted(read: str, text: Any, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        entry(**{read: text})
    assert str(caught.value) == snapshot
    assert str(caught.value).startswith(read)


@pytest.mark.parametrize(
    "said",
    [
        pytest.param({}, id="nowhere"),
        pytest.param({"role": "  ", "steps": ""}, id="empty"),
        pytest.param({"steps": "0", "sigmas": "1-0"}, id="steps and sigmas"),
        pytest.param({"role": 3}, id="role of a number"),
    ],
)
def test_an_entry_says_where_it_holds_once(said: dict[str, Any], snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        entry(**said)
    assert str(caught.value) == snapshot


numbers = st.integers(0, 60)
parts = st.one_of(
    numbers.map(str),
    st.tuples(numbers, numbers).map(lambda pair: f"{min(pair)}-{max(pair)}"),
    numbers.map("{}-".format),
    st.tuples(st.sampled_from(["first", "last"]), st.integers(1, 60)).map(lambda pair: f"{pair[0]} {pair[1]}"),
)
windows = st.lists(parts, min_size=1, max_size=4).map(",".join)


def meant(text: str, count: int) -> set[int]:
    """The steps that a window names, from its words."""
    found: set[int] = set()
    for part in text.split(","):
        if part.startswith(("first", "last")):
            word, number = part.split()
            every = list(range(count))
            found |= set(every[: int(number)] if word == "first" else every[::-1][: int(number)])
        else:
            low, dash, high = part.partition("-")
            found |= set(range(int(low), (int(high) if high else count) + 1 if dash else int(low) + 1))
    return found & set(range(count))


@pytest.mark.parametrize("text", ["5-20%", "5%-20%"])
def test_a_percent_sign_at_the_end_is_for_both_numbers(text: str) -> None:
    assert parse_percent(text) == parse_percent("0.05-0.2")


@pytest.mark.parametrize("text", ["20%-20%", "0.2-0.2", "0-0"])
def test_a_share_of_the_run_is_not_empty(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_percent(text)


@pytest.mark.parametrize("form", [list, lambda parts: ",".join(map(str, parts))])
def test_a_window_has_at_most_so_many_parts(form: Any) -> None:
    steps = range(0, 2 * MOST_PARTS, 2)
    assert len(parse_numbers(form(list(steps)), "steps")) == MOST_PARTS
    with pytest.raises(ConfigError):
        parse_numbers(form([*steps, 1]), "steps")


@given(windows, st.integers(1, 40))
def test_any_window_holds_at_the_steps_it_names(text: str, count: int) -> None:
    assert set(steps_that_hold(text, count)) == meant(text, count)


@given(windows)
def test_a_printed_window_reads_to_the_same(text: str) -> None:
    parsed = parse_numbers(text, "steps")
    assert parse_numbers(",".join(map(str, parsed)), "steps") == parsed
    named = parse_numbers(",".join(f"double_blocks.{part}" for part in text.split(",")), "blocks")
    assert parse_numbers(",".join(map(str, named)), "blocks") == named
    assert [part._replace(series="") for part in named] == list(parsed)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_printed_span_reads_to_the_same(one: float, other: float) -> None:
    parsed = parse_sigmas(f"{one!r}-{other!r}")
    assert parse_sigmas(str(parsed[0])) == parsed
    if one < other:
        parsed = parse_percent(f"{one!r}-{other!r}")
        assert parse_percent(str(parsed[0])) == parsed


# The step rule


@given(
    st.lists(st.floats(0.001, 1000), min_size=1, max_size=30, unique=True).map(lambda s: sorted(s, reverse=True)),
    st.floats(0.001, 1000),
    st.booleans(),
    windows,
)
def test_a_step_window_is_a_window_of_sigmas(sigmas: list[float], sigma: float, ends_at_zero: bool, text: str) -> None:
    schedule = [*sigmas, 0.0] if ends_at_zero else [*sigmas, sigmas[-1] / 2]
    table = Timetable((config(entry(steps=text)),), schedule)
    bound, count = sigma * (1 - 1e-4), len(sigmas)
    # From the definition: step i is from its own sigma down to above the next one; the first also takes what is above.
    here = {
        step
        for step, (high, low) in enumerate(pairwise(schedule))
        if (bound <= high or step == 0) and (bound > low or step == count - 1)
    }
    assert len(here) == 1
    expected = "sdpa_math" if here & meant(text, count) else "torch_sdpa"
    assert asked(table, sigma) == expected
    assert step_of(sigma, schedule) in (*here, count)


@pytest.mark.parametrize(
    ("sigma", "step"),
    [(1.0, 0), (1.2, 0), (0.95, 0), (0.90005, 1), (0.9, 1), (0.8, 1), (0.5, 3), (0.26, 3), (0.1, 4), (0.0, 4)],
)
def test_the_step_of_a_sigma(sigma: float, step: int) -> None:
    table = Timetable((config(*(entry(steps=str(number), blocks="") for number in range(5))),), FLOW)
    assert table.at(sigma) == {step}


def test_outside_a_sampler_only_entries_without_time_hold() -> None:
    table = Timetable((config(entry(steps="0-"), entry("sdpa_flash", blocks="0")),), (), blocks=("blocks.0",))
    assert asked(table, None) == "sdpa_flash"
    assert asked(table, 0.5, block="blocks.1") == "torch_sdpa"


def test_percent_goes_through_the_models_own_function() -> None:
    table = Timetable((config(entry(percent="20%-50%")),), FLOW, lambda percent: 10 * (1 - percent))
    assert [asked(table, sigma) == "sdpa_math" for sigma in (9, 8.001, 8, 6, 5, 4.99, 0)] == [
        False, False, True, True, True, False, False,
    ]  # fmt: skip
    start = Timetable((config(entry(percent="first 10%")),), FLOW, lambda percent: 10 * (1 - percent))
    assert asked(start, 12) == "sdpa_math", "noise that a sampler adds is still the beginning"


def test_sigma_windows_hold_at_both_ends() -> None:
    table = Timetable((config(entry(sigmas="0.5-0.9")),), FLOW)
    assert [sigma for sigma in FLOW if asked(table, sigma) == "sdpa_math"] == [0.9, 0.75, 0.5]


# Blocks and roles

FLUX = tuple(f"double_blocks.{i}" for i in range(3)) + tuple(f"single_blocks.{i}" for i in range(4))


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("0", ["double_blocks.0", "single_blocks.0"]),
        ("last 1", ["double_blocks.2", "single_blocks.3"]),
        ("single_blocks.last 2", ["single_blocks.2", "single_blocks.3"]),
        ("double_blocks 0-1,3", ["double_blocks.0", "double_blocks.1", "single_blocks.3"]),
        ("blocks.0", []),
    ],
)
def test_blocks_are_counted_in_each_series(text: str, blocks: list[str]) -> None:
    table = Timetable((config(entry(blocks=text)),), FLOW, blocks=FLUX)
    assert [block for block in FLUX if asked(table, 1.0, block=block) == "sdpa_math"] == blocks
    assert asked(table, 1.0, block="") == "torch_sdpa", "a call outside every block"


def test_the_numbers_of_blocks_are_those_in_their_names() -> None:
    unet = ("input_blocks.1", "input_blocks.4", "input_blocks.11", "middle_block.1", "blocks.block0", "blocks.block1")
    table = Timetable((config(entry(blocks="input_blocks.last 2, middle_block.1, blocks.block.1")),), FLOW, blocks=unet)
    found = [block for block in unet if asked(table, 1.0, block=block) == "sdpa_math"]
    assert found == ["input_blocks.4", "input_blocks.11", "middle_block.1", "blocks.block1"]


@pytest.mark.parametrize(
    ("role", "holds"),
    [("self", "self joint flux.double ltx2.audio_self"), ("joint", "joint flux.double"), ("flux.double", "flux.double"),
     ("", "self joint flux.double ltx2.audio_self cross"), ("cross", "cross")],
)  # fmt: skip
def test_a_role_is_matched_by_name_or_category(role: str, holds: str) -> None:
    roles = {"self": "self", "joint": "joint", "flux.double": "joint", "ltx2.audio_self": "self", "cross": "cross"}
    table = Timetable((config(entry(steps="0-", role=role)),), FLOW)
    assert [
        name for name, category in roles.items() if asked(table, 1.0, name, category) == "sdpa_math"
    ] == holds.split()


# What stands above what


def test_the_later_window_wins_and_it_is_said(snapshot: SnapshotAssertion) -> None:
    table = Timetable((config(entry(steps="0-2"), entry("sdpa_flash", steps="2-3")),), FLOW)
    found = [table.resolve(table.at(sigma), "self", "self", "") for sigma in FLOW[:5]]
    assert [choice.asked for choice, _ in found] == ["sdpa_math", "sdpa_math", "sdpa_flash", "sdpa_flash", "torch_sdpa"]
    overlap = found[2][1]
    assert overlap == snapshot
    assert [note for _, note in found] == ["", "", overlap, "", ""]


def test_equal_entries_do_not_quarrel() -> None:
    table = Timetable((config(entry(steps="0-2"), entry(steps="2-3")),), FLOW)
    assert table.resolve(table.at(0.75), "self", "self", "")[1] == ""


def test_a_schedule_stands_above_the_roles_of_its_own_configuration_only() -> None:
    top = config(entry("sdpa_flash", role="cross"), default="auto", per_role={"self": AttentionSpec("sdpa_math")})
    low = config(entry("sdpa_efficient", steps="0-"), source="low")
    table = Timetable((top, low), FLOW)
    assert asked(table, 1.0, "cross", "cross") == "sdpa_flash"
    assert asked(table, 1.0, "self", "self") == "sdpa_math", "a lower configuration does not reach over a higher one"
    assert asked(table, 1.0, "other", "other") == "sdpa_efficient"
    choice, _ = table.resolve(table.at(1.0), "other", "other", "")
    assert choice.source == "low.schedule[0] (steps 0-)"
    assert resolve((top, low), "cross", "cross").asked == "torch_sdpa", "without a place in a run there is no schedule"


def test_auto_says_nothing() -> None:
    assert config(entry("auto", steps="0-1")).schedule == ()


def test_what_never_held_is_told_with_the_reason(snapshot: SnapshotAssertion) -> None:
    table = Timetable((config(entry(steps="9"), entry(blocks="7"), entry(role="cross")),), FLOW, blocks=("blocks.0",))
    asked(table, 1.0)
    never, block, role = table.unused(["self"])
    assert never == snapshot
    assert block == snapshot
    assert role == snapshot
    asked(table, 1.0, "cross", "cross")
    assert len(table.unused(["self"])) == 2


def test_a_sampler_with_sigmas_of_its_own_is_told(snapshot: SnapshotAssertion) -> None:
    table = Timetable((config(entry(steps="1-2,last 1"), entry(sigmas="1-0")),), FLOW)
    assert table.between(0.9) == table.between(0.75) == ""
    assert table.between(0.8) == snapshot
    assert Timetable((config(entry(sigmas="1-0")),), FLOW).between(0.8) == ""


# Every form of a configuration

WRITTEN = {
    "dict": {"default": "sdpa_flash", "schedule": [{"backend": "native", "steps": "0-1,last 2", "role": "self"}]},
    "list of numbers": {"default": "sdpa_flash",
                        "schedule": [{"backend": "native", "steps": ["0-1", "last 2"], "role": "self"}]},
    "one entry": {"default": "sdpa_flash", "schedule": {"backend": "native", "steps": "0-1,last 2", "role": "self"}},
    "json": '{"default": "sdpa_flash", "schedule": [{"backend": "native", "steps": "0-1,last 2", "role": "self"}]}',
    "yaml": "default: sdpa_flash\nschedule:\n- backend: native\n  steps: 0-1,last 2\n  role: self\n",
    "flags": "backend=sdpa_flash schedule.0.backend=native schedule.0.steps='0-1,last 2' schedule.0.role=self",
    "flags without a space": "backend=sdpa_flash,schedule.0.backend=native,schedule.0.steps=0-1,last2,"
    "schedule.0.role=self",
    "JSON in a flag": "backend=sdpa_flash "
    """schedule='[{"backend": "native", "steps": "0-1,last 2", "role": "self"}]'""",
}  # fmt: skip


@pytest.mark.parametrize("form", WRITTEN)
def test_every_form_reads_to_one(form: str) -> None:
    found = parse_config(WRITTEN[form])
    assert found.schedule == (entry("torch_sdpa", steps="0-1,last 2", role="self"),)
    assert found.default.backend == "sdpa_flash"


FULL = config(
    entry("torch_sdpa", steps="0-1,last 2"),
    entry("sdpa_math", percent="20%-80%", blocks="double_blocks.0-1,38,last 2", role="ltx2.audio_self"),
    ScheduleEntry(AttentionSpec("sage_attn", {"smooth_k": False}), sigmas=parse_sigmas("14.6-1e-3")),
)


@pytest.mark.parametrize("form", ["json", "yaml", "flags"])
def test_what_is_printed_reads_to_the_same(form: str) -> None:
    assert parse_config(getattr(printed, f"to_{form}")(FULL)) == FULL
    assert parse_config(to_dict(FULL)) == FULL
    assert hash(parse_config(getattr(printed, f"to_{form}")(FULL))) == hash(FULL)


def test_flags_are_dotted() -> None:
    assert "schedule.0.backend=torch_sdpa schedule.0.steps='0-1,last 2'" in to_flags(FULL)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({"steps": "0"}, id="no backend"),
        pytest.param([{"backend": "sdpa"}, {"backend": "sdpa", "step": "0"}], id="nowhere"),
        pytest.param([{"backend": "sdpa", "steps": "0", "step": "0"}], id="a slip"),
        pytest.param([{"backend": "sdpa", "steps": "3-0"}], id="steps backwards"),
        pytest.param([{"backend": "sdpa", "steps": "0", "extra": {"x": 1}}], id="an option"),
        pytest.param(["sdpa"], id="a name alone"),
        pytest.param({"1": {"backend": "sdpa", "steps": "0"}}, id="numbered from 1"),
        pytest.param(3, id="a number"),
    ],
)
def test_a_wrong_entry_is_named(value: Any, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"schedule": value})
    assert str(caught.value) == snapshot


def test_an_unknown_backend_is_named_with_its_entry() -> None:
    with pytest.raises(UnknownBackendError, match=r"config.schedule\[0\]: .*sdpaa"):
        parse_config({"schedule": [{"backend": "sdpaa", "steps": "0"}]})


# vLLM-Omni's form


def foreign(**said: Any) -> dict[str, Any]:
    profiles = {
        "dense": {"default": {"backend": "TORCH_SDPA"}},
        "mixed": {"per_role": {"ltx2.audio_self": "SDPA", "self": "FLASH_ATTN"}},
    }
    return {"diffusion_attention_schedule": {"profiles": profiles, **said}}


def test_profiles_with_half_open_ranges(snapshot: SnapshotAssertion) -> None:
    ranges = [{"start": 2, "end": 5, "profile": "dense"}, {"start": 6, "end": None, "profile": "mixed"}]
    found = parse_config({"diffusion_attention_config": {"default": "CUDNN_ATTN"}, **foreign(default=ranges)})
    assert [entry.describe() for entry in found.schedule] == ["steps 2-4", "steps 6-, role self",
                                                              "steps 6-, role ltx2.audio_self"]  # fmt: skip
    sigmas = [1 - i / 8 for i in range(9)]
    table = Timetable((found,), sigmas)
    words = {"torch_sdpa": "A", "cudnn_attn": "D", "flash_attn": "F"}
    assert "".join(words[asked(table, sigma) or ""] for sigma in sigmas[:8]) == "DDAAADFF"
    assert asked(table, sigmas[7], "ltx2.audio_self", "self") == "torch_sdpa", "the exact role over its category"
    assert next(note for note in found.notes if "profiles.mixed" in note) == snapshot
    again = parse_config(to_dict(found))
    assert again.schedule == found.schedule


def test_profiles_with_sigma_windows() -> None:
    windows = [{"low": 0.0, "high": 0.3, "profile": "dense"}]
    table = Timetable((parse_config({"default": "fa", **foreign(sigma=windows)}),), FLOW)
    assert [asked(table, sigma) for sigma in (0.0, 0.3, 0.31)] == ["torch_sdpa", "torch_sdpa", "flash_attn"]


def test_its_flag_in_a_command_line() -> None:
    text = json.dumps(foreign(default=[{"start": 0, "end": 1, "profile": "dense"}])["diffusion_attention_schedule"])
    line = f"vllm-omni serve x --diffusion-attention-backend FLASH_ATTN --diffusion-attention-schedule '{text}'"
    assert parse_config(line).schedule == (entry("torch_sdpa", steps="0"),)


@pytest.mark.parametrize(
    "said",
    [
        pytest.param({"default": [{"start": True, "end": 2, "profile": "dense"}]}, id="start that is no number"),
        pytest.param({"default": [{"start": 3, "end": 3, "profile": "dense"}]}, id="empty range"),
        pytest.param({"default": [{"start": 0, "end": 1, "profile": "other"}]}, id="unknown profile"),
        pytest.param({"sigma": [{"low": 0.5, "high": 1.5, "profile": "dense"}]}, id="sigma above 1"),
        pytest.param({"sigma": [{"low": None, "high": 1, "profile": "dense"}]}, id="low that is no number"),
        pytest.param(
            {"sigma": [{"low": 0, "high": 1, "profile": "dense"}], "default": [{"start": 0, "profile": "dense"}]},
            id="ranges and windows",
        ),
        pytest.param({"ranges": []}, id="a slip"),
        pytest.param({"profiles": {"x": {"default": "sdpa", "strict": True}}}, id="strict in a profile"),
        pytest.param({"profiles": {"x": {"default": "sdpaa"}}}, id="unknown backend"),
    ],
)  # fmt: skip
def test_what_its_schedules_cannot_say_here(said: dict[str, Any], snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_config(foreign(**said))
    assert str(caught.value).partition(" the names are")[0] == snapshot


def test_both_schedules_at_once_are_refused(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"schedule": {"backend": "sdpa", "steps": "0"}, **foreign()})
    assert str(caught.value) == snapshot


# Where no sampler runs


def test_outside_comfyui_a_schedule_over_time_says_that_it_has_no_effect(snapshot: SnapshotAssertion) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    query = torch.zeros(1, 2, 8, 64)
    request = AttentionCall(query, query, query).request()
    layers = (config(entry(steps="0-"), entry("sdpa_flash", role="cross")),)
    session = Session(Router(detect(torch.device("cpu"))), layers)
    assert session.plan(CallKind(request, "self", "self")).plan.decision.asked == "torch_sdpa"
    assert session.plan(CallKind(request, "cross", "cross")).plan.decision.asked == "sdpa_flash"
    assert list(session.run_report.notes) == snapshot


def test_explain_names_the_windows_that_it_cannot_place(
    capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    written = "backend=torch_sdpa schedule.0.backend=sdpa_math schedule.0.steps=0-1 schedule.0.role=self"
    where = ("explain", "--platform", "cpu", "--config", written, "--role")
    assert main([*where, "joint"]) == 0
    assert next(line for line in capsys.readouterr().out.splitlines() if "schedule[0]" in line) == snapshot
    assert main([*where, "cross"]) == 0
    assert "schedule" not in capsys.readouterr().out
