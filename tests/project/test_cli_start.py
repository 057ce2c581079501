"""Starting the command line: installed or not, from any folder, with and without torch, on any console."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPY = """
import atexit, json, os, sys

if os.environ.get("HIDE_TORCH"):
    sys.modules["torch"] = None  # any import of it raises

def report():
    torch = sys.modules.get("torch") is not None
    print("SPY" + json.dumps({"torch": torch, "path": sys.path}), file=sys.stderr)

atexit.register(report)
"""


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack as somebody downloads it: in a folder of any name, not installed."""
    folder = tmp_path_factory.mktemp("custom nodes") / "attention-backends-main 2"
    for name in ("backends", "cli", "comparison", "nodes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def start(
    tmp_path: Path, *command: str, cwd: Path | None = None, **environ: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run Python with a spy that says at the end what was imported and what the path was."""
    (tmp_path / "sitecustomize.py").write_text(SPY, encoding="utf-8")
    paths = os.pathsep.join(filter(None, (str(tmp_path), environ.pop("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd or tmp_path,
        env={**os.environ, "PYTHONPATH": paths, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    spied = re.search(r"^SPY(.*)$", done.stderr, re.MULTILINE)
    assert spied is not None, done.stderr
    return done, json.loads(spied[1])


EXPLAIN = ("explain", "--platform", "cuda:12.0,cudnn=91002", "--json")


@pytest.mark.parametrize("target", ["{pack}", "{pack}/__main__.py"])
def test_an_uninstalled_folder_of_any_name_runs_from_anywhere_without_torch(
    pack: Path, tmp_path: Path, target: str
) -> None:
    done, spied = start(tmp_path, target.format(pack=pack), *EXPLAIN, HIDE_TORCH="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["backend"] == "cudnn_attn"
    assert not spied["torch"]
    assert os.path.realpath(pack) not in map(os.path.realpath, spied["path"])  # our `nodes` must not shadow ComfyUI's


def test_it_runs_from_inside_its_own_folder(pack: Path, tmp_path: Path) -> None:
    done, spied = start(tmp_path, ".", *EXPLAIN, cwd=pack)
    assert json.loads(done.stdout)["backend"] == "cudnn_attn", done.stderr
    assert os.path.realpath(pack) not in map(os.path.realpath, spied["path"])


def test_torch_is_not_imported_for_a_described_machine_even_where_there_is_one(pack: Path, tmp_path: Path) -> None:
    done, spied = start(tmp_path, str(pack), *EXPLAIN)
    assert done.returncode == 0
    assert not spied["torch"]


def test_an_interpreter_that_keeps_the_scripts_folder_off_its_path(pack: Path) -> None:
    # As an embedded Python does; -I also leaves out PYTHONPATH, so there is no spy.
    for target in (pack, pack / "__main__.py"):
        done = subprocess.run(
            [sys.executable, "-I", str(target), *EXPLAIN], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["backend"] == "cudnn_attn"


def test_as_an_installed_module(pack: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(pack, site / "attention_backends")
    done, _ = start(tmp_path, "-m", "attention_backends", *EXPLAIN, PYTHONPATH=str(site))
    assert json.loads(done.stdout)["backend"] == "cudnn_attn", done.stderr
    done, _ = start(tmp_path, "-m", "attention_backends", "--help", PYTHONPATH=str(site))
    assert done.stdout.startswith("usage: python -m attention_backends ")


def test_doctor_where_there_is_no_torch(pack: Path, tmp_path: Path) -> None:
    done, _ = start(tmp_path, str(pack), "doctor", "--json", HIDE_TORCH="1")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["backends"]
    assert not any(row["available"] for row in rows)
    assert all(row["reasons"][0].startswith("torch: ModuleNotFoundError") for row in rows)
    assert "interpreter that runs ComfyUI" in rows[0]["install"]
    done, _ = start(tmp_path, str(pack), "explain", HIDE_TORCH="1")
    assert done.returncode == 2
    assert "describe one with --platform" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is an OSError of another kind on Windows")
def test_a_reader_that_stops_early_is_no_error(pack: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, str(pack), *EXPLAIN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    running.stdout.close()
    assert running.stderr is not None
    assert running.stderr.read() == ""
    assert running.wait(timeout=60) == 0


def test_a_narrow_console_is_no_obstacle(pack: Path, tmp_path: Path) -> None:
    role = "self.\u4e16\u754c"
    done, _ = start(tmp_path, str(pack), "explain", "--platform", "cpu", "--role", role, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    assert r"self.\u4e16\u754c" in done.stdout
