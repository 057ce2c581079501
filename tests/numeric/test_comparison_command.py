"""`compare` on the command line: from an empty folder to three files, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from attention_backends.cli import main
from attention_backends.comparison import command
from syrupy.assertion import SnapshotAssertion

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--size", "16", "--steps", "2", "--repeat", "2", "--device", "cpu")


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT), "compare", *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )


def refused(text: str) -> object:
    return pytest.fail(f"{text} is no JSON")


def test_a_run_writes_picture_data_and_report(tmp_path: Path) -> None:
    done = compare(tmp_path, *TINY, "--prompt", "a small blue ring")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "attention_comparison"
    assert sorted(path.name for path in folder.iterdir()) == sorted(command.FILES)
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((folder / "comparison.json").read_text(encoding="utf-8"), parse_constant=refused)
    asked = [row["asked"] for row in data["rows"]]
    assert asked[:3] == ["torch_sdpa", "sdpa_math", "emulated_int8"]
    assert all(row["runs"] == 2 for row in data["rows"])
    assert (data["prompt"], data["width"], data["height"], data["steps"]) == ("a small blue ring", 16, 16, 2)
    text = (folder / "comparison.md").read_text(encoding="utf-8")
    assert "--prompt 'a small blue ring'" in text
    for backend in asked:
        assert backend in done.stdout
        assert f"| {backend} |" in text
    assert str(folder / "comparison.png") in done.stdout
    assert done.stdout.isascii()
    assert "\r" not in done.stderr, "no progress line where stderr is not a terminal"


def test_the_command_in_the_report_repeats_it(tmp_path: Path) -> None:
    import shlex

    first = compare(tmp_path, *TINY, "--backends", "sdpa_math", "--output", "one", "--prompt", "a large pink heart")
    assert first.returncode == 0, first.stderr
    one = json.loads((tmp_path / "one" / "comparison.json").read_text(encoding="utf-8"))
    words = shlex.split(one["command"])
    again = compare(tmp_path, *words[words.index("compare") + 1 :], "--output", "two")
    assert again.returncode == 0, again.stderr
    two = json.loads((tmp_path / "two" / "comparison.json").read_text(encoding="utf-8"))
    assert two["command"] == one["command"]
    assert [row["relative_l2"] for row in two["rows"]] == [row["relative_l2"] for row in one["rows"]]


@pytest.mark.parametrize("mode", ["one_step", "attention"])
def test_the_other_modes_write_the_same_files(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", *TINY, "--backends", "sdpa_math,cudnn", "--mode", mode, "--output", str(tmp_path / "out")]
    assert main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out, parse_constant=refused)
    assert data["mode"] == mode
    assert [row["failed"] is None for row in data["rows"]] == [True, True, False]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(command.FILES)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--backends", ""], id="no backends"),
        pytest.param(["--backends", "sdpa_math,_native_math"], id="two names"),
        pytest.param(["--backends", "sdpa_math,sdpa_math"], id="a backend twice"),
        pytest.param(["--backends", "sgae"], id="no such backend"),
        pytest.param(["--backends", "auto"], id="auto"),
        pytest.param(["--size", "33x32"], id="width"),
        pytest.param(["--size", "32 by 32"], id="size in words"),
        pytest.param(["--size", "32x32x32"], id="three sizes"),
        pytest.param(["--steps", "0"], id="steps"),
        pytest.param(["--mode", "quick"], id="mode"),
        pytest.param(["--prompt", "a zebra"], id="prompt"),
        pytest.param(["--device", "toaster"], id="device"),
    ],
)
def test_bad_input_ends_with_2_and_a_sentence(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    assert main(["compare", "--output", str(tmp_path / "out"), *arguments]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    said = captured.err.partition(" names are: ")[0]
    assert said.partition(": Expected one of ")[0] == snapshot
    assert captured.out == ""
    assert not list(tmp_path.glob("out/*"))


def test_an_output_that_is_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("here first")
    assert main(["compare", *TINY, "--output", str(tmp_path / "out")]) == 2
    assert "output folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["compare", *TINY], ["bench", "--presets", "flux2", "--tokens", "16"]])
def test_a_folder_without_rights_is_found_before_the_work(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    snapshot: SnapshotAssertion,
) -> None:
    def refuses(**given: Path) -> None:  # root is refused nothing
        raise PermissionError(13, "Permission denied", str(given["dir"]))

    monkeypatch.setattr(command.tempfile, "TemporaryFile", refuses)
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.replace(str(tmp_path), "FOLDER") == snapshot
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_said_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    assert main(["compare", "--output", str(tmp_path / "out")]) == 2
    assert "install scikit-image matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interruption_writes_what_was_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: object, what: str, done: int, total: int) -> None:
        if what == "sdpa_math: run 2 of 2":
            raise KeyboardInterrupt

    monkeypatch.setattr(command.Progress, "__call__", stop)
    assert main(["compare", *TINY, "--backends", "sdpa_math", "--output", str(tmp_path)]) == 130
    assert "Note: interrupted" in capsys.readouterr().out
    data = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert [row["runs"] for row in data["rows"]] == [2, 1]
    assert (tmp_path / "comparison.png").exists()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['x', 'compare', '--help'];"
        f"runpy.run_path({str(ROOT)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--backends" in done.stdout
