"""The node Attention Config From Text: what it reads, from where, and how it stacks with the other nodes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

import tiny_sampling  # noqa: E402
from attention_backends.backends.config.layers import resolve, settings_of  # noqa: E402
from attention_backends.backends.config.names import RefusedBackendError, UnknownBackendError  # noqa: E402
from hook_side import counts, last_run, nodes_module, plain_comfyui, selected, with_role  # noqa: E402
from test_bad_input import without_names  # noqa: E402

pytestmark = pytest.mark.comfy

MIXED = "python x.py --diffusion-attention-backend TORCH_SDPA \\\n -dac.per_role.cross.backend _native_math"


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the node, in a user directory of its own."""
    plain_comfyui(monkeypatch)
    import folder_paths

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    folder = tmp_path / "user" / "default" / "attention_backends"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def model() -> Any:
    return tiny_sampling.build("wan")


def node() -> Any:
    return nodes_module("configure.config_text").AttentionConfigText


def with_text(model: Any, text: str = "", **more: Any) -> Any:
    return node().execute(model, text, **more).args[0]


def layers(model: Any) -> Any:
    return model.model_options["transformer_options"]["attention_backends"].layers


def asked(model: Any) -> dict[str, str]:
    top = layers(model)[0]
    return {"default": top.default.backend, **{role: spec.backend for role, spec in top.per_role.items()}}


def test_a_pasted_command_line_decides_what_runs(model: Any) -> None:
    tiny_sampling.sample(with_text(model, MIXED), "wan")
    assert counts(last_run()) == {("self", "torch_sdpa"): 4, ("cross", "sdpa_math"): 4}
    assert "attention_backends" not in model.model_options["transformer_options"], "the patch goes on a clone"


def test_the_account_says_what_was_read_without_effect_and_what_a_name_means(
    model: Any, snapshot: SnapshotAssertion
) -> None:
    text = "sglang serve --model-path x --component-attention-backends transformer=dynamic_cudnn_sdpa,vae=fa"
    tiny_sampling.sample(with_text(model, text), "wan")
    assert last_run()["notes"] == snapshot


def test_a_name_of_another_system_prints_its_line_in_the_other_nodes_too(
    model: Any, snapshot: SnapshotAssertion
) -> None:
    selector, per_role = nodes_module("configure.selector").AttentionBackendSelector, nodes_module("configure.per_role")
    patched = selector.execute(model, "fa3", "exact", False, "off").args[0]
    patched = per_role.PerRoleAttentionConfig.execute(patched, "cross", "_native_npu", "").args[0]
    patched = per_role.PerRoleAttentionConfig.execute(patched, "self", "flash_attn", "").args[0]
    assert patched.model_options["transformer_options"]["attention_backends"].notes == snapshot


def test_self_covers_joint_where_a_node_says_it_and_not_where_a_text_does(model: Any) -> None:
    def joint(patched: Any) -> str | None:
        return resolve(layers(patched)[:1], "flux.double", "joint").asked

    by_node = with_role(selected(model, "sdpa_math"), "self", "sdpa_flash")
    assert joint(by_node) == "sdpa_flash"
    by_text = with_text(by_node, "per_role.self=sdpa_efficient")
    assert joint(by_text) == "sdpa_math", "the last writer of self says what it covers"
    assert joint(with_text(by_node, "per_role.cross=sdpa_efficient")) == "sdpa_flash"
    assert joint(with_role(by_text, "cross", "sdpa_efficient")) == "sdpa_math"
    assert joint(with_role(by_text, "self", "sdpa_flash")) == "sdpa_flash"
    assert joint(with_text(model, "per_role.self=sdpa_efficient joint_is_self=true")) == "sdpa_efficient"


def test_it_wins_over_earlier_nodes_and_later_ones_over_it(model: Any, snapshot: SnapshotAssertion) -> None:
    before = with_role(
        with_role(selected(model, "sdpa_flash", strict=True), "cross", "sdpa_math"), "joint", "sdpa_math"
    )
    patched = with_text(before, "default: torch_sdpa\nper_role: {cross: sdpa_efficient}\naccuracy: quantized")
    assert asked(patched) == {"default": "torch_sdpa", "cross": "sdpa_efficient", "joint": "sdpa_math"}
    assert settings_of(layers(patched)) == ("quantized", True, "off"), "what the text does not say stays"
    later = with_role(selected(patched, "sdpa_math"), "cross", "torch_sdpa")
    assert asked(later) == {"default": "sdpa_math", "cross": "torch_sdpa", "joint": "sdpa_math"}
    assert later.model_options["transformer_options"]["attention_backends"].notes == snapshot
    assert asked(before) == {"default": "sdpa_flash", "cross": "sdpa_math", "joint": "sdpa_math"}


def test_auto_and_nothing_change_nothing(model: Any) -> None:
    before = with_role(selected(model, "sdpa_flash"), "cross", "sdpa_math")
    for text in ("", "auto", "per_role.cross=auto", "{}"):
        assert asked(with_text(before, text)) == {"default": "sdpa_flash", "cross": "sdpa_math"}


def test_what_it_does_not_say_comes_from_the_environment(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENTION_BACKENDS_CONFIG", '{"default": "sdpa_math", "strict": true}')
    patched = with_text(model, "per_role.cross=torch_sdpa")
    assert settings_of(layers(patched)).strict is True
    tiny_sampling.sample(patched, "wan")
    assert counts(last_run()) == {("self", "sdpa_math"): 4, ("cross", "torch_sdpa"): 4}
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "no such thing")
    with_text(model, "torch_sdpa")  # a default above it decides every role


@pytest.mark.parametrize(("component", "backend"), [("transformer", "sdpa_math"), ("transformer_2", "torch_sdpa")])
def test_the_component_chooses_the_expert(model: Any, component: str, backend: str) -> None:
    text = "--component-attention-backends transformer=_native_math,transformer_2=native"
    assert asked(with_text(model, text, component=component)) == {"default": backend}


# Files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'\xef\xbb\xbf{"default": "torch_sdpa", "per_role": {"cross": "sdpa_math"}}'),
        ("a.yaml", b"default: torch_sdpa\nper_role:\n  cross: _native_math\n"),
        ("b.YML", b"default: torch_sdpa\r\nper_role: {cross: sdpa_math}\r\n"),
    ],
)
def test_files_of_the_folder_are_offered_and_read(model: Any, place: Path, name: str, content: bytes) -> None:
    (place / name).write_bytes(content)
    offered = next(each for each in node().define_schema().inputs if each.id == "file")
    assert offered.options == ["none", name]
    assert node().validate_inputs(name) is True
    assert asked(with_text(model, file=name)) == {"default": "torch_sdpa", "cross": "sdpa_math"}


def test_no_folder_is_no_error(model: Any, place: Path, snapshot: SnapshotAssertion) -> None:
    place.rmdir()
    assert next(each for each in node().define_schema().inputs if each.id == "file").options == ["none"]
    assert node().validate_inputs("none") is True
    assert node().validate_inputs(None) is True, "a linked input is known only when it runs"
    assert node().validate_inputs("a.json") == snapshot


@pytest.fixture
def secret(place: Path) -> Path:
    path = place.parent.parent / "secret.json"
    path.write_text('{"sesame": 1}')
    return path


@pytest.mark.parametrize(
    "way", ["../../secret.json", "ABSOLUTE", "sub/../../../secret.json", "link.json", "sub", "", "."]
)
def test_no_name_leads_out_of_the_folder(model: Any, place: Path, secret: Path, way: str) -> None:
    (place / "sub").mkdir()
    (place / "good.json").write_text("{}")
    if way == "link.json":
        try:
            (place / way).symlink_to(secret)
        except OSError:
            pytest.skip("links cannot be made here")
    name = str(secret) if way == "ABSOLUTE" else way.replace("/", os.sep)
    assert f"no configuration file {name!r}; there are: good.json" in node().validate_inputs(name)
    with pytest.raises(ValueError, match="no configuration file") as caught:
        with_text(model, file=name)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "form", ["{}", "--attention-backend fa --attention-backend-config {}", "ATTENTION_BACKENDS_CONFIG={}"]
)
def test_no_text_opens_a_file(model: Any, place: Path, secret: Path, form: str) -> None:
    text = form.format(secret)
    for how in ({"text": text}, {"file": "outer.yaml"}):
        (place / "outer.yaml").write_text(text)
        with pytest.raises(ValueError, match=r".") as caught:
            with_text(model, **how)
        assert "sesame" not in str(caught.value)


def test_an_edited_file_is_a_new_result(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place / "a.yaml"
    path.write_text("default: fa")
    inputs = {"text": "", "file": "a.yaml", "component": "transformer"}
    first = node().fingerprint_inputs(**inputs)
    assert node().fingerprint_inputs(**inputs) == first
    path.write_text("default: sa")
    os.utime(path, (0, 0))
    second = node().fingerprint_inputs(**inputs)
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "sage")
    third = node().fingerprint_inputs(**inputs)
    path.unlink()
    assert len({first, second, third, node().fingerprint_inputs(**inputs)}) == 4


# Errors


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{\n "default": "torch_sdpa",\n "per_role": }', id="JSON"),
        pytest.param('\n\n{"default": }', id="JSON after empty lines"),
        pytest.param("\n\nbackend=sdpa_math\nstrict", id="words in lines"),
        pytest.param("default: torch_sdpa\nper_role: [a\n", id="YAML"),
        pytest.param("default: torch_sdpa\nper_role:\n  cross: sagee", id="unknown backend"),
        pytest.param("--attention-backend torch_sdpa \\\n --attention-backend-confg x=1", id="unknown entry"),
        pytest.param("sglang serve \\\n --attention-backend-confg x=1", id="unknown flag"),
        pytest.param("backend=sdpa_math strict", id="words"),
    ],
)
def test_errors_point_at_the_place(model: Any, text: str, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ValueError) as caught:
        with_text(model, text)
    assert without_names(caught.value) == snapshot


def test_errors_in_a_file_name_it(model: Any, place: Path, snapshot: SnapshotAssertion) -> None:
    (place / "a.json").write_text(json.dumps({"per_role": {"cross": "sagee"}}))
    with pytest.raises(UnknownBackendError) as caught:
        with_text(model, file="a.json")
    assert without_names(caught.value) == snapshot
    (place / "b.yaml").write_bytes("default: fa".encode("utf-16"))
    with pytest.raises(ValueError) as caught:
        with_text(model, file="b.yaml")
    assert str(caught.value) == snapshot
    (place / "c.yaml").write_bytes(b"#" * 1_000_001)
    assert node().validate_inputs("c.yaml") == snapshot


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"text": 3}, id="no text"),
        pytest.param({"text": "fa", "file": "a.yaml"}, id="text and file"),
        pytest.param({"text": "fa", "component": " "}, id="component"),
        pytest.param({"text": "fa", "file": 3}, id="text and a number"),
        pytest.param({"file": 3}, id="file a number"),
    ],
)
def test_wrong_inputs_are_refused(model: Any, wrong: dict[str, Any], snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ValueError) as caught:
        with_text(model, **wrong)
    assert str(caught.value) == snapshot


def test_a_refused_name_says_why_and_where(model: Any, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(RefusedBackendError) as caught:
        with_text(model, "flash_mla")
    assert str(caught.value) == snapshot


def test_the_node_is_offered_and_its_inputs_keep_their_order() -> None:
    schema = node().define_schema()
    assert schema.node_id == "AttentionConfigText"
    assert [each.id for each in schema.inputs] == ["model", "text", "file", "component"]
    source = (Path(__file__).parents[2] / "nodes" / "__init__.py").read_text(encoding="utf-8")
    assert source.count("            AttentionConfigText,\n") == 1
    assert "AttentionConfigText" in nodes_module("history.graph").OURS, "branches that differ only in it are comparable"


def test_comfyui_accepts_the_node() -> None:
    schema = node().GET_SCHEMA()
    groups = node().INPUT_TYPES()
    assert list(groups["required"]) == ["model", "text"]
    inputs = {**groups["required"], **groups["optional"]}
    assert schema.display_name == "Attention Config From Text"
    assert inputs["text"][1]["multiline"] is True
    assert inputs["component"][1]["options"] == ["transformer", "transformer_2"]
