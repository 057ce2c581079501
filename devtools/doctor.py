"""`dev.py doctor`: the pack's own doctor, in the interpreter that its kernels would run in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from . import comfyui as comfy
from .environment import prepare, python_of, version_in


def doctor(root: Path, arguments: list[str]) -> int:
    """Runs the pack's own `doctor` in the interpreter that would run its kernels."""
    found = comfy.find(root)
    if found is not None and found.python is not None:
        python = found.python
    elif python_of(root / ".venv").exists():
        python = python_of(root / ".venv")
    elif version_in(Path(sys.executable), "torch"):
        python = Path(sys.executable)
    else:
        python = prepare(root)
    return subprocess.run([str(python), str(root), "doctor", *arguments]).returncode
