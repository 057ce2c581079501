"""Older front ends of ComfyUI for tests: downloaded once, kept in the person's cache, for `--front-end-root`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

PACKAGE = "comfyui_frontend_package"


def front_end_or_skip(version: str) -> Path:
    """The folder of a front end's files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attention-backends-tests"
    folder = cache / f"front_end_{version}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as made:
            _download(version, Path(made))
            if not folder.is_dir():  # another process may have been faster
                (Path(made) / PACKAGE).rename(folder)
    return folder / "static"


def _download(version: str, target: Path) -> None:
    wanted = f"{PACKAGE}=={version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "0", "--timeout", "30"]
    try:
        subprocess.run(
            [*command, "--dest", str(target), wanted], capture_output=True, text=True, timeout=300, check=True
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{wanted} could not be downloaded within 300 s")
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        pytest.skip(f"{wanted} could not be downloaded: {why}")
    with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
        wheel.extractall(target)
