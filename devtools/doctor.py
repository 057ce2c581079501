"""`dev.py doctor` and `dev.py card`: the pack's own commands, in the interpreter that its kernels would run in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from . import comfyui as comfy
from .environment import prepare, python_of, version_in


def doctor(root: Path, arguments: list[str]) -> int:
    """Runs the pack's own `doctor`."""
    return _run(root, ["doctor", *arguments])


def card(root: Path, arguments: list[str]) -> int:
    """Runs the pack's own `card`; the results go to benchmarks/results where no other folder is named."""
    return _run(root, ["card", "--out", str(root / "benchmarks" / "results"), *arguments])


def _run(root: Path, command: list[str]) -> int:
    found = comfy.find(root)
    if found is not None and found.python is not None:
        python = found.python
    elif python_of(root / ".venv").exists():
        python = python_of(root / ".venv")
    elif version_in(Path(sys.executable), "torch"):
        python = Path(sys.executable)
    else:
        python = prepare(root)
    return subprocess.run([str(python), str(root), *command]).returncode
