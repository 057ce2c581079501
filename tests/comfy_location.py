"""Where the tests find a ComfyUI.

Tests that need one ask here and skip with the reason when there is none. Nothing is imported from ComfyUI,
so a skip costs nothing.
"""

from __future__ import annotations

import os
from pathlib import Path


def find_comfyui() -> Path | None:
    """The ComfyUI folder to test with, or None (why_no_comfyui() says why).

    `$COMFYUI_PATH` binds: where it is set, no other place is tried. Then the ComfyUI whose `custom_nodes` holds
    this folder, then `~/comfy/ComfyUI`.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        places = [Path(named).expanduser()]
    else:
        places = [Path(__file__).resolve().parents[3], Path("~/comfy/ComfyUI").expanduser()]
    return next((place for place in places if _is_comfyui(place)), None)


def why_no_comfyui() -> str:
    """One line for a skip: what was looked for and how to name a ComfyUI."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        return f"COMFYUI_PATH={named} is no ComfyUI (it lacks comfy/ or nodes.py)"
    return "no ComfyUI around this folder or in ~/comfy/ComfyUI; set COMFYUI_PATH to test with one"


def _is_comfyui(folder: Path) -> bool:
    return (folder / "comfy").is_dir() and (folder / "nodes.py").is_file()
