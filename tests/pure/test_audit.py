"""The audit: what was asked against what ran, a reason for every divergence, and an error where one has none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from attention_backends.backends.config.text import parse_config
from attention_backends.backends.engine.plan import CallKind
from attention_backends.backends.engine.router import Decision, Router
from attention_backends.backends.engine.session import Session
from attention_backends.backends.report import RunReport
from attention_backends.backends.report.audit import UnexplainedError, asked_and_ran, line, merged, unexplained
from attention_backends.backends.report.outcome import of_run_report
from attention_backends.backends.values.platform import Platform, parse_platform
from attention_backends.backends.values.request import parse_request
from syrupy.assertion import SnapshotAssertion

CALL = parse_request("num_heads=8,q_len=4096,kv_len=77,head_dim=64,dtype=float32")


def traced(config: Any, *rows: tuple[Any, ...], categories: dict[str, str] | None = None) -> RunReport:
    """A trace under `config` with rows of (role, backend, asked, reason, calls)."""
    run_report = RunReport(
        layers=(parse_config(config, "node"),), categories=categories or {row[0]: row[0] for row in rows}
    )
    for number, (role, backend, asked, reason, calls) in enumerate(rows):
        source = "platform route" if asked is None else "node.default"
        run_report.row(role, str(number), backend, source, "none", reason, asked).calls = calls
    return run_report


def verdicts(run_report: RunReport) -> dict[str, str]:
    return {finding.role: finding.verdict for finding in asked_and_ran(run_report)}


def said(run_report: RunReport) -> str:
    return line(finding.as_dict() for finding in asked_and_ran(run_report))


def test_as_asked_and_explained_in_one_line(snapshot: SnapshotAssertion) -> None:
    run_report = traced(
        {"default": "cudnn_attn", "per_role": {"cross": "sage_attn"}},
        ("self", "cudnn_attn", "cudnn_attn", None, 40),
        ("cross", "torch_sdpa", "sage_attn", "sage_attn: kv_len 77 is not a multiple of 64", 40),
    )
    assert verdicts(run_report) == {"self": "as asked", "cross": "explained"}
    assert said(run_report) == snapshot
    assert unexplained(asked_and_ran(run_report)) is None


def test_blocks_that_ran_in_different_ways_are_counted(snapshot: SnapshotAssertion) -> None:
    run_report = traced(
        "sage_attn",
        ("self", "sage_attn", "sage_attn", None, 30),
        ("self", "torch_sdpa", "sage_attn", "sage_attn: failed: RuntimeError: no", 8),
        ("self", "sdpa_math", "sage_attn", "sage_attn: failed: RuntimeError: no", 2),
    )
    (finding,) = asked_and_ran(run_report)
    assert finding.ran == {"sage_attn": 30, "torch_sdpa": 8, "sdpa_math": 2}
    assert finding.reasons == ("sage_attn: failed: RuntimeError: no",)
    assert said(run_report) == snapshot


def test_auto_is_always_as_asked_and_rows_without_calls_count_for_nothing(snapshot: SnapshotAssertion) -> None:
    run_report = traced("auto", ("self", "flash_attn", None, None, 4), ("cross", "torch_sdpa", None, None, 0))
    assert verdicts(run_report) == {"self": "as asked"}
    assert said(run_report) == snapshot
    assert said(RunReport()) == "Asked and ran: nothing"


@pytest.mark.parametrize("asked", ["cudnn_attn", None], ids=["no reason", "the wish itself was lost"])
def test_a_divergence_without_a_reason_is_unexplained(asked: str | None, snapshot: SnapshotAssertion) -> None:
    run_report = traced("cudnn_attn", ("self", "torch_sdpa", asked, None, 3))
    assert verdicts(run_report) == {"self": "unexplained"}
    assert said(run_report) == snapshot
    text = unexplained(asked_and_ran(run_report))
    assert text is not None
    assert text == snapshot


def test_one_reason_does_not_explain_another_block() -> None:
    run_report = traced(
        "sage_attn",
        ("self", "torch_sdpa", "sage_attn", "sage_attn: head_dim 160 > 128", 3),
        ("self", "sdpa_math", "sage_attn", None, 1),
    )
    assert verdicts(run_report) == {"self": "unexplained"}


def test_a_role_is_found_by_its_category(snapshot: SnapshotAssertion) -> None:
    config = {
        "per_role": {"cross": "sdpa_math", "self": "sdpa_math", "wan.image_cross": "sdpa_math", "flux.single": "auto"},
        "joint_is_self": True,
    }
    rows = (
        ("ltx2.audio_to_video", "sdpa_math", "sdpa_math", None, 2),
        ("flux.single", "sdpa_math", "sdpa_math", None, 2),
    )
    run_report = traced(config, *rows, categories={"ltx2.audio_to_video": "cross", "flux.single": "joint"})
    found = {finding.role: finding for finding in asked_and_ran(run_report)}
    assert {role: finding.verdict for role, finding in found.items()} == {
        "ltx2.audio_to_video": "as asked",
        "flux.single": "as asked",  # joint, which falls in category self
        "wan.image_cross": "role never called",
    }
    never = found["wan.image_cross"]
    assert never.source == "node.per_role['wan.image_cross']"
    assert never.reasons == snapshot
    assert said(run_report) == snapshot
    assert unexplained(found.values()) is None


def test_a_role_without_calls_is_not_missing_where_others_ran_unseen() -> None:
    config = {"per_role": {"self": "cudnn_attn", "cross": "sage_attn"}}
    run_report = traced(config, ("self", "cudnn_attn", "cudnn_attn", None, 40))
    assert verdicts(run_report) == {"self": "as asked", "cross": "role never called"}
    run_report.unseen["A node"] = None
    assert verdicts(run_report) == {"self": "as asked", "cross": "not reached"}
    (_, cross) = asked_and_ran(run_report)
    assert cross.reasons == (of_run_report(run_report).cause,)
    assert (of_run_report(run_report).kind, of_run_report(run_report).cause.startswith("A node ")) == ("partly", True)


def test_self_from_a_text_was_never_called_where_there_is_joint_attention_only(snapshot: SnapshotAssertion) -> None:
    rows = [("flux.single", "torch_sdpa", None, None, 2)]
    run_report = traced({"per_role": {"self": "sdpa_math"}}, *rows, categories={"flux.single": "joint"})
    auto, never = asked_and_ran(run_report)
    assert (auto.asked, auto.verdict) == ("auto", "as asked")
    assert (never.role, never.verdict) == ("self", "role never called")
    assert never.reasons == snapshot


def test_a_role_that_something_else_answered_needs_a_note(snapshot: SnapshotAssertion) -> None:
    run_report = traced("sdpa_math", categories={"self": "self"})
    assert verdicts(run_report) == {"self": "unexplained"}
    run_report.note("another pack's override (theirs) computed attention of role self by itself")
    assert verdicts(run_report) == {"self": "explained"}
    assert said(run_report) == snapshot


def test_stages_are_merged_with_the_worst_verdict() -> None:
    explained = traced("sage_attn", ("self", "torch_sdpa", "sage_attn", "sage_attn: head_dim 160 > 128", 3))
    as_asked = traced("sage_attn", ("self", "sage_attn", "sage_attn", None, 5))
    never = traced({"per_role": {"cross": "sdpa_math"}}, ("self", "torch_sdpa", None, None, 1))
    called = traced({"per_role": {"cross": "sdpa_math"}}, ("cross", "sdpa_math", "sdpa_math", None, 7))
    audits = [run_report.as_dict()["audit"] for run_report in (explained, as_asked, never, called)]
    before = str(audits)
    found = merged(audits)  # type: ignore[arg-type]
    assert [(row["role"], row["asked"], row["ran"], row["verdict"], row["reasons"]) for row in found] == [
        ("self", "sage_attn", {"torch_sdpa": 3, "sage_attn": 5}, "explained", ["sage_attn: head_dim 160 > 128"]),
        ("self", "auto", {"torch_sdpa": 1}, "as asked", []),
        ("cross", "sdpa_math", {"sdpa_math": 7}, "as asked", []),
    ]
    assert str(audits) == before


def test_it_is_part_of_the_account() -> None:
    run_report = traced("cudnn_attn", ("self", "cudnn_attn", "cudnn_attn", None, 4))
    assert run_report.as_dict()["audit"] == [
        {
            "role": "self",
            "asked": "cudnn_attn",
            "source": "node.default",
            "ran": {"cudnn_attn": 4},
            "reasons": [],
            "verdict": "as asked",
        }
    ]


@pytest.mark.parametrize(
    "machine", ["cuda:12.0,cudnn=91002", "cuda:8.9,packages=flash-attn==2.8.3", "rocm:gfx942", "cpu"]
)
@pytest.mark.parametrize(
    "name", ["auto", "cudnn_attn", "sage_attn", "sparge_attn", "flash_attn", "emulated_int8", "comfy"]
)
@pytest.mark.parametrize("change", [{}, {"mask": "bias"}, {"exact_only": True}, {"head_dim": 100}], ids=str)
def test_the_router_explains_every_divergence_of_its_own(machine: str, name: str, change: dict[str, Any]) -> None:
    run_report = RunReport(layers=(parse_config(name, "node"),), categories={"self": "self"})
    decision = Router(parse_platform(machine)).decide(CALL._replace(**change), run_report.layers, "self", "self")
    run_report.row("self", "", decision.backend, decision.source, "none", decision.reason, decision.asked).calls = 1
    assert verdicts(run_report)["self"] == ("explained" if decision.backend != name != "auto" else "as asked")


# At the end of a run in ComfyUI


def forgetful(self: Router, request: Any, choice: Any, **_: Any) -> Decision:
    """A router with a defect: it runs something else and does not say why."""
    return Decision("torch_sdpa", choice.source, choice.asked)


@pytest.fixture
def hook() -> Any:
    pytest.importorskip("torch", reason="torch is not installed")
    import hook_side

    return hook_side


def run_of(hook: Any, ours: Any, published: list[Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """One sampling run of a stand-in Wan's self-attention; its account goes to `published`."""
    add = hook.wrappers.runs.add
    monkeypatch.setattr(hook.wrappers.runs, "add", lambda run_report: (published.append(run_report), add(run_report)))
    model = hook.stand_in(["WanModel"], hook.PLACES)
    options = {hook.sampling.KEY: ours, hook.sampling.OVERRIDE: ours}

    def body() -> Any:
        call = (hook.Q, hook.Q, hook.Q, hook.HEADS), {"transformer_options": options}
        return model.get_submodule("blocks.0.self_attn")([call])

    class Executor:
        class_obj = SimpleNamespace(model_options={"transformer_options": options})

        def __call__(self) -> Any:
            return hook.model_call(model, options, body)

    try:
        return hook.wrappers.outer_sample_wrapper(Executor())
    finally:
        assert hook.sampling.RUN_KEY not in options
        assert hook.marks_left(model) == []


def test_a_strict_run_ends_with_an_error_and_its_account_is_there(
    hook: Any, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    monkeypatch.setattr(Router, "select", forgetful)
    published: list[Any] = []
    with pytest.raises(UnexplainedError) as caught:
        run_of(hook, hook.override("reference", strict=True), published, monkeypatch)
    assert str(caught.value) == snapshot
    (run_report,) = published
    assert run_report.as_dict()["audit"][0]["verdict"] == "unexplained"
    assert not any("did not finish" in note for note in run_report.notes)


def test_a_run_that_is_not_strict_shows_it_and_goes_on(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Router, "select", forgetful)
    published: list[Any] = []
    assert run_of(hook, hook.override("reference"), published, monkeypatch)
    assert published[0].as_dict()["audit"][0]["verdict"] == "unexplained"


@pytest.mark.parametrize("strict", [True, False])
def test_a_sound_run_passes(
    hook: Any, strict: bool, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    published: list[Any] = []
    assert run_of(hook, hook.override("reference", strict=strict, cross="sdpa_math"), published, monkeypatch)
    audit = published[0].as_dict()["audit"]
    assert line(audit) == snapshot


def test_a_session_by_itself_knows_what_was_asked() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    session = Session(Router(Platform("cpu", torch="2.11.0")), (parse_config("cudnn", "node"),))
    session.plan(CallKind(CALL, "ltx2.audio_to_video", "cross")).plan.row.calls += 1
    (finding,) = asked_and_ran(session.run_report)
    assert (finding.asked, finding.verdict) == ("cudnn_attn", "explained")
    assert session.run_report.categories == {"ltx2.audio_to_video": "cross"}


@pytest.mark.comfy
def test_the_report_node_shows_it(snapshot: SnapshotAssertion) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    from hook_side import comfyui, last_run, nodes_module, selected, with_role

    comfyui()
    import tiny_sampling

    report = nodes_module("report.report")
    model = with_role(selected(tiny_sampling.build("wan"), "sdpa_math"), "cross", "cudnn_attn")
    tiny_sampling.sample(model, "wan", steps=1)
    text = report.as_text({"run": last_run()})
    assert next(line for line in text.splitlines() if "self=sdpa_math" in line) == snapshot
    assert [row["verdict"] for row in last_run()["audit"]] == ["as asked", "explained"]
