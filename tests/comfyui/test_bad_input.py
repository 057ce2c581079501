"""What the nodes say to input that they cannot use: which part, what was expected, and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from attention_backends.backends.config import AttentionSpec  # noqa: E402
from attention_backends.backends.config.layers import settings_of  # noqa: E402
from attention_backends.backends.config.names import CHOICES, NAMES  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.values.errors import NoBackendError  # noqa: E402
from hook_side import comfyui, counts, last_run, nodes_module, plain_comfyui, selected, with_role  # noqa: E402

pytestmark = pytest.mark.comfy


@pytest.fixture(autouse=True)
def _comfy(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_comfyui(monkeypatch)


def selector() -> Any:
    return nodes_module("configure.selector").AttentionBackendSelector


def per_role() -> Any:
    return nodes_module("configure.per_role").PerRoleAttentionConfig


def without_names(error: object) -> str:
    """What an error says, without the names of all backends."""
    return re.sub(r"(the names are:) [\w, ]*\w", r"\1 ...", str(error))


@pytest.mark.parametrize("node", [selector, per_role])
@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("sagee_attn", "did you mean sage_attn"),
        ("cudn", "did you mean cudnn"),
        (3, "the names are: auto"),
    ],
)
def test_an_unknown_backend_names_the_nearest(node: Any, name: Any, near: str) -> None:
    answer = node().validate_inputs(name)
    assert near in answer
    assert all(name in answer for name in NAMES)


@pytest.mark.parametrize("node", [selector, per_role])
@pytest.mark.parametrize("name", [*CHOICES, "CUDNN_ATTN", "fa3", "_native_cudnn", " Sage-Attn "])
def test_every_known_spelling_passes(node: Any, name: str) -> None:
    assert node().validate_inputs(name) is True


@pytest.mark.parametrize(
    "wrong",
    [{"backend": 3}, {"backend": "sagee"}, {"accuracy": "best"}, {"strict": "yes"}, {"guard": "maybe"}],
    ids=["no backend", "unknown backend", "accuracy", "strict", "guard"],
)
def test_the_selector_refuses_wrong_values(wrong: dict[str, Any], snapshot: SnapshotAssertion) -> None:
    right = {"backend": "auto", "accuracy": "exact", "strict": False, "guard": "off"}
    with pytest.raises(ValueError) as caught:
        selector().execute(tiny_sampling.build("wan"), **{**right, **wrong})
    assert without_names(caught.value) == snapshot


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"backend": 3}, id="no backend"),
        pytest.param({"role": "  "}, id="empty role"),
        pytest.param({"role": None}, id="no role"),
        pytest.param({"extra": "{x"}, id="damaged JSON"),
        pytest.param({"extra": "words"}, id="words"),
        pytest.param({"extra": "a=1 a=2"}, id="twice"),
        pytest.param({"extra": "smooth=1"}, id="unknown option"),
        pytest.param({"extra": {"smooth": 1}}, id="no text"),
    ],
)
def test_the_per_role_node_refuses_wrong_values(wrong: dict[str, Any], snapshot: SnapshotAssertion) -> None:
    right = {"role": "self", "backend": "sdpa_math", "extra": ""}
    with pytest.raises(ValueError) as caught:
        per_role().execute(tiny_sampling.build("wan"), **{**right, **wrong})
    assert without_names(caught.value) == snapshot


@pytest.mark.parametrize(
    "model",
    [None, "model", SimpleNamespace(model=None), SimpleNamespace(model=SimpleNamespace(), model_options={})],
    ids=str,
)
@pytest.mark.parametrize(
    "patch", [lambda m: selected(m, "auto"), lambda m: with_role(m, "self", "auto")], ids=["default", "role"]
)
def test_a_model_without_a_diffusion_model_is_refused(model: Any, patch: Any, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ValueError) as caught:
        patch(model)
    assert str(caught.value) == snapshot


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ATTENTION_BACKENDS_CONFIG", '{"per_role": 3}'),
        ("ATTENTION_BACKENDS_CONFIG", '{"default": ["a"]}'),
        ("ATTENTION_BACKENDS_CONFIG", '{"strict": "yes"}'),
        ("ATTENTION_BACKENDS_CONFIG", "nowhere.json"),
        ("DIFFUSION_ATTENTION_BACKEND", "sagee"),
    ],
    ids=["per_role", "default", "strict", "no file", "unknown backend"],
)
def test_a_wrong_environment_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as caught:
        selected(tiny_sampling.build("wan"), "auto")
    assert name in str(caught.value)
    assert without_names(caught.value) == snapshot


@pytest.mark.parametrize("role", ["flux.single", "joint", "cross"])
def test_a_role_that_matches_nothing_is_a_note(role: str, snapshot: SnapshotAssertion) -> None:
    model = with_role(selected(tiny_sampling.build("wan"), "torch_sdpa", strict=True), role, "torch_sdpa")
    tiny_sampling.sample(model, "wan")
    assert counts(last_run()) == {("self", "torch_sdpa"): 4, ("cross", "torch_sdpa"): 4}
    assert len(last_run()["notes"]) == (role != "cross")
    assert last_run()["notes"] == snapshot


def test_a_category_matches_the_roles_in_it() -> None:
    """Flux has only joint attention, which falls in category self where nothing is said of joint."""
    model = tiny_sampling.build("flux")
    for role in ("self", "joint", "flux.double"):
        model = with_role(model, role, "torch_sdpa")
    tiny_sampling.sample(model, "flux")
    assert last_run()["notes"] == []


def test_strict_lists_the_call_and_every_backends_reasons(snapshot: SnapshotAssertion) -> None:
    model = selected(tiny_sampling.build("qwen_image_masked"), "cudnn_attn", strict=True)
    with pytest.raises(NoBackendError) as caught:
        tiny_sampling.sample(model, "qwen_image_masked")
    first, call, machine, asked, *others, advice = str(caught.value).splitlines()
    assert first == snapshot
    assert call == snapshot
    assert machine.startswith("  machine: cpu")
    assert asked == snapshot
    before, _, rest = advice.partition("(")
    assert before == snapshot
    assert rest.startswith("torch_sdpa, ")
    refused = {name.strip() for line in others for name in line.partition(":")[0].split(",")}
    assert all(line.partition(":")[2].strip() for line in others)
    advised = set(rest.partition(")")[0].split(", "))
    exact = {name for name, backend in BACKENDS.items() if backend.accuracy == "exact"}
    assert exact - {"cudnn_attn", "reference", "comfy"} <= refused | advised
    assert not refused & advised


def test_not_strict_falls_back_with_the_reason(caplog: pytest.LogCaptureFixture, snapshot: SnapshotAssertion) -> None:
    model = selected(tiny_sampling.build("wan"), "cudnn_attn")
    caplog.clear()
    tiny_sampling.sample(model, "wan")
    assert counts(last_run()) == {("self", "torch_sdpa"): 4, ("cross", "torch_sdpa"): 4}
    assert {row["reason"] for row in last_run()["rows"]} == snapshot
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sorted(text for text in warnings if text.startswith("role ")) == snapshot


def test_what_only_the_environment_says_holds_for_a_per_role_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    comfyui()
    selector = nodes_module("configure.selector")
    patch = nodes_module("hook.patch")
    file = tmp_path / "attention.json"
    file.write_text('{"strict": true, "accuracy": "quantized"}')
    monkeypatch.setenv("ATTENTION_BACKENDS_CONFIG", str(file))
    first = selector.environment()
    model = patch.set_role(tiny_sampling.build("wan"), "self", AttentionSpec("sdpa_math"))
    said = settings_of(model.model_options["transformer_options"]["attention_backends"].layers)
    assert (said.strict, said.accuracy) == (True, "quantized")
    same = patch.current_config(patch.set_role(model, "self", AttentionSpec("auto")))
    assert same.per_role["self"].backend == "sdpa_math", "auto is as if the node were not there"
    file.write_text('{"strict": false}')
    assert selector.environment() != first, "an edited file must not reuse cached results"
    assert selector.check_backend(None) is True, "a linked input is known only when it runs"


# Before the graph runs

WIDGETS = {"backend": "sage_attn", "when": "precise first and last N", "window": "2", "blocks": "", "role": ""}
LINK = {"model": "MODEL"}


@pytest.mark.parametrize(
    ("changed", "linked"),
    [
        pytest.param({}, (), id="lossy at the precise ends"),
        pytest.param({}, ("window", "blocks"), id="lossy, window not known yet"),
        pytest.param({"backend": None, "window": "x"}, ("backend",), id="window"),
        pytest.param({"backend": "auto", "window": None, "blocks": "x"}, ("window",), id="blocks"),
        pytest.param({"backend": "auto", "role": "crossattention"}, (), id="role"),
    ],
)
def test_a_schedule_is_refused_before_it_runs(
    changed: dict[str, Any], linked: tuple[str, ...], snapshot: SnapshotAssertion
) -> None:
    values = {**WIDGETS, **changed, **dict.fromkeys(linked)}
    node = nodes_module("configure.schedule").AttentionSchedule
    types = {name: "COMBO" if name == "backend" else "STRING" for name in linked}
    answer = node.validate_inputs(**values, input_types={**LINK, **types})
    assert answer is not True
    assert answer.partition(" the roles are:")[0] == snapshot
    right = {**values, "backend": "torch_sdpa", "window": "2", "blocks": "", "role": "cross"}
    assert node.validate_inputs(**right, input_types=LINK) is True


@pytest.mark.parametrize("role", ["crossattention", "Cross", "flux.singel", "zzz"])
def test_a_role_that_no_model_has_is_refused_with_the_nearest(role: str, snapshot: SnapshotAssertion) -> None:
    answer = per_role().validate_inputs(backend="auto", role=role, extra="", input_types=LINK)
    said, _, roles = answer.partition(" the roles are: ")
    assert said == snapshot
    assert roles.split(", ")[:3] == ["self", "cross", "joint"]
    for known in (*roles.split(", "), None):  # None: connected, known only when it runs
        assert per_role().validate_inputs(backend="auto", role=known, extra="", input_types=LINK) is True
