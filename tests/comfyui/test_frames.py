"""A warm call stays short, and a cold one can be followed: the frames of this package, as benchmarks/frames.py has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_location import find_comfyui, why_no_comfyui

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("part", "warm", "cold"), [("sampled", 6, 90), ("python", 7, 70)])
def test_frames_of_a_call(part: str, warm: int, cold: int) -> None:
    if part == "sampled" and find_comfyui() is None:
        pytest.skip(why_no_comfyui())
    command = [sys.executable, str(ROOT / "benchmarks" / "frames.py"), "--work", str(ROOT), "--part", part]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["warm"]["frames"] <= warm, counts["warm"]
    assert counts["cold"]["frames"] <= cold, counts["cold"]
