"""Paired timing, that of `comparison/paired.py`, the lock of `demo/pause.py`, and the name of this machine."""

from __future__ import annotations

import os
import platform
import runpy
from pathlib import Path

# Read from its file, as two_commits.py must not load this folder as the package: its workers load other trees as that.
_ROOT = Path(__file__).resolve().parent.parent
_PAIRED = runpy.run_path(str(_ROOT / "comparison" / "paired.py"))
alternated, interval, ratios = _PAIRED["alternated"], _PAIRED["interval"], _PAIRED["ratios"]
training_paused = runpy.run_path(str(_ROOT / "demo" / "pause.py"))["training_paused"]


def machine() -> str:
    """The processor's name and the number of cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {os.cpu_count()} cores"
