"""A warm call stays short, and a cold one can be followed: the frames of this package, as benchmarks/frames.py has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import FrameType

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


def test_a_warm_call_of_comfyuis_own_function_stays_short() -> None:
    """Without ComfyUI's wrapper: the hook, its plan, the copy of the call that has the function, and the way to it."""
    pytest.importorskip("torch", reason="torch is not installed")
    from hook_side import Q, exact, model_call, override, sampling, sites, stand_in

    ours = override("comfy")
    options = {sampling.KEY: ours, sampling.OVERRIDE: ours, sampling.RUN_KEY: sampling.Run(ours)}
    frames: list[str] = []

    def noted(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").startswith("attention_backends."):
            frames.append(frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name)

    def body() -> None:
        ours(exact, Q, Q, Q, 2, transformer_options=options, skip_output_reshape=True)
        sites.current_model_call().ordinal = 0
        sys.setprofile(noted)
        try:
            ours(exact, Q, Q, Q, 2, transformer_options=options, skip_output_reshape=True)
        finally:
            sys.setprofile(None)

    model_call(stand_in(["WanModel"], {}), options, body)
    assert len(frames) <= 9, frames
