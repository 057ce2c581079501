"""What is recommended by model family: in tiny real models, where it is switched on, off, and overruled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_models  # noqa: E402
import tiny_sampling  # noqa: E402
from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.config import print as printed  # noqa: E402
from attention_backends.backends.config.layers import Choice  # noqa: E402
from attention_backends.backends.config.schedule import ScheduleEntry, is_scheduled  # noqa: E402
from attention_backends.backends.config.text import parse_config  # noqa: E402
from attention_backends.backends.config.timetable import Timetable  # noqa: E402
from attention_backends.backends.engine.plan import CallKind  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.observe import observe  # noqa: E402
from attention_backends.backends.observe.advisories import (  # noqa: E402
    ADVISORIES,
    FP4,
    NOT_USED,
    QUANTIZED,
    UNROTATED_INT8,
    for_family,
    unused_advisories,
)
from attention_backends.backends.report import RunReport  # noqa: E402
from attention_backends.backends.report.audit import AS_ASKED, asked_and_ran  # noqa: E402
from attention_backends.backends.values.errors import ConfigError  # noqa: E402
from attention_backends.backends.values.platform import parse_platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall, parse_request  # noqa: E402
from attention_backends.devtools.pages.recommended import recommended_page  # noqa: E402
from hook_side import (  # noqa: E402
    Kernel,
    host,
    last_run,
    model_call,
    nodes_module,
    plain_comfyui,
    rows,
    sampling,
    sites,
    stand_in,
)

ROOT = Path(__file__).resolve().parents[2]
INT8 = "emulated_int8"
EXACT = "torch_sdpa"
Rows = dict[tuple[str, str, str, str], int]


# The table


def test_the_rows_are_complete() -> None:
    roles = nodes_module("hook.roles")
    families = {family.name: family for family in roles.FAMILIES}
    lossy = {backend.id for backend in BACKENDS.values() if backend.accuracy != "exact"}
    for row in ADVISORIES:
        assert set(row.families) <= set(families), row.title
        assert set(row.backends) <= lossy, row.title
        assert row.evidence in ("measured", "reported", "assumed")
        assert all((row.title, row.what, row.kernels, row.reason, row.source)), row.title
        assert row.where.spec.is_auto
        for name in row.families:
            of_family = {
                part
                for _, found in families[name].roles_at_paths
                for role in found
                for part in (role.name, role.category)
            }
            assert not row.where.role or row.where.role in of_family
    listed = [name for row in ADVISORIES for name in row.families]
    assert len(listed) == len(set(listed))


def test_the_families_of_the_issue_have_a_row_each() -> None:
    said = {name: (row.where.describe(), row.backends) for row in ADVISORIES for name in row.families}
    assert said == {
        "qwen_image": ("masked calls", QUANTIZED),
        "lumina2": ("masked calls", QUANTIZED),
        "ltx2": ("role cross", QUANTIZED),
        "ltxv": ("role cross", QUANTIZED),
        "minimax_h3": ("blocks blocks.last 3", UNROTATED_INT8),
        "wan": ("steps first 1,last 1", FP4),
    }


def test_the_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "recommended.md").read_text(encoding="utf-8")
    assert written == recommended_page(), "docs/recommended.md is stale; write it with: python3 dev.py docs"


@pytest.mark.parametrize(
    ("family", "asked", "accuracy", "concerned"),
    [
        ("ltxv", INT8, "exact", True),
        ("ltxv", "sage_attn_3", "exact", True),
        ("ltxv", EXACT, "quantized", False),
        ("ltxv", None, "exact", False),
        ("ltxv", None, "quantized", True),  # the route of some card takes sage_attn then
        ("wan", "sage_attn_3", "exact", True),
        ("wan", "sage_attn", "exact", False),
        ("wan", None, "sparse", False),  # no route takes FP4 by itself
        ("minimax_h3", "sage_attn", "exact", True),
        ("minimax_h3", "comfy_kitchen_int8", "exact", False),
        ("minimax_h3", "comfy", "exact", False),
        ("flux", INT8, "exact", False),
    ],
)
def test_what_a_row_concerns(family: str, asked: str | None, accuracy: str, concerned: bool) -> None:
    assert any(row.applies_to(asked, accuracy) for row in for_family(family)) is concerned
    layers = (AttentionConfig(AttentionSpec(asked or "auto"), accuracy=accuracy, recommended=for_family(family)),)
    assert is_scheduled(layers) is concerned, "what does not matter costs nothing"


# Where it stands among what a person says


def layers(**said: Any) -> tuple[AttentionConfig, ...]:
    default = AttentionSpec(said.pop("default", INT8))
    return (AttentionConfig(default, recommended=for_family(said.pop("family", "ltxv")), source="node", **said),)


SAID = "recommended for LTX: cross-attention exact"


def asked(found: tuple[AttentionConfig, ...], role: str, category: str, **place: Any) -> Choice:
    timetable = Timetable(found, place.pop("sigmas", ()), blocks=("blocks.0",))
    return timetable.resolve(timetable.at(place.get("sigma")), role, category, "blocks.0")[0]


def test_it_stands_above_defaults_and_below_everything_else() -> None:
    assert asked(layers(), "cross", "cross") == Choice(None, SAID, accuracy="exact")
    assert asked(layers(), "ltx2.audio_to_video", "cross").source == SAID
    assert asked(layers(), "self", "self") == Choice(INT8, "node.default")
    for name in ("ltx2.audio_to_video", "cross"):
        named = asked(layers(per_role={name: AttentionSpec("sage_attn")}), "ltx2.audio_to_video", "cross")
        assert (named.asked, named.accuracy) == ("sage_attn", None)
    entry = ScheduleEntry(AttentionSpec("sage_attn"), blocks="0")
    assert asked(layers(schedule=(entry,)), "cross", "cross").asked == "sage_attn"
    # What a file says of the role counts as well, though a node's default would have stood above it.
    file = AttentionConfig(per_role={"cross": AttentionSpec("sage_attn")}, source="file")
    auto = layers(default="auto", accuracy="quantized")
    assert asked((*auto, file), "cross", "cross").asked == "sage_attn"
    assert asked((*auto, AttentionConfig(AttentionSpec(INT8), source="file")), "cross", "cross").source == SAID


def test_fp4_in_the_first_and_last_step(snapshot: SnapshotAssertion) -> None:
    """What Wan with SageAttention 3 gets in each of five steps."""
    sigmas = (1.0, 0.9, 0.7, 0.4, 0.2, 0.0)
    found = layers(family="wan", default="sage_attn_3")
    chosen = [asked(found, "self", "self", sigmas=sigmas, sigma=sigma) for sigma in sigmas[:-1]]
    assert [choice.asked for choice in chosen] == [None, *["sage_attn_3"] * 3, None]
    assert chosen[0].source == chosen[-1].source
    assert chosen[0].source == snapshot
    assert Timetable(found, sigmas).timed
    assert not Timetable(layers(family="wan"), sigmas).timed, "with INT8 no sigma is read from the device"


def test_the_route_stays_exact_there() -> None:
    """`auto` that may take lossy kernels, on a card whose route has some; and after an exact kernel has failed."""
    router = Router(parse_platform("cuda:8.9,packages=sageattention==2.2.0;triton==3.4.0;flash-attn==2.8.3"))
    request = parse_request("batch=1,num_heads=2,q_len=64,head_dim=64")
    lossy = router.select(request, Choice(None, "platform route"), accuracy="quantized").backend
    assert BACKENDS[lossy].accuracy == "quantized"
    choice = asked(layers(default="auto", accuracy="quantized"), "cross", "cross")
    decision = router.select(request, choice, accuracy="quantized")
    assert BACKENDS[decision.backend].accuracy == "exact"
    assert (decision.source, decision.accuracy, decision.asked) == (SAID, "exact", None)
    failed = {(decision.backend, (), request): "RuntimeError: broken"}
    again = Choice(decision.asked, decision.source, decision.asked_options, decision.accuracy)
    assert BACKENDS[router.select(request, again, accuracy="quantized", failed=failed).backend].accuracy == "exact"


def test_in_a_session_it_comes_before_the_checkpoint_and_is_as_asked() -> None:
    session = observe(Session(Router(detect(torch.device("cpu"))), layers(strict=True)))
    query = torch.randn(1, 2, 8, 16)
    call = AttentionCall(query, query, query)
    prefers = Choice("comfy", "the checkpoint's own preference")
    for role in ("self", "cross"):
        session.attention(session.plan(CallKind(call.request(), role, role), preferred=prefers), call)
    ran = {row.role: (row.backend, row.source, row.reason) for row in session.run_report.rows.values()}
    assert ran == {"self": (INT8, "node.default", None), "cross": (EXACT, SAID, None)}
    assert {finding.verdict for finding in asked_and_ran(session.run_report)} == {AS_ASKED}


def test_after_a_kernel_has_failed_the_next_one_is_exact_too() -> None:
    """Where lossy kernels are allowed for the run, and come first on this machine's route."""

    def broken(call: Any) -> Any:
        raise RuntimeError("no")

    router = Router(detect(torch.device("cpu")), {**BACKENDS, EXACT: Kernel(EXACT, broken)})
    router.priority = router.priority._replace(lossy=(INT8,), order=(EXACT, "sdpa_math"))
    session = observe(Session(router, layers(default="auto", accuracy="quantized")))
    query = torch.randn(1, 2, 8, 16)
    call = AttentionCall(query, query, query)
    for role in ("self", "cross"):
        session.attention(session.plan(CallKind(call.request(), role, role)), call)
    ran = {row.role: (row.backend, row.source) for row in session.run_report.rows.values() if row.calls}
    assert ran == {"self": (INT8, "platform route"), "cross": ("sdpa_math", SAID)}


@pytest.mark.parametrize(
    ("source", "offered"),
    [("node.default", 1), ("node.default: autotune (the fastest here)", 1), ("node.per_role['cross']", 0)],
)
def test_what_is_offered_depends_on_whose_word_it_was(source: str, offered: int) -> None:
    run_report = RunReport(layers=(replace(layers()[0], recommended=()),))
    run_report.categories["ltx2.audio_to_video"] = "cross"
    run_report.row("ltx2.audio_to_video", "transformer_blocks.0", INT8, source, "none", None, INT8).calls = 1
    assert len(unused_advisories("ltx2", run_report)) == offered
    assert unused_advisories("flux", run_report) == []
    assert unused_advisories("ltx2", replace(run_report, layers=layers())) == [], "it was on"


# Masked calls, as an entry of any schedule


def test_an_entry_for_masked_calls(snapshot: SnapshotAssertion) -> None:
    config = parse_config({"default": INT8, "schedule": [{"backend": "sdpa_math", "masked": True, "role": "joint"}]})
    (entry,) = config.schedule
    assert (entry.masked, entry.describe()) == (True, "role joint, masked calls")
    for form in ("json", "yaml", "flags"):
        assert parse_config(getattr(printed, f"to_{form}")(config)).schedule == config.schedule
    timetable = Timetable((config,))
    for masked, backend in ((True, "sdpa_math"), (False, INT8)):
        assert timetable.resolve(timetable.at(None), "joint", "joint", "", masked)[0].asked == backend
    with pytest.raises(ConfigError) as caught:
        ScheduleEntry(AttentionSpec(EXACT), masked="perhaps")
    assert str(caught.value) == snapshot  # type: ignore[arg-type]


# In real models


def selected(model: Any, backend: str = INT8, *, accuracy: str = "exact", **more: bool) -> Any:
    """The selector's own `execute`; without `recommended` as a graph from before it was there."""
    node = nodes_module("configure.selector").AttentionBackendSelector
    return node.execute(model, backend, accuracy, False, "off", **more).args[0]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_comfyui(monkeypatch)


def ran(record: dict[str, Any] | None = None) -> Rows:
    found: Rows = {}
    for row in (record or last_run())["rows"]:
        key = row["role"], row["block"], row["backend"], row["source"]
        found[key] = found.get(key, 0) + row["calls"]
    return found


def recommendations(record: dict[str, Any] | None = None) -> list[str]:
    return [note for note in (record or last_run())["notes"] if note.startswith("recommended for")]


H3_BLOCKS = 5
CASES = {
    "qwen_image_masked": lambda role, block: True,
    "ltxv": lambda role, block: role == "cross",
    "ltxav": lambda role, block: role in ("cross", *(f"ltx2.{part}" for part in AV_CROSS)),
    "minimax_h3": lambda role, block: block in ("blocks.2", "blocks.3", "blocks.4"),
}
"""Model -> whether a call is concerned."""
AV_CROSS = ("audio_text_cross", "audio_to_video", "video_to_audio")
TITLES = {"qwen_image_masked": "Qwen-Image", "ltxv": "LTX", "ltxav": "LTX", "minimax_h3": "MiniMax H3"}


def built(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    reason = tiny_sampling.unavailable(name)
    if reason is not None:
        pytest.skip(reason)
    if name == "minimax_h3":
        family = tiny_models.FAMILIES[name]
        deeper = replace(family, unet={**family.unet, "num_layers": H3_BLOCKS})
        monkeypatch.setitem(tiny_models.FAMILIES, name, deeper)
    return tiny_sampling.build(name)


@pytest.mark.comfy
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", CASES)
def test_on_and_off_in_a_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(name, monkeypatch)
    tiny_sampling.sample(selected(model), name)
    before = last_run()
    assert {row["backend"] for row in before["rows"]} == {INT8}
    assert {row["source"] for row in before["rows"]} == {"node.default"}
    (note,) = recommendations(before)
    assert note.startswith(f"recommended for {TITLES[name]}: ")
    assert note.endswith(f"); {NOT_USED}")

    tiny_sampling.sample(selected(model, recommended=True), name)
    run = last_run()
    assert recommendations(run) == []
    source = note.partition(" (")[0]
    expected = {
        (
            row["role"],
            row["block"],
            *((EXACT, source) if CASES[name](row["role"], row["block"]) else (INT8, "node.default")),
        ): row["calls"]
        for row in before["rows"]
    }
    assert ran(run) == expected
    assert {backend for _, _, backend, _ in expected} == ({EXACT} if name == "qwen_image_masked" else {EXACT, INT8})
    assert {finding["verdict"] for finding in run["audit"]} == {AS_ASKED}
    text = nodes_module("report.report").as_text({"run": run})
    assert "fallback" not in text


@pytest.mark.comfy
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", ["qwen_image", "z_image", "lumina2"])
def test_without_masks_nothing_is_said_or_changed(name: str, snapshot: SnapshotAssertion) -> None:
    """ComfyUI gives Z-Image and Lumina 2 no mask, and Qwen-Image none where nothing is padded."""
    model = tiny_sampling.build(name)
    tiny_sampling.sample(selected(model), name)
    assert recommendations() == []
    tiny_sampling.sample(selected(model, recommended=True), name)
    assert {(backend, source) for _, _, backend, source in ran()} == {(INT8, "node.default")}
    assert recommendations() == snapshot


HIDING = torch.ones(1, 1, 6, dtype=torch.bool)
HIDING[..., 4:] = False
BIAS = torch.full((1, 1, 6), -0.5)
MASKS = {"none": None, "hides": HIDING, "weighs": BIAS, "says nothing": torch.ones_like(HIDING)}


@pytest.mark.parametrize("mask", MASKS)
def test_a_masked_call_of_z_image(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an older ComfyUI made it; two calls of one module with equal shapes, one of them masked."""
    model = stand_in(["NextDiT"], {"layers.0.attention": "JointAttention"})
    ours = host.Override(layers(family="lumina2"))
    run = sampling.Run(ours)
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: run}
    given = (rows(6), rows(6, 1), rows(6, 2), 2)
    calls = [(given, {"transformer_options": options}), (given, {"transformer_options": options, "mask": MASKS[mask]})]
    for _ in range(2):
        model_call(model, options, lambda: model.get_submodule("layers.0.attention")(calls))
    run.close()
    counted: dict[str, int] = {}
    for row in run.run_report.rows.values():
        counted[row.backend] = counted.get(row.backend, 0) + row.calls
    assert counted == ({INT8: 2, EXACT: 2} if mask in ("hides", "weighs") else {INT8: 4})
    # The same account made without it: the offer is made where it would have made a difference.
    off = sampling.Run(host.Override((replace(layers()[0], recommended=()),)))
    off.family, off.run_report.rows = (
        "lumina2",
        {key: replace(row, source="node.default", backend=INT8) for key, row in run.run_report.rows.items()},
    )
    off.run_report.categories = run.run_report.categories
    off.offer()
    assert len(off.run_report.notes) == (mask in ("hides", "weighs"))


@pytest.mark.comfy
@pytest.mark.usefixtures("quiet")
def test_the_first_and_last_step_of_wan(monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion) -> None:
    """Through the real sampler, with a kernel that goes by SageAttention 3's name."""
    steps: dict[str, set[int]] = {}

    def kernel(name: str) -> Any:
        def run(call: Any) -> torch.Tensor:
            steps.setdefault(name, set()).add(sites.current_model_call().step)
            return torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value, call.attn_mask)

        return run

    kernels = {
        "sage_attn_3": Kernel("sage_attn_3", kernel("sage_attn_3"), "quantized"),
        EXACT: Kernel(EXACT, kernel(EXACT)),
    }
    router = Router(detect(torch.device("cpu")), {**BACKENDS, **kernels})
    monkeypatch.setattr(sampling, "router_for", lambda device: router)
    model = tiny_sampling.build("wan")
    tiny_sampling.sample(selected(model, "sage_attn_3", recommended=True), "wan", steps=5, sampler="dpmpp_2s_ancestral")
    assert steps == {EXACT: {0, 4}, "sage_attn_3": {1, 2, 3}}
    steps.clear()
    tiny_sampling.sample(selected(model, "sage_attn_3"), "wan", steps=5)
    assert steps == {"sage_attn_3": {0, 1, 2, 3, 4}}
    assert recommendations() == snapshot
    tiny_sampling.sample(selected(model), "wan")
    assert recommendations() == [], "there is nothing against INT8"


@pytest.mark.comfy
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("first", ["selector", "person"])
def test_what_a_person_names_wins(first: str) -> None:
    model = tiny_sampling.build("ltxv")
    role = nodes_module("configure.per_role").PerRoleAttentionConfig
    window = nodes_module("configure.schedule").AttentionSchedule

    def sampled(person: Any, recommended: bool = True) -> set[tuple[str, str]]:
        if first == "selector":
            patched = person(selected(model, recommended=recommended))
        else:
            patched = selected(person(model), recommended=recommended)
        tiny_sampling.sample(patched, "ltxv", steps=3)
        return {(backend, source) for name, _, backend, source in ran() if name == "cross"}

    def named(given: Any) -> Any:
        return role.execute(given, "cross", INT8, "").args[0]

    def scheduled(given: Any) -> Any:
        return window.execute(given, INT8, "steps", "0", "", "").args[0]

    assert sampled(named) == {(INT8, "node.per_role['cross']")}
    assert sampled(named, recommended=False) == {(INT8, "node.per_role['cross']")}
    assert recommendations() == [], "a person named it, so nothing is offered"
    assert sampled(scheduled) == {(INT8, "node.schedule[0] (steps 0)"), (EXACT, SAID)}


@pytest.mark.comfy
@pytest.mark.usefixtures("quiet")
def test_other_families_and_exact_kernels() -> None:
    flux, ltx = tiny_sampling.build("flux"), tiny_sampling.build("ltxv")
    for on in (False, True):
        tiny_sampling.sample(selected(flux, recommended=on), "flux")
        assert {(backend, source) for _, _, backend, source in ran()} == {(INT8, "node.default")}
        assert recommendations() == []
        told = [note for note in last_run()["notes"] if note.startswith("exceptions for this model")]
        assert len(told) == on
        assert all("flux with emulated_int8" in note for note in told)
        for backend in ("auto", EXACT):
            tiny_sampling.sample(selected(ltx, backend, recommended=on), "ltxv")
            assert recommendations() == []
            assert not any(source.startswith("recommended") for *_, source in ran())


@pytest.mark.comfy
@pytest.mark.usefixtures("quiet")
def test_a_later_selector_decides_and_other_nodes_leave_it() -> None:
    model = tiny_sampling.build("ltxv")
    on = selected(model, recommended=True)
    patch = nodes_module("hook.patch")

    def rows_of(given: Any) -> tuple[str, ...]:
        return tuple(row.title for row in patch.current_config(given).recommended)

    assert rows_of(on) == ("LTX",)
    assert rows_of(model) == ()
    assert rows_of(selected(on, recommended=False)) == ()
    assert rows_of(selected(on)) == (), "a graph from before the input was there"
    assert rows_of(patch.set_role(on, "self", AttentionSpec(EXACT))) == ("LTX",)
    assert rows_of(patch.set_config(on, AttentionConfig(AttentionSpec("sage_attn")))) == ("LTX",)
    assert rows_of(patch.set_default(on, EXACT, accuracy="exact", strict=False, guard="off")) == ("LTX",)


@pytest.mark.comfy
@pytest.mark.usefixtures("quiet")
def test_the_input_may_be_missing() -> None:
    inputs = nodes_module("configure.selector").AttentionBackendSelector.define_schema().inputs
    order = ["model", "backend", "accuracy", "strict", "guard", "recommended", "model_2", "extra"]
    assert [one.id for one in inputs] == order
    last = inputs[5]
    assert (last.optional, last.default, last.display_name) == (True, False, "exceptions for this model")
