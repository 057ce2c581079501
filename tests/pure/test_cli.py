"""The two commands: what they answer, as text and as data, and what they refuse. `test_cli_start.py` starts them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from attention_backends import cli
from attention_backends.backends.config.names import NAMES
from attention_backends.backends.config.text import CONFIG_VARIABLE, DEFAULT_VARIABLES
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.backend import Backend, Kernel
from attention_backends.backends.values.platform import Platform
from attention_backends.backends.values.roles import category_of
from attention_backends.cli import main
from syrupy.assertion import SnapshotAssertion

CALL = "batch=1,num_heads=24,q_len=4096,kv_len=4096,head_dim=128,dtype=bfloat16,mask=none"
BLACKWELL = "cuda:12.0,cudnn=91002"


@pytest.fixture(autouse=True)
def _no_configuration_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (CONFIG_VARIABLE, *DEFAULT_VARIABLES):
        monkeypatch.delenv(variable, raising=False)


def explain(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["explain", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


# explain


def test_explain_answers_as_data(capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion) -> None:
    answer = explain(capsys, "--platform", BLACKWELL, "--request", CALL, "--role", "cross", "--config", "cudnn")
    assert answer == {
        "backend": "cudnn_attn",
        "member": None,
        "role": "cross",
        "category": "cross",
        "category_derived": False,
        "source": "--config.default",
        "asked": "cudnn_attn",
        "rejected": [],
        "request": {
            "batch": 1,
            "num_heads": 24,
            "q_len": 4096,
            "kv_len": 4096,
            "head_dim": 128,
            "dtype": "bfloat16",
            "num_kv_heads": 0,
            "v_head_dim": 0,
            "mask": "none",
            "is_causal": False,
            "scale": None,
            "exact_only": False,
            "lse": False,
            "grid": None,
        },
        "platform": snapshot,
        "notes": [],
    }


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen_image", "sage_attn"),
        ("qwen_image", "torch_sdpa"),
        ("flux", "sage_attn"),
    ],
)
def test_explain_says_what_is_recommended_for_a_family(
    capsys: pytest.CaptureFixture[str], family: str, config: str, snapshot: SnapshotAssertion
) -> None:
    answer = explain(capsys, "--platform", BLACKWELL, "--config", config, "--family", family)
    assert answer["notes"][-1] == snapshot
    elsewhere = explain(capsys, "--platform", "cpu", "--config", config)
    assert not any("recommended" in note for note in elsewhere["notes"])


def test_explain_lists_who_was_refused_and_why(capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion) -> None:
    answer = explain(capsys, "--platform", "cuda:7.5", "--config", "cudnn_attn", "--request", CALL)
    assert (answer["backend"], answer["asked"]) == ("torch_sdpa", "cudnn_attn")
    assert answer["rejected"][0] == {"backend": "cudnn_attn", "reasons": snapshot}


def test_explain_names_the_member_of_a_family(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    monkeypatch.setattr(
        type(BACKENDS["torch_sdpa"]), "kernel_name", lambda backend, request, platform: "one of several"
    )
    assert explain(capsys, "--platform", "cpu")["member"] == "one of several"
    assert main(["explain", "--platform", "cpu"]) == 0
    assert next(line for line in capsys.readouterr().out.splitlines() if "(one of several)" in line) == snapshot


def test_explain_asks_the_running_machine_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    answer = explain(capsys)
    assert torch.__version__.split("+")[0] in answer["platform"]
    assert answer["asked"] is None


def test_explain_in_sentences(capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion) -> None:
    arguments = ["--platform", "cpu", "--role", "ltx2.audio_to_video", "--config", "per_role.cross=cudnn"]
    assert main(["explain", *arguments, "--request", CALL]) == 0
    assert capsys.readouterr().out == snapshot


@pytest.mark.parametrize(
    "config",
    [
        '{"per_role": {"cross": {"backend": "sdpa_math"}}}',
        "per_role:\n  cross: sdpa_math",
        "per_role.cross.backend=sdpa_math",
        "--diffusion-attention-config.per_role.cross.backend=sdpa_math",
        "--diffusion-attention-config.per_role.cross.backend sdpa_math",
        "backend=flash_attn,per_role.cross=sdpa_math",
    ],
)
def test_explain_takes_every_form_of_configuration(capsys: pytest.CaptureFixture[str], config: str) -> None:
    answer = explain(capsys, "--platform", "cuda:9.0", "--role", "cross", "--config", config)
    assert (answer["backend"], answer["source"]) == ("sdpa_math", "--config.per_role['cross']")


def test_explain_takes_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "attention.yaml"
    path.write_text("per_role: {cross: sdpa_math}", encoding="utf-8")
    answer = explain(capsys, "--platform", "cuda:9.0", "--role", "cross", "--config", str(path))
    assert answer["source"] == "--config (attention.yaml).per_role['cross']"


def test_the_environment_counts_below_config(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "_native_math")
    answer = explain(capsys, "--platform", "cpu")
    assert (answer["backend"], answer["source"]) == ("sdpa_math", "DIFFUSION_ATTENTION_BACKEND.default")
    assert explain(capsys, "--platform", "cpu", "--config", "sdpa_flash")["backend"] == "sdpa_flash"
    monkeypatch.setenv("ATTENTION_BACKENDS_CONFIG", '{"default": "cudnn_attn", "strict": true}')
    assert main(["explain", "--platform", "cpu"]) == 2
    assert "via ATTENTION_BACKENDS_CONFIG.default" in capsys.readouterr().err


def test_explain_keeps_the_environments_settings_below_a_configuration_without_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTENTION_BACKENDS_CONFIG", '{"strict": true}')
    assert main(["explain", "--platform", "cpu", "--config", "cudnn_attn"]) == 2
    assert "via --config.default" in capsys.readouterr().err
    assert explain(capsys, "--platform", "cpu", "--config", "backend=cudnn_attn,strict=false")["asked"] == "cudnn_attn"


def test_explain_prints_what_a_name_of_another_system_means_here(
    capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    (note,) = explain(capsys, "--platform", "cpu", "--config", "fa3")["notes"]
    assert note == snapshot
    assert main(["explain", "--platform", "cpu", "--config", "fa3"]) == 0
    assert f"Note: {note}" in capsys.readouterr().out


def test_explain_takes_a_component(capsys: pytest.CaptureFixture[str]) -> None:
    config = "transformer=sdpa_math,transformer_2=sdpa_flash"
    asked = [
        explain(capsys, "--platform", "cpu", "--config", config, "--component", component)["asked"]
        for component in ("transformer", "transformer_2", "transformer_3")
    ]
    assert asked == ["sdpa_math", "sdpa_flash", "sdpa_math"]


@pytest.mark.parametrize(
    ("role", "category"),
    [
        ("self", "self"),
        ("cross", "cross"),
        ("joint", "joint"),
        ("ltx2.audio_self", "self"),
        ("ltx2.audio_text_cross", "cross"),
        ("ltx2.audio_to_video", "cross"),
        ("wan.image_cross", "cross"),
        ("flux.single", "joint"),
    ],
)
def test_the_category_follows_from_the_name_and_can_be_given(
    capsys: pytest.CaptureFixture[str], role: str, category: str
) -> None:
    assert category_of(role) == category
    answer = explain(capsys, "--platform", "cpu", "--role", role)
    assert (answer["category"], answer["category_derived"]) == (category, "." in role)
    given = explain(capsys, "--platform", "cpu", "--role", role, "--category", "joint")
    assert (given["category"], given["category_derived"]) == ("joint", False)


def test_it_says_where_self_does_not_cover_joint_attention(
    capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    arguments = ("--platform", "cpu", "--role", "flux.single", "--config")
    answer = explain(capsys, *arguments, "per_role.self=sdpa_math")
    assert answer["source"] == "platform route"
    assert answer["notes"] == snapshot
    answer = explain(capsys, *arguments, "per_role.self=sdpa_math joint_is_self=true")
    assert (answer["backend"], answer["notes"]) == ("sdpa_math", [])


@pytest.mark.parametrize("as_json", [False, True])
def test_strict_refuses_with_the_whole_story(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    arguments = ["explain", "--platform", "cuda:7.5", "--request", CALL, "--config", "backend=cudnn_attn,strict=true"]
    assert main([*arguments, *(["--json"] if as_json else [])]) == 2
    said = capsys.readouterr()
    for words in ("via --config.default", "q_len 4096", "this one is sm75", "what to do: "):
        assert words in said.err
    assert (json.loads(said.out) == {"error": said.err.rstrip("\n")}) if as_json else (said.out == "")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["explain", "--platform", "toaster"], id="platform"),
        pytest.param(["explain", "--platform", "cpu", "--request", "q_len=8"], id="request"),
        pytest.param(["explain", "--platform", "cpu", "--role", " "], id="role"),
        pytest.param(["explain", "--platform", "cpu", "--config", "sage_atn"], id="backend"),
        pytest.param(["explain", "--platform", "cpu", "--config", "a: [b"], id="YAML"),
        pytest.param(["explain", "--platform", "cpu", "--config", "nowhere.json"], id="no file"),
        pytest.param(["explain", "--platform", "cpu", "--config", '{"a": 1}'], id="entry"),
        pytest.param(["doctor", "sage_atn"], id="doctor"),
        pytest.param(["doctor", "auto"], id="doctor auto"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], snapshot: SnapshotAssertion
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    ours = (
        said.err.rstrip().partition(" the names are")[0].partition(": expected ',' or ']'")[0]
    )  # the rest is said by YAML
    assert ours == snapshot
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize("arguments", [[], ["explode"], ["explain", "--colour"], ["explain", "--category", "spatial"]])
def test_bad_arguments_end_with_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"], ["explain", "--help"]])
def test_help_is_plain_text(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 130
    if len(arguments) == 2:
        assert "examples:" in text


def test_every_choice_can_be_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        answer = explain(capsys, "--platform", BLACKWELL, "--config", name)
        assert answer["asked"] == (None if name == "auto" else name)
        assert answer["backend"] in BACKENDS


def test_bad_input_is_data_too_where_data_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--platform", "toaster", "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out) == {"error": said.err.rstrip("\n")}


# doctor


def test_doctor_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["interpreter"] == sys.executable
    assert report["platform"]["kind"] in ("cpu", "cuda", "rocm", "xpu", "mps")
    assert [row["id"] for row in report["backends"]] == list(BACKENDS)
    for row in report["backends"]:
        assert list(row) == [
            *("id", "accuracy", "available", "reasons", "version", "file", "install", "note"),
            *("symbols", "cards", "probed"),
        ]
        assert row["available"] == (not row["reasons"])
        assert (row["install"] is None) == row["available"]
        if "pip install" in (row["install"] or ""):
            assert sys.executable in row["install"]
    assert next(row for row in report["backends"] if row["id"] == "torch_sdpa")["available"]


def test_doctor_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert sys.executable in text
    assert all(re.search(rf"^{name} ", text, re.MULTILINE) for name in BACKENDS)
    line = re.search(r"^torch_sdpa +exact +yes +(.+)$", text, re.MULTILINE)
    assert line is not None
    assert line[1] == f"torch {torch.__version__.split('+')[0]}, {torch.__file__}"


def test_doctor_takes_names_by_any_alias_and_says_everything_about_them(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert main(["doctor", "Sage", "_native_math", "--json"]) == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)["backends"]] == ["sage_attn", "sdpa_math"]


def test_what_a_package_prints_while_loading_stays_out_of_the_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    pytest.importorskip("torch")

    class Noisy(Backend):
        id = "noisy"
        kinds = ("cpu", "cuda", "rocm", "xpu", "mps")

        def load(self, platform: Platform) -> Kernel:
            print("WARNING: banner of a package")
            raise RuntimeError("0 active drivers")

    monkeypatch.setitem(BACKENDS, "noisy", Noisy())
    assert main(["doctor", "--json"]) == 0
    said = capsys.readouterr()
    row = json.loads(said.out)["backends"][-1]
    assert row["reasons"] == snapshot
    assert "banner" in said.err


@pytest.mark.parametrize("command", ["doctor", "blocks"])
def test_an_interruption_is_one_word(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.doctor, "run", stop)
    monkeypatch.setattr(cli.blocks, "run", stop)
    assert main([command, *(["--method", "sparge_attn", "--grid", "1x8x8"] if command == "blocks" else [])]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("command", ["compare", "quality", "bench", "blocks --method sparge_attn --grid 1x8x8"])
@pytest.mark.parametrize("seed", ["9" * 23, "1.5", "9" * 5000])
def test_a_seed_that_torch_does_not_take_is_refused(
    command: str, seed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--seed", seed])
    assert ended.value.code == 2
    assert f"--seed: {seed[:30]!r} is not a whole number of at most 4611686018427387904" in capsys.readouterr().err
