"""Configurations: every form to one type, what wins for a role, and what is refused with which words."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from attention_backends.backends.config import AttentionConfig, AttentionSpec, names
from attention_backends.backends.config.layers import Choice, joint_note, resolve
from attention_backends.backends.config.names import UnknownBackendError
from attention_backends.backends.config.text import from_environment, parse_config, parse_extra
from attention_backends.backends.values.errors import ConfigError
from syrupy.assertion import SnapshotAssertion

LTX2 = {
    "self": "flash_attn_2",
    "cross": "torch_sdpa",
    "ltx2.audio_self": "sdpa_math",
    "ltx2.audio_text_cross": "sdpa_efficient",
    "ltx2.audio_to_video": "cudnn_attn",
    "ltx2.video_to_audio": "xformers",
}
FULL: dict[str, Any] = {
    "default": {"backend": "flash_attn_2"},
    "per_role": {"cross": {"backend": "torch_sdpa"}, "ltx2.audio_self": {"backend": "sdpa_math"}},
    "strict": True,
    "accuracy": "quantized",
    "guard": "watch",
}
FORMS = {
    "dict": FULL,
    "short dict": {
        "backend": "FLASH_ATTN_2",
        "per_role": {"cross": "native", "ltx2": {"audio_self": "_native_math"}},
        "strict": True,
        "accuracy": "quantized",
        "guard": "watch",
    },
    "json": json.dumps(FULL, indent=1),
    "yaml": """
default: {backend: flash_attn_2}
per_role:
  cross: sdpa
  ltx2:
    audio_self: sdpa_math
strict: true
accuracy: quantized
guard: watch
""",
    "dotted flags": "default.backend=flash_attn_2 per_role.cross.backend=torch_sdpa "
    "per_role.ltx2.audio_self.backend=sdpa_math strict=true accuracy=quantized guard=watch",
    "vLLM flags": "--diffusion-attention-config.default.backend FLASH_ATTN_2 "
    "--diffusion-attention-config.per_role.cross.backend TORCH_SDPA "
    "--diffusion-attention-config.per_role.ltx2.audio_self=sdpa_math --strict=true --accuracy quantized --guard watch",
    "key value": "backend=flash_attn_2,per_role.cross=sdpa,per_role.ltx2.audio_self=sdpa_math,strict=True,"
    "accuracy=quantized,guard=watch",
    "a flag per line": "backend=flash_attn_2\nper_role.cross=sdpa\nper_role.ltx2.audio_self=sdpa_math\nstrict=true\n"
    "accuracy=quantized\nguard=watch",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_to_the_same_configuration(form: str) -> None:
    assert parse_config(FORMS[form], "config") == AttentionConfig(
        default=AttentionSpec("flash_attn_2"),
        per_role={"cross": AttentionSpec("torch_sdpa"), "ltx2.audio_self": AttentionSpec("sdpa_math")},
        strict=True,
        accuracy="quantized",
        guard="watch",
        source="config",
    )


@pytest.mark.parametrize("ending", [".json", ".yaml", ".yml", ".YAML"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_files_read_alike_and_name_themselves(tmp_path: Path, ending: str, mark: str) -> None:
    path = tmp_path / f"attention{ending}"
    path.write_text(mark + str(FORMS["json" if ending == ".json" else "yaml"]), encoding="utf-8")
    for value in (path, str(path)):
        config = parse_config(value, "config")
        assert config.source == f"config ({path.name})"
        assert config.default.backend == "flash_attn_2"
        assert config.per_role["ltx2.audio_self"].backend == "sdpa_math"


def test_a_name_alone_is_the_default() -> None:
    assert parse_config(" Sage ").default == AttentionSpec("sage_attn")
    assert parse_config("") == AttentionConfig()


def test_a_configuration_passes_as_it_is() -> None:
    config = AttentionConfig(default=AttentionSpec("sage_attn"))
    assert parse_config(config) is config


def test_the_callers_object_is_never_changed() -> None:
    value = {"backend": "sdpa", "per_role": {"ltx2": {"audio_self": {"backend": "sdpa_math", "extra": {}}}}}
    before = copy.deepcopy(value)
    config = parse_config(value)
    assert value == before
    value["per_role"]["ltx2"]["audio_self"]["backend"] = "xformers"  # type: ignore[index]
    assert config.per_role["ltx2.audio_self"].backend == "sdpa_math"
    with pytest.raises(TypeError):
        config.per_role["cross"] = AttentionSpec("sdpa")  # type: ignore[index]


def test_specs_may_be_given_as_objects() -> None:
    spec = AttentionSpec("sage_attn")
    assert parse_config({"default": spec, "per_role": {"self": spec}}).per_role["self"] == spec


def test_equal_configurations_hash_alike() -> None:
    assert hash(parse_config(FULL)) == hash(parse_config(FORMS["json"]))


def _ask(value: object, role: str, category: str) -> Choice:
    return resolve((parse_config(value),), role, category)


def test_each_role_gets_its_own_backend_and_the_rest_the_default() -> None:
    value = {"default": "flash_attn", "per_role": {"self": "sdpa_flash", "cross": "sdpa_math"}}
    assert _ask(value, "self", "self").asked == "sdpa_flash"
    assert _ask(value, "cross", "cross").asked == "sdpa_math"
    assert _ask({"default": "flash_attn", "per_role": {"cross": "sdpa_math"}}, "self", "self").asked == "flash_attn"


def test_joint_attention_falls_in_category_self_where_a_node_or_the_text_says_so() -> None:
    flash = AttentionSpec("sdpa_flash")
    covering = ({"per_role": {"self": "sdpa_flash"}, "joint_is_self": True}, AttentionConfig(per_role={"self": flash}))
    for value in covering:
        assert _ask(value, "joint", "joint").asked == "sdpa_flash"
        assert _ask(value, "flux.double", "joint").asked == "sdpa_flash"
    both = {"per_role": {"self": "sdpa_flash", "joint": "sdpa_math"}, "joint_is_self": True}
    assert _ask(both, "flux.double", "joint").asked == "sdpa_math"
    assert _ask(both, "self", "self").asked == "sdpa_flash"
    assert _ask({"per_role": {"cross": "sdpa_math"}}, "joint", "joint").asked is None
    assert _ask({"per_role": {"joint": "sdpa_math"}}, "self", "self").asked is None


def test_in_text_joint_is_a_role_of_its_own(snapshot: SnapshotAssertion) -> None:
    text = "per_role.self=sdpa_flash"
    for role in ("joint", "flux.double"):
        assert _ask(text, role, "joint").asked is None
        assert _ask(f"{text} default=sdpa_math", role, "joint").asked == "sdpa_math"
        assert _ask(f"{text} joint_is_self=true", role, "joint").asked == "sdpa_flash"
    (layer,) = from_environment({"ATTENTION_BACKENDS_CONFIG": '{"per_role": {"self": "sdpa_flash"}}'})
    assert resolve((layer,), "joint", "joint").asked is None
    under_a_variable = 'ATTENTION_BACKENDS_CONFIG=\'{"per_role": {"self": "sdpa_flash"}}\' per_role.cross=sdpa_math'
    assert _ask(under_a_variable, "self", "self").asked == "sdpa_flash"
    assert _ask(under_a_variable, "joint", "joint").asked is None
    with pytest.raises(ConfigError) as caught:
        parse_config("joint_is_self=yes")
    assert str(caught.value) == snapshot


def test_where_self_would_have_decided_for_joint_a_note_says_so(snapshot: SnapshotAssertion) -> None:
    layers = (parse_config("per_role.self=sdpa_flash"), parse_config("sdpa_math", "file"))
    assert joint_note(layers, "flux.double", "joint") == snapshot
    assert joint_note(layers, "self", "self") is None
    assert joint_note((parse_config("per_role.joint=sdpa_math"), *layers), "joint", "joint") is None
    assert joint_note((parse_config("per_role.self=sdpa_flash joint_is_self=true"),), "joint", "joint") is None


def test_the_exact_role_wins_over_its_category_and_says_where_it_stands() -> None:
    value = {"per_role": {"cross": "sdpa_math"}}
    choice = _ask(value, "ltx2.audio_to_video", "cross")
    assert choice == Choice("sdpa_math", "config.per_role['cross'] (category of 'ltx2.audio_to_video')")
    value["per_role"]["ltx2.audio_to_video"] = "cudnn_attn"
    choice = _ask(value, "ltx2.audio_to_video", "cross")
    assert choice == Choice("cudnn_attn", "config.per_role['ltx2.audio_to_video']")


def test_nothing_said_leaves_it_to_the_platform() -> None:
    assert resolve((), "self", "self") == Choice(None, "platform route")
    assert _ask({}, "self", "self") == Choice(None, "platform route")
    assert _ask({"per_role": {"self": "sdpa_math"}}, "cross", "cross") == Choice(None, "platform route")


def test_the_source_of_a_default() -> None:
    assert _ask("sage", "cross", "cross") == Choice("sage_attn", "config.default")


def test_the_six_roles_of_ltx2_each_get_their_own() -> None:
    categories = {"ltx2.audio_text_cross": "cross", "ltx2.audio_to_video": "cross", "ltx2.video_to_audio": "cross"}
    for role, backend in LTX2.items():
        choice = _ask({"per_role": LTX2}, role, categories.get(role, role.rsplit("_")[-1]))
        assert (choice.asked, choice.source) == (backend, f"config.per_role[{role!r}]")


@pytest.mark.parametrize("auto", ["auto", "AUTO", None, {"backend": "auto"}])
def test_auto_at_any_level_means_that_nothing_was_said_there(auto: object) -> None:
    assert _ask({"default": auto}, "self", "self").asked is None
    assert _ask({"default": "sdpa_math", "per_role": {"self": auto}}, "self", "self").asked == "sdpa_math"
    value = {"per_role": {"ltx2.audio_to_video": auto, "cross": "sdpa_math"}}
    assert _ask(value, "ltx2.audio_to_video", "cross").asked == "sdpa_math"
    value = {"per_role": {"joint": auto, "self": "sdpa_flash"}, "joint_is_self": True}
    assert _ask(value, "joint", "joint").asked == "sdpa_flash"


def test_auto_in_a_higher_layer_lets_the_lower_one_decide() -> None:
    layers = (parse_config("auto", "node"), parse_config({"per_role": {"cross": "auto"}}, "file"), parse_config("sage"))
    assert resolve(layers, "cross", "cross") == Choice("sage_attn", "config.default")


def test_the_highest_layer_that_says_anything_decides() -> None:
    layers = (parse_config({"per_role": {"cross": "xformers"}}, "node"), parse_config("sage", "file"))
    assert resolve(layers, "cross", "cross") == Choice("xformers", "node.per_role['cross']")
    assert resolve(layers, "self", "self") == Choice("sage_attn", "file.default")


def test_environment_variables_in_their_order() -> None:
    environ = {
        "DIFFUSERS_ATTN_BACKEND": "_native_math",
        "DIFFUSION_ATTENTION_BACKEND": "SAGE_ATTN",
        "ATTENTION_BACKENDS_CONFIG": '{"per_role": {"cross": "xformers"}}',
    }
    layers = from_environment(environ)
    assert [layer.source for layer in layers] == [
        "ATTENTION_BACKENDS_CONFIG",
        "DIFFUSION_ATTENTION_BACKEND",
        "DIFFUSERS_ATTN_BACKEND",
    ]
    assert resolve(layers, "cross", "cross").source == "ATTENTION_BACKENDS_CONFIG.per_role['cross']"
    assert resolve(layers, "self", "self") == Choice("sage_attn", "DIFFUSION_ATTENTION_BACKEND.default")
    del environ["DIFFUSION_ATTENTION_BACKEND"]
    assert resolve(from_environment(environ), "self", "self").asked == "sdpa_math"


def test_auto_and_blanks_in_the_environment_say_nothing() -> None:
    environ = {"DIFFUSION_ATTENTION_BACKEND": "auto", "DIFFUSERS_ATTN_BACKEND": "  ", "ATTENTION_BACKENDS_CONFIG": ""}
    assert resolve(from_environment(environ), "self", "self") == Choice(None, "platform route")
    assert from_environment({}) == ()


def test_parsing_never_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "no such thing")
    assert parse_config("auto") == AttentionConfig()
    with pytest.raises(UnknownBackendError, match=r"^DIFFUSION_ATTENTION_BACKEND: unknown attention backend"):
        from_environment()


def test_yaml_may_say_off() -> None:
    assert parse_config("guard: off\nstrict: no").guard == "off"


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(7, id="a number"),
        pytest.param(["sage"], id="a list"),
        pytest.param({"backends": "sage"}, id="unknown entry"),
        pytest.param({"default": "sage", "backend": "sage"}, id="default and backend"),
        pytest.param("backend=sage default.backend=sage", id="the same as flags"),
        pytest.param({"default": ["sage"]}, id="default as a list"),
        pytest.param({"default": {"backend": 7}}, id="number for a name"),
        pytest.param({"default": {"backend": "sage", "topk": 1}}, id="option beside a backend"),
        pytest.param({"default": {"backend": "sage", "extra": {"topk": 1}}}, id="unknown option"),
        pytest.param({"default": {"backend": "sage", "extra": 3}}, id="number for the options"),
        pytest.param({"per_role": "sage"}, id="roles as text"),
        pytest.param({"per_role": {"cross": {}}}, id="empty role"),
        pytest.param(
            {"per_role": {"ltx2": {"backend": "sage", "audio_self": "sdpa"}}}, id="option in a group of roles"
        ),
        pytest.param({"accuracy": "good"}, id="unknown accuracy"),
        pytest.param({"guard": "on"}, id="unknown guard"),
        pytest.param({"strict": "yes"}, id="strict as text"),
        pytest.param('{"default": }', id="JSON"),
        pytest.param("default: [sage\n", id="YAML"),
        pytest.param("- sage\n- sdpa", id="a list as text"),
        pytest.param("backend=sage strict", id="flag without a value"),
        pytest.param("backend=sage backend=sdpa", id="flag twice"),
        pytest.param("per_role.ltx2=sage per_role.ltx2.audio_self=sdpa", id="role of its group"),
        pytest.param("per_role.ltx2.audio_self=sdpa per_role.ltx2=sage", id="group of a role"),
        pytest.param("nowhere/attention.yaml", id="no file"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_place(value: object, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(value)
    ours = str(caught.value).replace("\\", "/").partition(": expected ',' or ']'")[0]  # the rest is said by YAML
    assert ours == snapshot


def test_an_unknown_backend_is_named_with_its_place_and_the_nearest(
    snapshot: SnapshotAssertion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "NAMES", (names.AUTO, names.AUTOTUNE, *names.MENU))  # a new kernel is not in the text
    with pytest.raises(UnknownBackendError) as caught:
        parse_config({"per_role": {"cross": "sage_atn"}})
    assert str(caught.value) == snapshot
    with pytest.raises(UnknownBackendError, match="did you mean sage_attn"):
        parse_config("sage_atn")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.json", b"[1]", id="list"),
        pytest.param("a.json", b"{", id="cut off"),
        pytest.param("a.yaml", b"a.yaml", id="name of itself"),
        pytest.param("a.yaml", "default: sage".encode("utf-16"), id="UTF-16"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes, snapshot: SnapshotAssertion) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        parse_config(tmp_path / name)
    assert str(caught.value).replace(str(tmp_path / name), name) == snapshot


def test_extra_reads_from_json_and_from_pairs() -> None:
    assert parse_extra("") == {}
    expected = {"topk": 0.5, "smooth_k": True, "name": "x", "steps": 3}
    assert parse_extra("topk=0.5, smooth_k=true name='x' steps=3") == expected
    assert parse_extra(json.dumps(expected)) == expected
    for bad in ("[1]", '{"a": }', "topk"):
        with pytest.raises(ConfigError):
            parse_extra(bad)
