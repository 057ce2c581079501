"""A real ComfyUI server for tests: `start_server` starts and stops one with this pack in it.

    with start_server(extra_nodes=[...], flags=["--use-pytorch-cross-attention"]) as server:
        record = server.run(workflow)

It uses the code of `dev.py demo`. The server runs on the CPU in a temporary folder; its own interpreter is
used if the ComfyUI has one, otherwise the one that runs the tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from attention_backends.devtools import comfyui as comfy
from attention_backends.devtools.server import Server, base_folder, serve

ROOT = Path(__file__).resolve().parent.parent
RANDOM_CONDITIONING = ROOT / "devtools" / "inside" / "random_conditioning.py"
# What a person may have set for daily use must not decide a test.
OURS = ("ATTENTION_BACKENDS_CONFIG", "DIFFUSION_ATTENTION_BACKEND", "DIFFUSERS_ATTN_BACKEND")


def comfyui_or_skip() -> comfy.ComfyUI:
    found = comfy.find(ROOT)
    if found is None:
        pytest.skip("no ComfyUI was found")
    return found


@contextmanager
def start_server(
    pack_dir: Path = ROOT,
    extra_nodes: Iterable[Path] = (RANDOM_CONDITIONING,),
    flags: Iterable[str] = (),
    comfyui: comfy.ComfyUI | None = None,
    fill: Callable[[Path, Path], None] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Yields a running Server with `queue`, `wait`, `run`, `history`, `get`, `post`, `log`, `url`, `folder`.

    `fill(python, folder)` may put models into the base folder before the start. `environ` adds variables.
    Skips the test if there is no ComfyUI.
    """
    comfyui = comfyui or comfyui_or_skip()
    python = comfyui.python or Path(sys.executable)
    clean = {name: value for name, value in os.environ.items() if name not in OURS}
    with base_folder(pack_dir, extra_nodes) as folder:
        if fill is not None:
            fill(python, folder)
        with serve(comfyui.path, python, folder, ["--cpu", *flags], {**clean, **(environ or {})}) as server:
            yield server
