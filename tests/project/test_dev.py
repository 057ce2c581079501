"""dev.py: finding a ComfyUI and its interpreter, preparing `.venv`, and starting under hard conditions."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from attention_backends.devtools import comfyui, commands, console, environment, web
from attention_backends.devtools.commands import FORMATTED, RINGS
from attention_backends.devtools.console import Stop
from attention_backends.devtools.demo import VIDEO
from attention_backends.devtools.inside.check_types import CHECKED

ROOT = Path(__file__).resolve().parents[2]


def _fake_comfyui(path: Path, version: str = "0.33.0") -> Path:
    (path / "comfy").mkdir(parents=True)
    (path / "main.py").touch()
    (path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return path


def _copy(target: Path) -> Path:
    """The folder under another name, without its environment."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "build")
    return Path(shutil.copytree(ROOT, target, ignore=ignored))


def _dev(folder: Path, *arguments: str, before: str = "", home: Path) -> subprocess.CompletedProcess[str]:
    """Runs dev.py as an embedded Python does: isolated, and the script's folder is not on the path."""
    code = f"{before}\nimport runpy, sys\nsys.argv = {['dev.py', *arguments]!r}\n"
    code += f"runpy.run_path({str(folder / 'dev.py')!r}, run_name='__main__')"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COMFYUI_")}
    environ |= {"HOME": str(home), "USERPROFILE": str(home)}
    return subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=home, env=environ, timeout=300
    )


class TestFindingComfyUI:
    def test_the_named_one_comes_before_the_one_around_the_pack(self, tmp_path: Path) -> None:
        named = _fake_comfyui(tmp_path / "named", "0.18.1")
        around = _fake_comfyui(tmp_path / "around")
        pack = around / "custom_nodes" / "pack"
        found = comfyui.find(pack, {"COMFYUI_PATH": str(named)})
        assert found is not None
        assert (found.path, found.version, found.found_by) == (named, "0.18.1", "COMFYUI_PATH")
        found = comfyui.find(pack, {})
        assert found is not None
        assert found.path == around

    def test_the_default_place_comes_last(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        assert comfyui.find(tmp_path / "pack", {}) is None
        default = _fake_comfyui(tmp_path / "comfy" / "ComfyUI")
        found = comfyui.find(tmp_path / "pack", {})
        assert found is not None
        assert found.path == default

    def test_a_wrong_name_is_not_replaced_by_another_one(self, tmp_path: Path) -> None:
        around = _fake_comfyui(tmp_path / "around")
        with pytest.raises(Stop, match=r"COMFYUI_PATH is .*nowhere"):
            comfyui.find(around / "custom_nodes" / "pack", {"COMFYUI_PATH": str(tmp_path / "nowhere")})

    @pytest.mark.parametrize(
        "place",
        ["ComfyUI/.venv/bin/python", "ComfyUI/venv/Scripts/python.exe", "python_embeded/python.exe"],
    )
    def test_its_own_interpreter(self, tmp_path: Path, place: str) -> None:
        path = _fake_comfyui(tmp_path / "ComfyUI")
        assert comfyui.own_interpreter(path, {}) is None
        python = tmp_path / place
        python.parent.mkdir(parents=True)
        python.touch()
        assert comfyui.own_interpreter(path, {}) == python

    def test_a_named_interpreter_must_be_there(self, tmp_path: Path) -> None:
        assert comfyui.own_interpreter(tmp_path, {"COMFYUI_PYTHON": sys.executable}) == Path(sys.executable)
        with pytest.raises(Stop, match=r"COMFYUI_PYTHON is .*gone"):
            comfyui.own_interpreter(tmp_path, {"COMFYUI_PYTHON": str(tmp_path / "gone")})

    def test_other_versions_beside_it(self, tmp_path: Path) -> None:
        main = _fake_comfyui(tmp_path / "ComfyUI")
        _fake_comfyui(tmp_path / "ComfyUI-0.18.1", "0.18.1")
        (tmp_path / "ComfyUI-notes").mkdir()
        found = comfyui.find(tmp_path / "pack", {"COMFYUI_PATH": str(main)})
        assert found is not None
        assert [other.version for other in comfyui.others_beside(found, {})] == ["0.18.1"]


class TestPreparing:
    def test_comfyui_brings_no_torch(self) -> None:
        needs = "torch\ntorchsde\ntorchvision>=0.2\nTorchAudio ; x\n# torch\nspandrel\n"
        assert environment.without_torch(needs) == "torchsde\n# torch\nspandrel\n"

    @pytest.mark.parametrize(
        ("torch", "vision", "audio"),
        [("2.13.0+cpu", "0.28.0", "2.11.0"), ("2.11.0", "0.26.0", "2.11.0"), ("2.9.1+cu128", "0.24.1", "2.9.1")],
    )
    def test_what_goes_with_a_torch(self, torch: str, vision: str, audio: str) -> None:
        assert environment.companions_of(torch) == (vision, audio)

    def test_a_second_time_costs_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[str, ...]] = []
        offered: list[Path] = []
        monkeypatch.setattr(environment, "offer_package", lambda root, python: offered.append(root))
        monkeypatch.setattr(environment, "_create", lambda venv: (venv / "bin").mkdir(parents=True))
        monkeypatch.setattr(environment, "python_of", lambda venv: venv / "bin")
        monkeypatch.setattr(environment, "version_in", lambda python, package: None)
        monkeypatch.setattr(environment, "_install", lambda python, *what: calls.append(what))
        for name in ("requirements.txt", "requirements-dev.txt"):
            (tmp_path / name).write_text("pytest\n")

        environment.prepare(tmp_path)
        assert [what[0] for what in calls] == [environment.TORCH, "-r"], "torch comes first"
        environment.prepare(tmp_path)
        assert len(calls) == 2
        (tmp_path / "requirements-dev.txt").write_text("pytest\nruff\n")
        environment.prepare(tmp_path)
        assert len(calls) == 4
        assert offered == [tmp_path] * 3, "also in a .venv that was made before"

    def test_a_failed_installation_is_not_taken_for_done(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(python: Path, *what: str) -> None:
            raise Stop("no network")

        monkeypatch.setattr(environment, "_create", lambda venv: (venv / "bin").mkdir(parents=True))
        monkeypatch.setattr(environment, "python_of", lambda venv: venv / "bin")
        monkeypatch.setattr(environment, "version_in", lambda python, package: "2.13.0")
        monkeypatch.setattr(environment, "_install", fail)
        for name in ("requirements.txt", "requirements-dev.txt"):
            (tmp_path / name).touch()
        for _ in range(2):
            with pytest.raises(Stop, match="no network"):
                environment.prepare(tmp_path)

    @pytest.mark.parametrize(
        ("missing", "sentence"),
        [("venv", "has no venv module"), ("ensurepip", "sudo apt install python3")],
    )
    def test_what_makes_environments_is_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, sentence: str
    ) -> None:
        there = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else there(name))
        for name in ("requirements.txt", "requirements-dev.txt"):
            (tmp_path / name).touch()
        with pytest.raises(Stop, match=sentence):
            environment.prepare(tmp_path)
        assert not (tmp_path / ".venv").exists()


def test_lint_reads_all_code() -> None:
    files = subprocess.check_output(["git", "ls-files", "*.py"], cwd=ROOT, text=True).split()
    code = {name.partition("/")[0] for name in files}
    assert set(FORMATTED) == code
    assert set(CHECKED) == code - {"benchmarks", "dev.py", "tests"}  # each finds its modules by itself


@pytest.mark.parametrize(("types", "tests"), [(0, 0), (1, 0), (0, 1)])
def test_mypy_runs_beside_the_tests_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], types: int, tests: int
) -> None:
    """The tests end after mypy has begun: here they wait for a file that it writes."""
    script, begun = tmp_path / "devtools" / "inside" / "check_types.py", tmp_path / "begun"
    script.parent.mkdir(parents=True)
    script.write_text(f"import sys\nopen({str(begun)!r}, 'w').close()\nprint('what it found')\nsys.exit({types})\n")

    def call(root: Path, python: Path, *command: str, comfyui: object = None) -> int:
        if "pytest" not in command:
            return 0
        for _ in range(600):
            if begun.exists():
                return tests
            time.sleep(0.1)
        return 2

    monkeypatch.setattr(commands, "_prepare_and_say", lambda root: (Path(sys.executable), None))
    monkeypatch.setattr(commands, "prepare_web", lambda root: None)
    monkeypatch.setattr(commands, "_call", call)
    assert commands._test(tmp_path, []) == (types or tests)
    assert "mypy\nwhat it found\n" in capfd.readouterr().out


class TestStarting:
    def test_from_any_folder_and_off_the_path(self, tmp_path: Path) -> None:
        folder = _copy(tmp_path / "a pack-1.0 (copy)")
        result = _dev(folder, "--help", home=tmp_path)
        assert result.returncode == 0, result.stderr
        for command in ("setup", "demo", "test", "bench", "lint", "doctor", "card", "docs"):
            assert command in result.stdout

    @pytest.mark.parametrize("version", ["3.10", "3.12", "3.13"])
    def test_under_another_python(self, version: str) -> None:
        python = shutil.which(f"python{version}")
        # A version manager's stand-in may be on PATH without the version itself.
        if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode != 0:
            pytest.skip(f"no python{version} on this machine")
        result = subprocess.run([python, str(ROOT / "dev.py"), "--help"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "doctor" in result.stdout

    def test_an_embedded_python_gets_a_sentence(self, tmp_path: Path) -> None:
        folder = _copy(tmp_path / "pack")
        before = "import sys; sys.modules['venv'] = sys.modules['ensurepip'] = None"
        result = _dev(folder, "setup", before=before, home=tmp_path)
        assert result.returncode == 2
        assert "embedded Python" in result.stderr
        assert "Traceback" not in result.stderr

    def test_arguments_that_mean_nothing_are_refused(self, tmp_path: Path) -> None:
        result = _dev(ROOT, "setup", "--fast", home=tmp_path)
        assert result.returncode == 2
        assert "--fast" in result.stderr

    def test_a_ring_that_is_not_there_is_refused_with_the_list(self, tmp_path: Path) -> None:
        result = _dev(ROOT, "test", "numerics", home=tmp_path)
        assert result.returncode == 2
        assert "numerics" in result.stderr
        for ring in RINGS:
            assert ring in result.stderr

    def test_the_demo_without_comfyui(self, tmp_path: Path) -> None:
        folder = _copy(tmp_path / "pack")
        video = folder / "demo" / "weights" / VIDEO
        video.unlink(missing_ok=True)  # a film takes minutes; test_film.py makes one
        result = _dev(folder, "demo", home=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
        assert video.name in result.stdout
        assert str(tmp_path / "comfy" / "ComfyUI") in result.stdout
        assert "COMFYUI_PATH: not set" in result.stdout
        assert "comfy install" in result.stdout
        assert "torch_sdpa" in result.stdout

    def test_doctor_as_json_is_only_json(self, tmp_path: Path) -> None:
        result = _dev(_copy(tmp_path / "pack"), "doctor", "--json", home=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "torch_sdpa" in {backend["id"] for backend in json.loads(result.stdout)["backends"]}


def test_output_survives_a_windows_console(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    console.make_output_safe()
    console.say("C:\\Users\\\u5f20\\ComfyUI")
    assert written.getvalue().split() == [b"C:\\Users\\?\\ComfyUI"]


def test_progress_away_from_a_terminal_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    progress = console.Progress()
    for tenth in range(210):
        progress.show(f"{tenth / 10} s", tenth / 10)
    progress.end()
    assert capsys.readouterr().out.split("\n") == ["0.0 s", "10.0 s", "20.0 s", ""]


class TestPackagesOfTheFrontEnd:
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> tuple[Path, Path]:
        """A checkout whose npm only notes that it was called, in the file that is returned too."""
        (tmp_path / "tests" / "web").mkdir(parents=True)
        (tmp_path / "tests" / "web" / "package.json").write_text("{}", encoding="utf-8")
        calls, npm = tmp_path / "calls", tmp_path / "npm"
        npm.write_text(f"#!/bin/sh\nmkdir -p node_modules\necho $1 >> {calls}\nexit {status}\n", encoding="utf-8")
        npm.chmod(0o755)
        monkeypatch.setattr(web.shutil, "which", lambda _: str(npm))
        return tmp_path, calls

    @pytest.mark.skipif(sys.platform == "win32", reason="the npm of this test is a shell script")
    def test_they_are_installed_once_for_each_list(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root, calls = self.folder(tmp_path, monkeypatch, 0)
        web.prepare_web(root)
        web.prepare_web(root)
        assert calls.read_text() == "install\n"
        (root / "tests" / "web" / "package.json").write_text('{"private": true}', encoding="utf-8")
        web.prepare_web(root)
        assert calls.read_text() == "install\ninstall\n"

    @pytest.mark.skipif(sys.platform == "win32", reason="the npm of this test is a shell script")
    def test_a_failed_installation_is_said_and_tried_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root, calls = self.folder(tmp_path, monkeypatch, 1)
        web.prepare_web(root)
        web.prepare_web(root)
        assert calls.read_text() == "install\ninstall\n"
        assert "are skipped" in capsys.readouterr().out

    def test_without_npm_it_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        root, calls = self.folder(tmp_path, monkeypatch, 0)
        monkeypatch.setattr(web.shutil, "which", lambda _: None)
        web.prepare_web(root)
        assert not calls.exists()
        assert "npm was not found" in capsys.readouterr().out


class TestRings:
    def test_every_test_is_in_one(self) -> None:
        assert {path.parent.name for path in (ROOT / "tests").glob("**/test_*.py")} == set(RINGS)

    def test_the_pure_one_is_collected_without_torch_and_xdist(self) -> None:
        """In full: `python -m pytest tests/pure` where there is no torch."""
        code = "import sys; sys.modules['torch'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
        words = ["-p", "no:xdist", "-p", "no:cacheprovider", "-q", "--collect-only", "tests/pure"]
        result = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:]
        assert "test_router.py" in result.stdout
        assert "error" not in result.stdout.splitlines()[-1]
