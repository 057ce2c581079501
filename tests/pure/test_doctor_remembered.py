"""What probes found, kept on disk: whom it stops, in which environment, and what becomes of a bad file."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from attention_backends.backends.doctor.doctor import examine
from attention_backends.backends.doctor.install import Interpreter
from attention_backends.backends.engine.router import Router
from attention_backends.backends.kernels.backend import Backend, Kernel
from attention_backends.backends.kernels.group import BackendGroup
from attention_backends.backends.measure import environment, remembered
from attention_backends.backends.measure.remembered import Outcome
from attention_backends.backends.values.package import Symbols
from attention_backends.backends.values.platform import Platform
from syrupy.assertion import SnapshotAssertion

HERE = Platform(
    "cuda", (8, 9), name="RTX 4090", torch="2.11.0", cuda="13.0", cudnn=91002, packages=(("flash-attn", "2.8.3"),)
)
CRASH = Outcome("crashed", "signal 11 (SIGSEGV) while running", stderr=("Fatal Python error",))
GOOD = Outcome("ok", "", 0.0005, 12.0)


class Fake(Backend):
    summary = "For a test."

    def __init__(self, backend_id: str) -> None:
        self.id = backend_id  # type: ignore[misc]
        self.symbols = (Symbols(backend_id, ("attention",)),)  # type: ignore[misc]
        self.loads = 0

    def load(self, platform: Platform) -> Kernel:
        self.loads += 1
        return lambda call: call.query


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(remembered.CACHE_VARIABLE, str(tmp_path / "cache"))
    remembered._outcomes.cache_clear()
    yield tmp_path / "cache"
    remembered._outcomes.cache_clear()


def in_a_new_process() -> None:
    remembered._outcomes.cache_clear()


# Whom it stops


@pytest.mark.parametrize(
    "outcome",
    [
        pytest.param(CRASH, id="crashed"),
        pytest.param(Outcome("failed", "wrong: NaN in the output"), id="failed"),
        pytest.param(Outcome("hung", "no answer within 120 s while running"), id="hung"),
    ],
)
def test_what_a_probe_condemned_is_unavailable_and_not_even_loaded(
    outcome: Outcome, snapshot: SnapshotAssertion
) -> None:
    remembered.remember({"flash_attn_2": outcome}, HERE)
    in_a_new_process()
    fake = Fake("flash_attn_2")
    (reason,) = Router(HERE, {"flash_attn_2": fake}).unavailable("flash_attn_2")
    assert reason == snapshot
    assert fake.loads == 0
    # The probe itself must be able to try again.
    assert Router(HERE, {"flash_attn_2": fake}, use_probe_results=False).unavailable("flash_attn_2") == ()


@pytest.mark.parametrize("outcome", [GOOD, Outcome("untested", "out of memory"), Outcome("unavailable", "x")])
def test_what_it_did_not_condemn_stays_available(outcome: Outcome) -> None:
    remembered.remember({"flash_attn_2": outcome}, HERE)
    in_a_new_process()
    assert Router(HERE, {"flash_attn_2": Fake("flash_attn_2")}).unavailable("flash_attn_2") == ()
    assert remembered.recall("flash_attn_2", HERE) == (GOOD if outcome is GOOD else None)


def test_a_later_probe_or_forgetting_lifts_it() -> None:
    for lift in (
        lambda: remembered.remember({"flash_attn_2": GOOD}, HERE),
        lambda: remembered.forget(["flash_attn_2"]),
    ):
        remembered.remember({"flash_attn_2": CRASH, "xformers": CRASH}, HERE)
        lift()
        in_a_new_process()
        assert remembered.refusal("flash_attn_2", HERE) is None
        assert remembered.refusal("xformers", HERE) is not None
    assert remembered.forget() == 1
    in_a_new_process()
    assert remembered.refusal("xformers", HERE) is None
    assert remembered.forget() == 0


@pytest.mark.parametrize(
    "elsewhere",
    [
        replace(HERE, torch="2.12.0"),
        replace(HERE, name="RTX 4080"),
        replace(HERE, capability=(9, 0)),
        replace(HERE, cuda="12.8"),
        replace(HERE, packages=(("flash-attn", "2.8.4"),)),
        replace(HERE, packages=(*HERE.packages, ("triton", "3.6.0"))),
    ],
)
def test_it_counts_only_where_it_was_found(elsewhere: Platform) -> None:
    remembered.remember({"flash_attn_2": CRASH}, HERE)
    assert remembered.refusal("flash_attn_2", elsewhere) is None
    assert remembered.refusal("flash_attn_2", HERE) is not None


def test_driver_interpreter_and_our_version_are_part_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {environment.probe_key("flash_attn_2", HERE)}
    monkeypatch.setattr(environment, "driver", lambda: "580.1")
    keys.add(environment.probe_key("flash_attn_2", HERE))
    monkeypatch.setattr(environment, "own_version", lambda: "99.0")
    keys.add(environment.probe_key("flash_attn_2", HERE))
    monkeypatch.setattr(sys, "prefix", "/another/venv")
    keys.add(environment.probe_key("flash_attn_2", HERE))
    assert len(keys) == 4


def test_stored_keys_keep_their_text(monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion) -> None:
    """Another wording would orphan what people have stored."""
    monkeypatch.setattr(environment, "driver", lambda: "580.1")
    monkeypatch.setattr(environment, "own_version", lambda: "1.0")
    assert environment.probe_key("flash_attn_2", HERE).partition(" | Python ")[0] == snapshot
    assert environment.environment_of(replace(HERE, cudnn_sdp_enabled=False)) == snapshot


def test_a_package_of_no_concern_to_the_backend_changes_nothing() -> None:
    remembered.remember({"flash_attn_2": CRASH}, HERE)
    other = replace(HERE, packages=(*HERE.packages, ("xformers", "0.0.35")))
    assert remembered.refusal("flash_attn_2", other) is not None


def test_a_described_machine_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    remembered.remember({"flash_attn_2": CRASH}, HERE)
    described = replace(HERE, described=True)
    with monkeypatch.context() as patch:
        patch.setattr(remembered, "path", lambda: pytest.fail("asked"))
        assert Router(described, {"flash_attn_2": Fake("flash_attn_2")}).unavailable("flash_attn_2") == ()
        assert remembered.recall("flash_attn_2", described) is None


def test_the_file_is_read_once_however_many_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    remembered.remember({"flash_attn_2": GOOD}, HERE)
    in_a_new_process()
    reads = []
    read_file = remembered.read_file
    monkeypatch.setattr(remembered, "read_file", lambda file, most: reads.append(file.name) or read_file(file, most))
    for _ in range(3):
        router = Router(HERE, {name: Fake(name) for name in ("flash_attn_2", "xformers", "aiter")})
        assert [router.unavailable(name) for name in router.backends] == [(), (), ()]
    assert reads.count(remembered.FILE) == 1


def test_a_family_does_not_run_the_member_that_crashed() -> None:
    remembered.remember({"flash_attn_2": CRASH}, HERE)
    member = Fake("flash_attn_2")
    family = BackendGroup("flash_attn", "For a test.", (member.id,), {}, {member.id: member}.__getitem__)
    router = Router(HERE, {"flash_attn": family, "flash_attn_2": member})
    assert "doctor --probe flash_attn_2" in router.unavailable("flash_attn")[0]
    assert member.loads == 0


def test_a_member_that_calls_exit_while_it_loads_gives_way() -> None:
    class Exits(Fake):
        def load(self, platform: Platform) -> Kernel:
            sys.exit("no licence")

    second = Fake("flash_attn_2")
    members = {"flash_attn_3": Exits("flash_attn_3"), second.id: second}
    family = BackendGroup("flash_attn", "For a test.", tuple(members), {}, members.__getitem__)
    assert Router(HERE, {"flash_attn": family}).unavailable("flash_attn") == ()
    assert second.loads == 1


def test_the_last_resort_is_never_taken_away() -> None:
    remembered.remember({"torch_sdpa": CRASH}, HERE)
    assert Router(HERE, {"torch_sdpa": Fake("torch_sdpa")}).unavailable("torch_sdpa") == ()


def test_the_doctors_rows_show_it(snapshot: SnapshotAssertion) -> None:
    remembered.remember({"flash_attn_2": CRASH, "xformers": GOOD}, HERE)
    in_a_new_process()
    router = Router(HERE, {name: Fake(name) for name in ("flash_attn_2", "xformers", "aiter")})
    rows = {row.id: row for row in examine(router, Interpreter("python", "cp312", "linux_x86_64"))}
    assert rows["flash_attn_2"].probed == CRASH
    assert not rows["flash_attn_2"].available
    assert rows["flash_attn_2"].symbols.problem == snapshot
    assert rows["flash_attn_2"].as_dict()["probed"]["stderr"] == ("Fatal Python error",)  # type: ignore[index]
    assert rows["xformers"].probed == GOOD
    assert rows["xformers"].available
    assert rows["aiter"].probed is None


# The file


@pytest.mark.parametrize(
    ("system", "variables", "place"),
    [
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/attention-backends"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "~/.cache/attention-backends"),
        ("linux", {}, "~/.cache/attention-backends"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "~/Library/Caches/attention-backends"),
        ("win32", {"LOCALAPPDATA": "/AppData/Local"}, "/AppData/Local/attention-backends"),
        ("win32", {}, "~/AppData/Local/attention-backends"),
        ("linux", {"ATTENTION_BACKENDS_CACHE": "/mine", "XDG_CACHE_HOME": "/xdg"}, "/mine"),
        ("linux", {"ATTENTION_BACKENDS_CACHE": "~/mine"}, "~/mine"),
        ("linux", {"ATTENTION_BACKENDS_CACHE": "/~nobody-of-this-name"}, "/~nobody-of-this-name"),
    ],
)
def test_it_lies_where_the_platform_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, system: str, variables: dict[str, str], place: str
) -> None:
    for name in ("ATTENTION_BACKENDS_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert remembered.path() == Path(place).expanduser() / "probes.json"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format": 1, "outcomes": {"a": {"sta',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'{"format": 2, "outcomes": {}}',
        b'{"format": 1, "outcomes": {"a": {"status": "sunny", "reason": ""}}}',
        b'{"format": 1, "outcomes": {"a": {"status": "ok", "reason": "", "ms": "x", "relative_l2": 0, "stderr": []}}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_set_aside_with_a_message(
    folder: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    folder.mkdir()
    (folder / "probes.json").write_bytes(content)
    with caplog.at_level(logging.WARNING, "attention_backends"):
        assert remembered.refusal("flash_attn_2", HERE) is None
    assert "cannot be read" in caplog.text
    assert (folder / "probes.json.damaged").read_bytes() == content
    remembered.remember({"flash_attn_2": CRASH}, HERE)
    in_a_new_process()
    assert remembered.refusal("flash_attn_2", HERE) is not None


def test_a_folder_that_cannot_be_written_is_said_and_is_no_obstacle(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*where: object, **how: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refused)
    with caplog.at_level(logging.WARNING, "attention_backends"):
        remembered.remember({"flash_attn_2": CRASH}, HERE)
    assert "this process only" in caplog.text
    assert "Permission denied" in caplog.text
    assert remembered.refusal("flash_attn_2", HERE) is not None
    assert not (folder / "probes.json").exists()


def test_the_cache_folder_may_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(remembered.CACHE_VARIABLE, str(tmp_path / "file"))
    assert remembered.recall("flash_attn_2", HERE) is None
    remembered.remember({"flash_attn_2": CRASH}, HERE)
    assert remembered.recall("flash_attn_2", HERE) == CRASH


def test_a_write_that_breaks_off_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered.remember({"flash_attn_2": GOOD}, HERE)

    def no_space(data: object, stream: object, **how: object) -> None:
        stream.write('{"format"')  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", no_space)
        remembered.remember({"flash_attn_2": CRASH}, HERE)
    in_a_new_process()
    assert remembered.recall("flash_attn_2", HERE) == GOOD
    assert [file.name for file in folder.iterdir()] == ["probes.json"]


def test_what_another_process_wrote_in_between_is_kept(folder: Path) -> None:
    assert remembered.recall("xformers", HERE) is None  # this process has read the file
    data = {"format": 1, "outcomes": {environment.probe_key("xformers", HERE): vars(CRASH) | {"stderr": []}}}
    folder.mkdir()
    (folder / "probes.json").write_text(json.dumps(data))
    assert remembered.recall("xformers", HERE) is None  # and reads it no second time
    remembered.remember({"flash_attn_2": GOOD}, HERE)
    assert remembered.recall("xformers", HERE) is not None


def test_it_does_not_grow_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MOST", 3)
    for number in range(5):
        remembered.remember({"flash_attn_2": GOOD}, replace(HERE, torch=f"2.{number}.0"))
    in_a_new_process()
    kept = [remembered.recall("flash_attn_2", replace(HERE, torch=f"2.{number}.0")) for number in range(5)]
    assert kept == [None, None, GOOD, GOOD, GOOD]


def test_our_version_is_the_one_of_the_project_file() -> None:
    assert f'version = "{environment.own_version()}"' in (
        Path(__file__).resolve().parents[2] / "pyproject.toml"
    ).read_text(encoding="utf-8")


def test_triton_is_a_part_of_every_environment() -> None:
    """flex_attn has no package of its own, and is compiled by Triton: what one version broke another may not."""
    from attention_backends.backends.measure import environment
    from attention_backends.backends.values.platform import Platform

    def key(version: str) -> str:
        return environment.probe_key("flex_attn", Platform("cuda", torch="2.11.0", packages=(("triton", version),)))

    assert "triton 3.6.0" in key("3.6.0")
    assert key("3.6.0") != key("3.7.0")
