"""`autotune` and its older name `measured` mean the same at every door: texts, variables, commands, records, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attention_backends.backends.config import AttentionConfig, AttentionSpec
from attention_backends.backends.config.names import AUTOTUNE, MEASURED, canonical
from attention_backends.backends.config.text import CONFIG_VARIABLE, DEFAULT_VARIABLES, from_environment, parse_config
from attention_backends.backends.observe.autotune.store import OLD_VARIABLE, VARIABLE, default_path, path_in
from attention_backends.cli import main

INPUTS = Path(__file__).resolve().parents[1] / "golden" / "inputs"
BOTH = (AUTOTUNE, MEASURED, "Measured", " AUTOTUNE ")
FORMS = {
    "name": "{}",
    "JSON": '{{"default": "{}"}}',
    "JSON, structured": '{{"default": {{"backend": "{}"}}}}',
    "JSON, role": '{{"default": "sdpa_math", "per_role": {{"cross": "{}"}}}}',
    "JSON, schedule": '{{"schedule": [{{"backend": "{}", "steps": "0-3"}}]}}',
    "YAML": "default: {}\n",
    "YAML, role": "default: sdpa_math\nper_role:\n  cross:\n    backend: {}\n",
    "pairs": "default.backend={},per_role.cross.backend=torch_sdpa",
    "dotted flags": "--diffusion-attention-config.per_role.cross.backend {}",
    "flag of vLLM-Omni": "--diffusion-attention-backend {}",
    "flag of SGLang": "--attention-backend {}",
    "pair of Smart-Diffusion": "infer.attn_type={}",
}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (CONFIG_VARIABLE, *DEFAULT_VARIABLES, VARIABLE, OLD_VARIABLE):
        monkeypatch.delenv(variable, raising=False)


def backends_of(config: AttentionConfig) -> list[str]:
    specs = (config.default, *config.per_role.values(), *(entry.spec for entry in config.schedule))
    return [spec.backend for spec in specs]


@pytest.mark.parametrize("word", BOTH)
def test_a_name_and_a_python_object(word: str) -> None:
    assert canonical(word) == AUTOTUNE
    assert AttentionSpec(word) == AttentionSpec(AUTOTUNE)
    assert parse_config({"default": word}) == parse_config({"default": AUTOTUNE})


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_configuration_in_every_form(form: str) -> None:
    new, old = (parse_config(form.format(word)) for word in (AUTOTUNE, MEASURED))
    assert new == old
    assert AUTOTUNE in backends_of(new)
    assert MEASURED not in backends_of(old)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_file(tmp_path: Path, suffix: str) -> None:
    found = []
    for word in (AUTOTUNE, MEASURED):
        path = tmp_path / f"config{suffix}"
        path.write_text(json.dumps({"default": word}), encoding="utf-8")
        found.append(parse_config(str(path)))
    assert found[0] == found[1]
    assert found[0].default.backend == AUTOTUNE


@pytest.mark.parametrize("variable", [CONFIG_VARIABLE, *DEFAULT_VARIABLES])
def test_a_variable(variable: str) -> None:
    new, old = (from_environment({variable: word}) for word in (AUTOTUNE, MEASURED))
    assert new == old
    assert new[0].default.backend == AUTOTUNE


def test_the_file_of_measured_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usual = path_in(tmp_path)
    monkeypatch.setenv(OLD_VARIABLE, str(tmp_path / "old.sqlite3"))
    assert default_path() == path_in(tmp_path) == tmp_path / "old.sqlite3"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "new.sqlite3"))
    assert default_path() == path_in(tmp_path) == tmp_path / "new.sqlite3"
    assert usual == tmp_path / "attention_backends" / "measured.sqlite3", "a file that exists is found again"


def test_a_record(tmp_path: Path) -> None:
    """What was asked is in a record for people to read; what ran is what is repeated."""
    data = json.loads(next(iter(sorted(INPUTS.glob("record*.json")))).read_text(encoding="utf-8"))
    found = []
    for word in (AUTOTUNE, MEASURED):
        for run in data["runs"]:
            for ran in (ran for decision in run["decisions"] for ran in decision["ran"]):
                ran["asked"] = word
        record = parse_config(data).record
        assert record is not None
        found.append([(timeline.starts, timeline.choices) for run in record.runs for timeline in run.timelines])
    assert found[0] == found[1]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    status = main(list(words))
    captured = capsys.readouterr()
    return status, json.loads(captured.out), captured.err


@pytest.mark.parametrize("command", [("explain", "--platform", "cuda:8.9", "--config"), ("doctor",)])
def test_a_word_of_a_command(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    new, old = (printed(capsys, command[0], "--json", *command[1:], word) for word in (AUTOTUNE, MEASURED))
    assert new == old
    assert command == ("doctor",) or new[1]["asked"] == AUTOTUNE


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = str(tmp_path / "choices.sqlite3")
    new, old = (printed(capsys, word, "--clear", "--json", "--store", store) for word in (AUTOTUNE, "tune"))
    assert new == old
    assert new[0] == 0
