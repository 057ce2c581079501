"""The command `card`: the order of its parts, their time, and what is left when a process dies at any moment.

The parts are the fast ones of `card_parts.py`; the real ones are in `tests/numeric/test_card_parts.py`.
"""

from __future__ import annotations

import getpass
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import card_parts
import pytest
from attention_backends import cli
from attention_backends.comparison.card import run, store
from attention_backends.comparison.card.command import NAMES
from attention_backends.comparison.card.page import page
from attention_backends.comparison.card.work import Work
from syrupy.assertion import SnapshotAssertion

TESTS = Path(__file__).resolve().parents[1]
SOURCE = "card_parts:PARTS"
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups are POSIX's")
PARENT = f"""
import sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent / "devtools" / "inside")!r}]
import with_package
with_package.load()
import card_parts
from pathlib import Path
from attention_backends.comparison.card.run import measure
measure(Path(sys.argv[1]), sys.argv[2].split(","), 10.0, "card", print, source={SOURCE!r})
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def measured(out: Path, *names: str, minutes: float = 10.0) -> dict[str, Any]:
    file, interrupted = run.measure(out, names, minutes, "card", lambda text: None, source=SOURCE)
    assert not interrupted
    return store.read(file)


@posix
def test_a_crash_costs_the_item_that_crashed(tmp_path: Path) -> None:
    data = measured(tmp_path, "crashing", "losing", "raising", "skipping", "quick")
    parts = data["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        **{"machine": "ok", "crashing": "ok", "losing": "ok", "raising": "failed", "skipping": "skipped"},
        "quick": "ok",
    }
    assert set(parts["crashing"]["results"]) == {"item 0", "item 1", "item 3"}
    assert parts["crashing"]["lost"] == {"item 2": "signal 11 (SIGSEGV)"}
    # What crashed in one part is left out of those after it.
    assert parts["losing"]["lost"] == {"item 0": "the device is gone"}
    assert set(parts["quick"]["results"]) == {"item 1", "item 3"}
    assert parts["skipping"]["reason"] == "no CUDA device"
    assert parts["raising"]["results"] == {"before": 1}
    folder = tmp_path / "some-card-sm-90"
    assert {path.name for path in folder.iterdir()} == {"card.json", "card.md"}
    assert list(tmp_path.iterdir()) == [folder]


@posix
def test_a_part_that_hangs_leaves_time_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LEAST", 0.5), ("GRACE", 0.5), ("MARGIN", 0.0)):
        monkeypatch.setattr(run, name, seconds)
    parts = measured(tmp_path, "hanging", "quick", "quick", minutes=0.2)["parts"]
    assert set(parts["hanging"]["lost"]) == {"item 1"}
    assert parts["quick"]["status"] == "ok"
    assert set(parts["hanging"]["results"]) == {"item 0", "item 2", "item 3"}, "it is taken up at the end, without it"


def test_what_had_no_time_is_taken_up_at_the_end(tmp_path: Path) -> None:
    parts = measured(tmp_path, "late", "quick")["parts"]
    assert parts["late"]["status"] == "ok"
    assert not parts["late"]["not_reached"]
    assert list(parts["late"]["results"]) == card_parts.ITEMS


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    data = measured(tmp_path, "quick", minutes=0.001)
    assert {part["status"] for part in data["parts"].values()} == {"not started"}
    assert (tmp_path / "unknown" / "card.md").is_file()


def left_in(out: Path) -> dict[str, Any]:
    """The results that a killed run left."""
    file = store.newest(out)
    assert file is not None
    data = store.read(file)
    assert data["state"] in ("running", "complete")
    assert page(data)
    whole = {"machine": card_parts.MACHINE, "quick": {item: {"text": "x" * 5000} for item in card_parts.ITEMS}}
    for name, part in data["parts"].items():
        assert part.get("results", {}).items() <= whole[name].items()
    return data


def killed(out: Path, environ: dict[str, str], *, after: int | None = None) -> int:
    """Start a run and wait for its end; `after` so many lines of its output kill it. Its status."""
    command = [sys.executable, "-c", PARENT, str(out), "quick"]
    environ = {**os.environ, **environ, "TMPDIR": str(out.parent)}  # what is killed leaves its temporary folder
    running = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None
    if after is not None:
        for _ in range(after):
            running.stdout.readline()
        running.kill()
    running.stdout.read()
    running.communicate(timeout=60)
    return running.returncode


MOMENTS = [
    (who, number, moment)
    for number, moment in zip((3, 5, 7, 3, 5), card_parts.MOMENTS, strict=True)  # odd ones are JSON, even ones pages
    for who in ("child", "parent")
]


@posix
@pytest.mark.parametrize(("who", "number", "moment"), MOMENTS)
def test_killed_in_a_write_it_leaves_readable_results(tmp_path: Path, who: str, number: int, moment: str) -> None:
    out, mark = tmp_path / "out", tmp_path / "killed"
    status = killed(out, {"CARD_TEST_KILL": f"{who}:{number}:{moment}", "CARD_TEST_KILLED": str(mark)})
    data = left_in(out)
    assert mark.exists()
    assert (data["state"] == "complete") is (who == "child"), "a part that dies is a part that crashed"
    assert (status == -signal.SIGKILL) is (who == "parent")
    assert ("signal 9 (SIGKILL)" in str(data)) is (who == "child")


@posix
@pytest.mark.parametrize("after", [1, 3])
def test_killed_from_outside_it_leaves_readable_results(tmp_path: Path, after: int) -> None:
    assert killed(tmp_path / "out", {}, after=after) == -signal.SIGKILL
    assert left_in(tmp_path / "out")["state"] == "running"


def test_any_cut_of_the_file_that_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, draw = tmp_path / store.RUNNING, random.Random(0)
    data = {"kind": store.KIND, "format": store.FORMAT, "command": "", "minutes": 1.0, "started": "",
            "state": "running", "parts": {}}  # fmt: skip
    store.write(file, data)

    def cut(written: Path, target: Path) -> None:
        os.truncate(written, draw.randrange(written.stat().st_size))
        raise InterruptedError

    monkeypatch.setattr(os, "replace", cut)
    for _ in range(10):
        with pytest.raises(InterruptedError):
            store.write(file, {**data, "state": "complete"})
        assert len(list(tmp_path.iterdir())) == 3, "the two files and the one that was cut"
        assert store.newest(tmp_path) == file
        assert store.read(file)["state"] == "running"


@pytest.mark.parametrize(
    ("user", "host", "found"),
    [
        ("alice", "alice-box.lan", "... on ...: rooted alices at the root, ubuntu"),
        ("root", "Ubuntu", "alice on alice-box: rooted alices at the root, ubuntu"),
        ("bob", "pc", "alice on alice-box: rooted alices at the root, ubuntu"),
    ],
)
def test_names_are_replaced_as_whole_words_and_common_words_stay(
    monkeypatch: pytest.MonkeyPatch, user: str, host: str, found: str
) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: user)
    monkeypatch.setattr(store.platform, "node", lambda: host)
    text = "alice on alice-box: rooted alices at the root, ubuntu"
    assert store.nameless({"text": text, "id": "alice"}) == {"text": found, "id": "alice", "kind": store.KIND}


def test_a_part_ends_when_the_run_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / store.RUNNING
    store.write(file, {"kind": store.KIND, "format": store.FORMAT, "command": "", "minutes": 1.0, "started": "",
                       "state": "running", "parts": {}})  # fmt: skip
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    Work("quick", file, 10.0, parent=os.getppid()).keep()
    assert not ends
    Work("quick", file, 10.0, parent=os.getppid() + 1).keep()
    assert ends == [1]


@posix
def test_an_interruption_ends_the_run_with_what_there_is(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path), "quick,hanging"]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    assert running.stdout is not None
    while not running.stdout.readline().startswith("hanging"):
        pass
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    data = left_in_state(tmp_path)
    assert data["state"] == "interrupted"
    assert data["parts"]["quick"]["status"] == "ok"


def left_in_state(out: Path) -> dict[str, Any]:
    file = store.newest(out)
    assert file is not None
    assert file.name == store.RUNNING
    return store.read(file)


@posix
def test_what_is_shared_names_nobody_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured(tmp_path, "raising")
    assert cli.main(["card", "--share", "--out", str(tmp_path)]) == 0
    shared = capsys.readouterr().out
    for name in (str(Path.home()) + "/", str(tmp_path), f" {getpass.getuser()} "):
        assert name not in shared
    assert "kernel.so" in shared
    assert cli.main(["card", "--share", "--json", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == store.KIND


@pytest.mark.parametrize(
    "words",
    [["--minutes", "0"], ["--minutes", "nan"], ["--parts", "numerics,dancing"], ["--parts", ","], ["--share"]],
    ids=" ".join,
)
def test_bad_arguments_end_with_2_and_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str],
    snapshot: SnapshotAssertion,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(["card", *words]) == 2
    assert capsys.readouterr().err == snapshot


def test_a_page_of_all_parts(snapshot: SnapshotAssertion) -> None:
    text = (TESTS / "fixtures" / "card.json").read_text(encoding="utf-8")
    data = json.loads(text)
    assert set(data["parts"]) == {"machine", *NAMES}
    assert page(data) == snapshot
