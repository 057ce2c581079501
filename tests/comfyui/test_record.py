"""A record of a run is small and honest, and repeats it: the same seed gives the same numbers, call by call."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from attention_backends.backends.config import AttentionConfig, AttentionSpec  # noqa: E402
from attention_backends.backends.config.layers import asks_for_autotune  # noqa: E402
from attention_backends.backends.config.print import to_json  # noqa: E402
from attention_backends.backends.config.recorded import FORMAT, MARK, normal  # noqa: E402
from attention_backends.backends.config.schedule import ScheduleEntry  # noqa: E402
from attention_backends.backends.config.text import parse_config  # noqa: E402
from attention_backends.backends.engine.plan import CallKind  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.engine.session import Session  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.observe import observe  # noqa: E402
from attention_backends.backends.observe.autotune.store import Store  # noqa: E402
from attention_backends.backends.observe.autotune.tuner import Tuner  # noqa: E402
from attention_backends.backends.observe.replay.record import as_record, facts_of, ranges  # noqa: E402
from attention_backends.backends.observe.replay.run_recorder import RunRecorder  # noqa: E402
from attention_backends.backends.values.errors import (  # noqa: E402
    ConfigError,
    NoBackendError,
)
from attention_backends.backends.values.platform import parse_platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall, AttentionRequest  # noqa: E402
from guarded_runs import LOSSY, Lossy, sdpa  # noqa: E402
from hook_side import (  # noqa: E402
    Kernel,
    comfyui,
    last_run,
    no_environment,
    nodes_module,
    sampling,
    selected,
    sites,
    with_role,
)
from measured_machines import Clock  # noqa: E402

comfy_only = pytest.mark.comfy
Data = dict[str, Any]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    no_environment(monkeypatch)


def build(family: str) -> Any:
    comfyui()
    return tiny_sampling.build(family)


def record() -> Data:
    """That of the last run, as it comes out of a file."""
    runs = nodes_module("history.runs")
    made = as_record([runs.decisions(last_run()["number"])], {"comfyui": "0.33.0"})
    found: Data = json.loads(json.dumps(made))
    return found


def replayed(model: Any, kept: Data) -> Any:
    """What Attention Config From Text gives for a model and a pasted record."""
    return nodes_module("hook.patch").set_config(model, parse_config(json.dumps(kept), "text", read_files=False))


def ran(kept: Data) -> dict[tuple[str, str], list[tuple[int, str]]]:
    """(role, block range) -> what ran from which model call on."""
    return {
        (entry["role"], blocks): [(one["from_model_call"], one["backend"]) for one in entry["ran"]]
        for entry in kept["runs"][0]["decisions"]
        for blocks in entry["blocks"]
    }


def kernels_of_model_calls() -> list[Any]:
    """For each window of the last run, in order, its cells as (role, block, backend, mask, calls)."""
    (found,) = [nodes_module("history.runs").find(last_run()["number"])]
    names = [(row["role"], row["block"], row["backend"], row["mask"]) for row in found["rows"]]
    windows = [(one["first"], one["last"], sorted((names[row], n) for row, n, _ in one["cells"]))
               for one in found["windows"]]  # fmt: skip
    return windows


@comfy_only
@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "flux_masked", "ltxv"])
def test_another_backend_by_role_is_repeated(family: str) -> None:
    model = build(family)
    exact = tiny_sampling.sample(selected(model, "torch_sdpa"), family, steps=2)
    role = {"wan": "cross", "ltxv": "cross"}.get(family, "joint")
    made = tiny_sampling.sample(with_role(selected(model, "sdpa_math"), role, "emulated_int8"), family, steps=2)
    assert not torch.equal(made, exact), "the kernels of this test do not differ"
    before, kept = kernels_of_model_calls(), record()
    again = tiny_sampling.sample(replayed(model, kept), family, steps=2)
    assert torch.equal(again, made)
    assert kernels_of_model_calls() == before
    assert kept["runs"][0]["steady"] is True
    assert {row["source"] for row in last_run()["rows"]} == {f"record of {last_run()['model']} (text)"}
    assert last_run()["notes"] == []
    second = record()["runs"][0]["decisions"]
    for one in (*kept["runs"][0]["decisions"], *second):  # a record of a replay is the same but for the sources
        for part in one["ran"]:
            del part["source"]
    assert second == kept["runs"][0]["decisions"]


@comfy_only
def test_a_masked_call_that_ran_whole_runs_whole_again() -> None:
    """ComfyUI's own attention gets the mask as it is, where other backends get the keys that are left."""
    family = "ltxv"
    model = build(family)
    made = tiny_sampling.sample(selected(model, "comfy"), family)
    before = kernels_of_model_calls()
    assert {mask for _, _, cells in before for (_, _, _, mask), _ in cells} == {"bias", "none"}
    assert torch.equal(tiny_sampling.sample(replayed(model, record()), family), made)
    assert kernels_of_model_calls() == before


def scheduled(model: Any, *entries: ScheduleEntry) -> Any:
    for entry in entries:
        model = nodes_module("hook.patch").add_to_schedule(model, entry)
    return model


@comfy_only
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_sde"])
def test_windows_are_repeated_without_the_schedule(sampler: str, snapshot: SnapshotAssertion) -> None:
    """The first and the last step, which is one window twice; a role in the middle; one block always."""
    model = build("wan")
    entries = (
        ScheduleEntry(AttentionSpec("emulated_int8"), steps="0,last 1"),
        ScheduleEntry(AttentionSpec("sdpa_math"), steps="2", role="cross"),
        ScheduleEntry(AttentionSpec("emulated_int8"), blocks="1", role="self"),
    )
    how = {"steps": 5, "sampler": sampler}
    made = tiny_sampling.sample(scheduled(selected(model, "torch_sdpa"), *entries), "wan", **how)
    before, kept = kernels_of_model_calls(), record()
    if sampler == "euler":
        assert ran(kept) == {
            ("self", "blocks.0"): [(1, "emulated_int8"), (2, "torch_sdpa"), (5, "emulated_int8")],
            ("self", "blocks.1"): [(1, "emulated_int8")],
            ("cross", "blocks.0-1"): [(1, "emulated_int8"), (2, "torch_sdpa"), (3, "sdpa_math"), (4, "torch_sdpa"),
                                      (5, "emulated_int8")],
        }  # fmt: skip
    assert kept["runs"][0]["steady"] is True, "a schedule is no surprise"
    again = tiny_sampling.sample(replayed(model, kept), "wan", **how)
    assert torch.equal(again, made)
    assert kernels_of_model_calls() == before
    assert last_run()["notes"] == []
    tiny_sampling.sample(replayed(model, kept), "wan", steps=3, sampler=sampler)
    (note,) = last_run()["notes"]
    assert str(kept["runs"][0]["model_calls"]) in note
    assert note == snapshot


def use(monkeypatch: pytest.MonkeyPatch, *backends: Any) -> None:
    router = Router(detect(torch.device("cpu")), {**BACKENDS, **{one.id: one for one in backends}})
    monkeypatch.setattr(sampling, "router_for", lambda device: router)


def wrong_from_step_2(call: Any) -> Any:
    model_call = sites.current_model_call()
    output = sdpa(call)
    if (
        model_call.step >= 2 and model_call.attention_module.block == "blocks.0"
    ):  # whose turns with the guard are over by then
        output = output.clone()
        output[:, :, -3:] = float("nan")
    return output


@comfy_only
def test_a_guard_that_stepped_in_is_recorded_and_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("wan")
    use(monkeypatch, Lossy(wrong_from_step_2))
    guarded = nodes_module("hook.patch").set_default(model, LOSSY, accuracy="exact", strict=False, guard="enforce")
    made = tiny_sampling.sample(guarded, "wan", steps=4)
    kept = record()["runs"][0]
    assert kept["steady"] is False
    assert kept["settings"]["guard"] == "enforce"
    assert kept["not_repeated"] == []
    place = f"role self blocks.0: {LOSSY} -> torch_sdpa from model call 3 on"
    assert any(text.startswith(place) and "not finite" in text for text in kept["changes"]), kept["changes"]
    assert set(map(str, ran(record()).values())) == {f"[(1, '{LOSSY}'), (3, 'torch_sdpa')]"}
    assert not made.isnan().any()
    again = tiny_sampling.sample(replayed(model, record()), "wan", steps=4)  # the kernel is still wrong
    assert torch.equal(again, made)
    assert {row["backend"] for row in last_run()["rows"]} == {LOSSY, "torch_sdpa"}


def fails_at_step_1(call: Any) -> Any:
    model_call = sites.current_model_call()
    if model_call.step == 1 and model_call.attention_module.block == "blocks.0":
        raise RuntimeError("no kernel image is available")
    return sdpa(call) * 0.999


@comfy_only
def test_a_kernel_that_failed_is_recorded_and_repeated(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    model = build("wan")
    use(monkeypatch, Kernel("sdpa_math", fails_at_step_1))
    made = tiny_sampling.sample(selected(model, "sdpa_math"), "wan", steps=3)
    kept = record()
    # Block 1 goes on with it: its plan was made before, and its calls do not fail.
    assert ran(kept)["self", "blocks.0"] == [(1, "sdpa_math"), (2, "torch_sdpa")]
    assert ran(kept)["self", "blocks.1"] == [(1, "sdpa_math")]
    assert kept["runs"][0]["changes"][0] == snapshot
    use(monkeypatch, Kernel("sdpa_math", lambda call: sdpa(call) * 0.999))  # repaired since
    assert torch.equal(tiny_sampling.sample(replayed(model, kept), "wan", steps=3), made)


@comfy_only
def test_a_record_names_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reason can hold a path; the record goes where the picture goes."""

    def broken(call: Any) -> Any:
        raise OSError("cannot open /home/jane/kernels/libattention.so")

    model = build("wan")
    use(monkeypatch, Kernel("sdpa_math", broken))
    tiny_sampling.sample(selected(model, "sdpa_math"), "wan")
    assert "jane" in json.dumps(record())
    node = nodes_module("report.record")
    metadata: Data = {"workflow": {}}
    hidden = SimpleNamespace(prompt={}, unique_id="1", extra_pnginfo=metadata)
    monkeypatch.setattr(node.AttentionRecord, "hidden", hidden, raising=False)
    monkeypatch.setattr(node, "find_stages", lambda *_: ([last_run()], []))
    output = node.AttentionRecord.execute("anything")
    assert output[0] == "anything"
    assert metadata["attention_backends"] == json.loads(output[1])
    assert "libattention.so" in output[1]
    assert "jane" not in output[1]


@comfy_only
def test_a_machine_without_the_kernel_falls_back_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    model = build("wan")
    with monkeypatch.context() as patched:
        use(patched, Lossy(lambda call: sdpa(call) * 0.999))
        tiny_sampling.sample(with_role(selected(model, "torch_sdpa"), "cross", LOSSY), "wan")
        kept = record()
    tiny_sampling.sample(replayed(model, kept), "wan")
    found = {row["role"]: (row["asked"], row["backend"], row["reason"]) for row in last_run()["rows"]}
    assert found["self"] == ("torch_sdpa", "torch_sdpa", None)
    asked, backend, reason = found["cross"]
    assert (asked, backend) == (LOSSY, "torch_sdpa")
    assert reason == snapshot
    with pytest.raises(NoBackendError) as caught:
        tiny_sampling.sample(replayed(model, {**kept, "strict": True}), "wan")
    first, *lines = str(caught.value).splitlines()
    assert first == snapshot
    assert next(line for line in lines if line.lstrip().startswith(f"{LOSSY}:")) == snapshot

    kept["runs"][0]["decisions"][1]["ran"][0]["backend"] = "flash_attn_9"  # of a later version
    tiny_sampling.sample(replayed(model, kept), "wan")
    (reason,) = {row["reason"] for row in last_run()["rows"] if row["role"] == "cross"}
    assert reason == snapshot


@comfy_only
def test_what_a_record_does_not_know_is_said(monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion) -> None:
    model = build("wan")
    tiny_sampling.sample(selected(model, "emulated_int8"), "wan")
    kept = record()
    kept["runs"][0]["decisions"] = [one for one in kept["runs"][0]["decisions"] if one["role"] != "cross"]
    kept["runs"][0]["machine"]["torch"] = "2.1.0"
    tiny_sampling.sample(replayed(with_role(model, "cross", "sdpa_math"), kept), "wan")
    assert {(row["role"], row["backend"]) for row in last_run()["rows"]} == {
        ("self", "emulated_int8"), ("cross", "torch_sdpa"),
    }  # fmt: skip
    replaced, changed, unknown = last_run()["notes"]
    assert replaced == snapshot
    said, _, what = changed.partition(": ")
    assert said == snapshot
    assert what == f"torch 2.1.0 -> {torch.__version__.partition('+')[0]}"
    assert unknown == snapshot


@comfy_only
@pytest.mark.parametrize("kept_block", ["blocks.0", "blocks.1"])
def test_some_and_any_calls_that_a_record_does_not_know_are_told_apart(
    kept_block: str, snapshot: SnapshotAssertion
) -> None:
    """Whether the calls that it knows come before those that it does not, or after them."""
    model = build("wan")
    tiny_sampling.sample(selected(model, "emulated_int8"), "wan")
    kept = record()
    for one in kept["runs"][0]["decisions"]:
        if one["role"] == "cross":
            one["blocks"] = [kept_block]
    tiny_sampling.sample(replayed(model, kept), "wan")
    assert [note for note in last_run()["notes"] if "does not know" in note] == snapshot


@comfy_only
def test_later_nodes_stand_above_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("wan")
    tiny_sampling.sample(selected(model, "emulated_int8"), "wan", steps=3)
    again = replayed(model, record())
    # A default is for what nobody said anything about, a role and a window are not.
    changed = with_role(selected(again, "torch_sdpa"), "cross", "sdpa_math")
    changed = scheduled(changed, ScheduleEntry(AttentionSpec("torch_sdpa"), steps="1", role="self"))
    tiny_sampling.sample(changed, "wan", steps=3)
    assert ran(record()) == {
        ("self", "blocks.0-1"): [(1, "emulated_int8"), (2, "torch_sdpa"), (3, "emulated_int8")],
        ("cross", "blocks.0-1"): [(1, "sdpa_math")],
    }


def taking(clock: Clock, ms: float, kernel: Any) -> Any:
    def run(call: Any) -> Any:
        clock.now += ms
        return kernel(call)

    return run


@comfy_only
def test_a_measured_run_is_recorded_honestly_and_its_choice_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While it measures, some calls run other kernels; afterwards the record keeps what the store may forget."""
    model = build("wan")
    platform = detect(torch.device("cpu"))
    fast = BACKENDS["sdpa_math"].load(platform)
    clock = Clock()
    kernels = {
        "torch_sdpa": Kernel("torch_sdpa", taking(clock, 4, sdpa)),
        "sdpa_math": Kernel("sdpa_math", taking(clock, 1.5, fast)),
    }
    router = Router(platform, {**kernels, "comfy": BACKENDS["comfy"]})
    monkeypatch.setattr(sampling, "router_for", lambda device: router)
    store = Store(tmp_path / "measured.sqlite")
    monkeypatch.setattr(
        sampling,
        "_tuner_of",
        lambda session: Tuner(session, store, clock) if asks_for_autotune(session.layers) else None,
    )
    tried: list[Data] = []
    while not tried or not tried[-1]["steady"]:
        assert len(tried) < 12, tried[-1]["not_repeated"]
        tiny_sampling.sample(selected(model, "autotune"), "wan", steps=8)
        tried += record()["runs"]
    assert len(tried) > 1
    for one in tried[:-1]:
        assert any("to be timed" in text for text in one["not_repeated"]), one["not_repeated"]
    changes = [text for one in tried for text in one["changes"]]
    assert any("torch_sdpa -> sdpa_math" in text for text in changes), changes

    made = tiny_sampling.sample(selected(model, "autotune"), "wan", steps=3)
    kept = record()
    assert kept["runs"][0]["steady"] is True
    assert set(map(str, ran(kept).values())) == {"[(1, 'sdpa_math')]"}
    store.path.unlink(missing_ok=True)
    for backend in ("auto", "autotune"):
        again = tiny_sampling.sample(replayed(selected(model, backend), kept), "wan", steps=3)
        assert torch.equal(again, made)
        assert {row["backend"] for row in last_run()["rows"]} == {"sdpa_math"}


@comfy_only
def test_a_record_in_the_environment_is_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = build("wan")
    made = tiny_sampling.sample(selected(model, "emulated_int8"), "wan")
    (tmp_path / "record.json").write_text(json.dumps(record()), encoding="utf-8")
    monkeypatch.setenv("ATTENTION_BACKENDS_CONFIG", str(tmp_path / "record.json"))
    assert torch.equal(tiny_sampling.sample(selected(model, "auto"), "wan"), made)
    source = "record of WAN21 (ATTENTION_BACKENDS_CONFIG (record.json))"
    assert {row["source"] for row in last_run()["rows"]} == {source}


# Plain data


CALL = AttentionRequest(1, 2, 256, 77, 64, "float16", mask="bool")


def made_up(backend: str = "torch_sdpa", node_id: str = "6", **ran: Any) -> Data:
    """A run as a record has it."""
    part = {"from_model_call": 1, "backend": backend, "accuracy": "exact", "source": "node.default", **ran}
    return {
        "node_id": node_id, "model": "WAN21", "steps": 3, "model_calls": 3,
        "machine": {"kind": "cuda", "card": "H100", "torch": "2.11.0", "packages": {"flash-attn": "2.8.3"}},
        "settings": {}, "steady": True, "changes": [], "not_repeated": [], "guard_alarms": 0, "first_alarm": None,
        "decisions": [{"role": "cross", "category": "cross", "blocks": ["blocks.0-39"], "calls": [facts_of(CALL)],
                       "ran": [part]}],
    }  # fmt: skip


def read(*runs: Data, **more: Any) -> AttentionConfig:
    return parse_config({**as_record(runs, {}), **more}, "text")


def test_a_record_as_a_configuration_prints_and_reads_to_the_same() -> None:
    config = read(made_up(), strict=True, guard="watch", per_role={"self": "sdpa_math"})
    assert config.strict is True
    assert config.per_role["self"].backend == "sdpa_math"
    assert parse_config(to_json(config), "text") == config
    assert hash(parse_config(to_json(config), "text")) == hash(config)
    assert read(made_up("sdpa_math")) != read(made_up())


def test_lengths_of_the_same_bucket_count_where_the_very_ones_are_unknown() -> None:
    assert read(made_up()).record is not None
    run = read(made_up(), made_up(node_id="7")).record.run_of("6")  # type: ignore[union-attr]
    assert run.choice("cross", "blocks.39", CALL, 1).asked == "torch_sdpa"  # type: ignore[union-attr]
    assert run.choice("cross", "blocks.39", CALL._replace(kv_len=79), 9).asked == "torch_sdpa"  # type: ignore[union-attr]
    for request in (CALL._replace(kv_len=200), CALL._replace(mask="none"), CALL._replace(dtype="bfloat16")):
        assert run.choice("cross", "blocks.39", request, 1) is None
    assert run.choice("cross", "blocks.40", CALL, 1) is None
    assert run.choice("self", "blocks.0", CALL, 1) is None


def test_each_sampler_repeats_its_own_run(snapshot: SnapshotAssertion) -> None:
    found = read(made_up(node_id="6"), made_up("sdpa_math", node_id="9")).record
    assert found is not None
    assert [found.run_of(node_id).node_id for node_id in ("6", "9", "77", "")] == ["6", "9", "6", "6"]
    assert found.remarks("6", parse_platform("cuda:9.0"))[0] == snapshot
    assert found.remarks("77", parse_platform("cpu"))[0] == snapshot
    both = as_record([made_up(node_id="6"), made_up("sdpa_math", node_id="9")], {})
    second = parse_config(both, "text", component="transformer_2").record
    assert second is not None
    assert second.run_of("77").node_id == "9"


@comfy_only
def test_the_part_of_a_record_leaves_a_schedule_of_any_length_alone() -> None:
    comfyui()
    one = made_up()
    one["decisions"][0]["ran"] = [{"from_model_call": n, "backend": b} for n, b in ((1, "sdpa_math"), (2, "reference"))]
    entries = tuple(ScheduleEntry(AttentionSpec("torch_sdpa"), steps="1") for _ in range(300))
    config = replace(read(one), schedule=entries)
    run = sampling.Run(SimpleNamespace(layers=(config,), notes=(), foreign=None))
    active = frozenset(range(300))
    run.run_report.timeline.model_calls = 1
    assert run.begin_model_call(active).entries == active
    before, run.run_report.timeline.model_calls = run.begin_model_call(active), 0
    assert run.begin_model_call(active) != before, "another part of the record"


def test_a_record_stands_above_auto_and_measured() -> None:
    for backend in ("auto", "autotune", "reference"):
        config = replace(read(made_up("sdpa_math")), default=AttentionSpec(backend))
        session = observe(Session(Router(detect(torch.device("cpu"))), (config,)))
        assert session.plan(CallKind(CALL, "cross", "cross", "blocks.7")).plan.decision.backend == "sdpa_math"
        unknown = session.plan(CallKind(CALL, "cross", "cross", "blocks.77")).plan.decision
        assert (unknown.asked, unknown.source) == (
            (None, "platform route") if backend == "auto" else (backend, "text.default")
        )


def test_differences_name_what_can_change_the_numbers(snapshot: SnapshotAssertion) -> None:
    found = read(made_up("flash_attn_2")).record
    assert found is not None
    now = parse_platform("cuda:9.0,name=H100,torch=2.13.0,packages=flash-attn==2.9.0;xformers==0.0.30")
    assert found.remarks("6", now) == snapshot
    assert found.remarks("6", parse_platform("cuda:9.0,name=H100,packages=flash-attn==2.8.3")) == []


def test_a_family_is_repeated_by_its_member() -> None:
    found = read(made_up("flash_attn", member="flash_attn_3")).record
    assert found is not None
    assert found.run_of("6").choice("cross", "blocks.0", CALL, 1).asked == "flash_attn_3"  # type: ignore[union-attr]
    kept = read(made_up("sage_attn", member="sage_fp16_cuda")).record
    assert kept is not None
    assert kept.run_of("6").choice("cross", "blocks.0", CALL, 1).asked == "sage_attn"  # type: ignore[union-attr]


def test_options_are_repeated() -> None:
    found = read(made_up("sage_attn", options={"smooth_k": False})).record
    assert found is not None
    choice = found.run_of("6").choice("cross", "blocks.3", CALL, 2)
    assert choice is not None
    assert choice.extra == {"smooth_k": False}


def test_blocks_and_facts_are_written_short() -> None:
    names = [f"double_blocks.{n}" for n in range(19)] + [f"single_blocks.{n}" for n in (0, 1, 2, 5)] + ["", "x"]
    assert ranges(reversed(names)) == ["x", "", "single_blocks.0-2", "single_blocks.5", "double_blocks.0-18"]
    assert facts_of(normal(CALL)) == facts_of(CALL) == {
        "batch": 1, "num_heads": 2, "q_len": 256, "kv_len": 77, "head_dim": 64, "dtype": "float16", "mask": "bool",
    }  # fmt: skip
    assert normal(AttentionRequest(**facts_of(CALL))) == normal(CALL)


def test_branches_of_one_graph_share_a_record() -> None:
    first = as_record([made_up(node_id="6")], {})
    both = as_record([made_up(node_id="9")], {}, before=first)
    assert [run["node_id"] for run in both["runs"]] == ["6", "9"]
    again = as_record([made_up(node_id="9")], {}, before=both)
    assert again == both


def test_what_a_script_sends_in_its_place_is_no_record() -> None:
    only = as_record([made_up()], {})
    for before in ({MARK: FORMAT}, {MARK: FORMAT, "runs": 3, "not_recorded": None}, {MARK: 9}, "text", None):
        assert as_record([made_up()], {}, before=before) == only


def damaged(path: str, value: Any) -> Data:
    """The record with something else at a place such as `runs.0.decisions.0.ran`."""
    kept = copy.deepcopy(as_record([made_up()], {}))
    place: Any = kept
    *parents, last = [int(name) if name.isdigit() else name for name in path.split(".")]
    for name in parents:
        place = place[name]
    place[last] = value
    return kept


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (MARK, 2),
        ("runs", []),
        ("runs", {}),
        ("made_by", 3),
        ("runs.0.model_calls", "3"),
        ("runs.0.changes", 3),
        ("runs.0.decisions.0.blocks", ["blocks.0-99999"]),
        ("runs.0.decisions.0.blocks", ["blocks.3-1"]),
        ("runs.0.decisions.0.calls.0.q_len", 0),
        ("runs.0.decisions.0.calls.0.mask", "some"),
        ("runs.0.decisions.0.calls.0.colour", 1),
        ("runs.0.decisions.0.ran", []),
        ("runs.0.decisions.0.ran.0.backend", ""),
        ("runs.0.decisions.0.ran.0.options", {"colour": 1}),
        ("runs.0.decisions.0.ran.0.from_model_call", True),
    ],
    ids=str,
)
def test_a_bad_record_is_refused_with_the_place(path: str, value: Any, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(json.dumps(damaged(path, value)), "text")
    assert str(caught.value) == snapshot


def test_equal_calls_with_different_kernels_are_no_quiet_success(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    """Two modules of one block and role: one fails, the other goes on. The record cannot tell them apart."""
    failing = [False, False]

    def kernel(call: Any) -> Any:
        if failing[int(call.scale == 2.0)]:
            raise RuntimeError("no")
        return sdpa(call)

    router = Router(detect(torch.device("cpu")), {**BACKENDS, "sdpa_math": Kernel("sdpa_math", kernel)})
    session = Session(router, (AttentionConfig(AttentionSpec("sdpa_math")),))
    recorder = RunRecorder()
    session.register(recorder)
    recorder.begin_model_call(1, 0)
    query = torch.zeros(1, 1, 4, 8)
    request = AttentionCall(query, query, query).request()
    plans = [session.plan(CallKind(request, "self", "self", "blocks.0")) for _ in range(2)]
    assert not recorder.not_repeated
    recorder.begin_model_call(4, 0)
    failing[0] = True
    for plan in plans:
        session.attention(plan, AttentionCall(query, query, query, scale=2.0 if plan is plans[1] else None))
    assert list(recorder.not_repeated) == snapshot
