"""The server that tests and the demo start: it comes up, runs, says what went wrong, and leaves nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from attention_backends.devtools import comfyui as comfy
from attention_backends.devtools.console import Stop
from attention_backends.devtools.server import Server, WorkflowError
from server_harness import ROOT, comfyui_or_skip, start_server

pytestmark = pytest.mark.comfy
FAILING = """
class Failing:
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "testing", "fail", (), True
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    def fail(self):
        raise ValueError("as it should")
NODE_CLASS_MAPPINGS = {"Failing": Failing}
"""


def _latent() -> dict[str, object]:
    size = {"width": 64, "height": 64, "batch_size": 1}
    return {
        "empty": {"class_type": "EmptyLatentImage", "inputs": size},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["empty", 0], "filename_prefix": "x"}},
    }


def _versions() -> list[comfy.ComfyUI]:
    found = comfy.find(ROOT)
    return [found, *comfy.others_beside(found)] if found else []


@pytest.mark.parametrize("version", _versions() or [None], ids=lambda found: found.version if found else "none")
def test_a_server_from_start_to_end(version: comfy.ComfyUI | None, tmp_path: Path) -> None:
    failing = tmp_path / "failing.py"
    failing.write_text(FAILING)
    before = sorted((version or comfyui_or_skip()).path.glob("custom_nodes/*"))
    with start_server(extra_nodes=[failing], comfyui=version) as server:
        folder, process = server.folder, server.process
        record = server.run(_latent())
        saved = record["outputs"]["save"]["latents"][0]["filename"]
        assert (folder / "output" / saved).is_file()
        _failures_are_told(server)
        assert process.poll() is None
    assert process.poll() is not None
    assert not folder.exists()
    assert sorted((version or comfyui_or_skip()).path.glob("custom_nodes/*")) == before


def _failures_are_told(server: Server) -> None:
    with pytest.raises(WorkflowError, match="Failing: as it should"):
        server.run({"1": {"class_type": "Failing", "inputs": {}}})
    with pytest.raises(WorkflowError, match="NoSuchNode"):
        server.queue({"1": {"class_type": "NoSuchNode", "inputs": {}}})
    wrong = _latent() | {"empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 64}}}
    with pytest.raises(WorkflowError, match=r"EmptyLatentImage.*height"):
        server.queue(wrong)


def test_a_server_that_does_not_start_shows_its_log() -> None:
    with pytest.raises(Stop, match="unrecognized arguments: --no-such-flag"), start_server(flags=["--no-such-flag"]):
        pytest.fail("it started")


@pytest.mark.parametrize("film", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["pictures", "film"])
def test_the_demo_as_a_person_runs_it(tmp_path: Path, film: bool) -> None:
    found = comfyui_or_skip()
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "demo_output")
    pack = Path(shutil.copytree(ROOT, tmp_path / "any name", ignore=ignored))
    if not film:  # it takes most of the time; test_film.py makes a small one
        next((pack / "demo" / "weights").glob("tiny_motion*")).unlink()
    environ = os.environ | {"COMFYUI_PATH": str(found.path), "COMFYUI_PYTHON": str(found.python or sys.executable)}
    result = subprocess.run(
        [sys.executable, str(pack / "dev.py"), "demo"],
        capture_output=True,
        text=True,
        env=environ,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    ran = {(row[0], row[2]) for row in rows if len(row) >= 5 and row[0] in ("self", "cross")}
    assert ran == {("self", "torch_sdpa"), ("cross", "sdpa_math")}
    written = {path.name for path in (pack / "demo_output").iterdir()}
    assert written >= {"demo_00001_.latent", "comparison_00001_.png", "last_run.json", "workflow_api.json"}
    assert ("film_both.webp" in written) is film
    verdicts = {row[0]: " ".join(row) for row in rows if row}
    assert any(words in verdicts["comfy"] for words in ("bit-identical", "same to the eye"))
    assert "slightly different" in verdicts["emulated_int8"]
