"""Where a ComfyUI is, which version, and which interpreter runs it. Reads files only; changes nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .console import Stop

HOW_TO_GET_ONE = (
    "To get one: `pip install comfy-cli`, then `comfy install` (its default place is found; "
    "name any other by COMFYUI_PATH)."
)


@dataclass(frozen=True)
class ComfyUI:
    path: Path
    found_by: str
    version: str
    python: Path | None
    """Its own interpreter; None where it has none, and `.venv` is to run it."""

    def __str__(self) -> str:
        return f"ComfyUI {self.version} in {self.path} ({self.found_by})"


def find(pack: Path, environ: Mapping[str, str] = os.environ) -> ComfyUI | None:
    """The ComfyUI to work with, or None.

    Raises Stop if COMFYUI_PATH or COMFYUI_PYTHON names something that is not there: what a person asked for
    by name is not replaced by something else.
    """
    for found_by, path in places(pack, environ):
        if is_comfyui(path):
            return ComfyUI(path, found_by, _version(path), own_interpreter(path, environ))
        if found_by == "COMFYUI_PATH":
            raise Stop(f"COMFYUI_PATH is {path}, and there is no ComfyUI in it (no main.py beside comfy/).")
    return None


def places(pack: Path, environ: Mapping[str, str] = os.environ) -> list[tuple[str, Path]]:
    """Where `find` looks, in this order, each with the words for it."""
    named = environ.get("COMFYUI_PATH")
    looked = [("COMFYUI_PATH", Path(named).expanduser().absolute())] if named else []
    if pack.parent.name == "custom_nodes":
        looked.append(("the folder that the pack is installed in", pack.parent.parent))
    looked.append(("the default of comfy-cli", Path.home() / "comfy" / "ComfyUI"))
    return looked


def others_beside(comfyui: ComfyUI, environ: Mapping[str, str] = os.environ) -> list[ComfyUI]:
    """Other versions in folders beside it (`ComfyUI-0.18.1`), for tests that cover more than one."""
    folders = sorted(comfyui.path.parent.glob("ComfyUI-*"))
    return [
        ComfyUI(path, f"beside {comfyui.path.name}", _version(path), own_interpreter(path, environ))
        for path in folders
        if is_comfyui(path) and path != comfyui.path
    ]


def is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def own_interpreter(path: Path, environ: Mapping[str, str] = os.environ) -> Path | None:
    """COMFYUI_PYTHON, a virtual environment in the ComfyUI, or the portable build's python_embeded."""
    named = environ.get("COMFYUI_PYTHON")
    if named:
        python = Path(named).expanduser().absolute()
        if not python.is_file():
            raise Stop(f"COMFYUI_PYTHON is {python}, which is not a file.")
        return python
    candidates = [path / name / inside for name in (".venv", "venv") for inside in ("bin/python", "Scripts/python.exe")]
    candidates.append(path.parent / "python_embeded" / "python.exe")
    return next((python for python in candidates if python.is_file()), None)


def _version(path: Path) -> str:
    try:
        text = (path / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return "of unknown version"
    match = re.search(r'__version__\s*=\s*"([^"]+)"', text)
    return match.group(1) if match else "of unknown version"
