"""`dev.py demo`: the pack at work in a real ComfyUI, or, without one, what the library shows alone.

Three things: a tiny random Wan with a backend per role, the embedded model compared over several backends, and films of
the embedded video model with dense and with sparse attention.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from . import comfyui as comfy
from .console import Progress, Stop, say, table
from .doctor import doctor
from .environment import prepare
from .server import Server, WorkflowError, base_folder, serve

INSIDE = Path(__file__).resolve().parent / "inside"
MODEL = "tiny_wan_random.safetensors"
EMBEDDED = "tiny_shapes_wan_fp16.safetensors"
VIDEO = "tiny_motion_wan_fp16.safetensors"
CAPTION = "a large red circle on the left on white"
BACKENDS = "torch_sdpa, sdpa_math, emulated_int8, sdpa_flash, cudnn_attn, flash_attn, sage_attn"
ACCELERATOR = """
import torch
found = torch.cuda.is_available() or torch.backends.mps.is_available() or (
    hasattr(torch, "xpu") and torch.xpu.is_available())
print("accelerator" if found else "cpu")
"""


def workflow() -> dict[str, Any]:
    """Self-attention on torch_sdpa, cross-attention on sdpa_math: one workflow in ComfyUI's API form."""

    def conditioning(seed: int) -> dict[str, Any]:
        inputs = {"tokens": 77, "width": 4096, "seed": seed, "pooled_width": 0, "hidden_tokens": 0}
        return {"class_type": "AttentionBackendsRandomConditioning", "inputs": inputs}

    def per_role(source: str, role: str, backend: str) -> dict[str, Any]:
        inputs = {"model": [source, 0], "role": role, "backend": backend, "extra": ""}
        return {"class_type": "PerRoleAttentionConfig", "inputs": inputs}

    size = {"width": 128, "height": 128, "length": 9, "batch_size": 1}
    links = {
        "model": ["cross", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["empty", 0],
    }
    euler = {"sampler_name": "euler", "scheduler": "simple", "steps": 4, "seed": 1, "cfg": 3.0, "denoise": 1}
    return {
        "load": {"class_type": "UNETLoader", "inputs": {"unet_name": MODEL, "weight_dtype": "default"}},
        "self": per_role("load", "self", "torch_sdpa"),
        "cross": per_role("self", "cross", "sdpa_math"),
        "positive": conditioning(1),
        "negative": conditioning(2),
        "empty": {"class_type": "EmptyHunyuanLatentVideo", "inputs": size},
        "sample": {"class_type": "KSampler", "inputs": links | euler},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "demo"}},
    }


def comparison() -> dict[str, Any]:
    """The embedded model, one seed, several backends: the graph that Compare Attention Backends is for."""
    links = {
        name: [name, 0] for name in ("noise", "sampler", "sigmas", "latent_image", "model", "positive", "negative")
    }
    options = {"backends": BACKENDS, "mode": "end_to_end", "repeat": 1, "cfg": 4.0}
    size = {"width": 256, "height": 256, "length": 1, "batch_size": 1}
    schedule = {"model": ["model", 0], "scheduler": "simple", "steps": 20, "denoise": 1.0}
    return {
        "model": {"class_type": "UNETLoader", "inputs": {"unet_name": EMBEDDED, "weight_dtype": "default"}},
        "positive": {"class_type": "TinyShapesCaption", "inputs": {"caption": CAPTION}},
        "negative": {"class_type": "TinyShapesCaption", "inputs": {"caption": ""}},
        "latent_image": {"class_type": "EmptyHunyuanLatentVideo", "inputs": size},
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}},
        "sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "sigmas": {"class_type": "BasicScheduler", "inputs": schedule},
        "compare": {"class_type": "AttentionCompare", "inputs": links | options},
        "picture": {"class_type": "SaveImage", "inputs": {"images": ["compare", 1], "filename_prefix": "comparison"}},
        "table": {"class_type": "PreviewAny", "inputs": {"source": ["compare", 2]}},
    }


def demo(root: Path) -> int:
    found = comfy.find(root)
    if found is None:
        return _without_comfyui(root)
    say(f"Using {found}.")
    python = found.python or prepare(root, found.path)
    say(f"Its interpreter: {python}")
    with base_folder(root, [INSIDE / "random_conditioning.py"]) as folder:
        model = folder / "models" / "diffusion_models" / MODEL
        _run_inside(python, str(INSIDE / "tiny_wan.py"), str(model))
        size = model.stat().st_size / 1e6
        say(f"Made a Wan with random weights ({size:.0f} MB): it samples noise, not a picture.")
        say("Starting ComfyUI without a window; this takes some seconds.")
        flags = ["--cpu"] if _run_inside(python, "-c", ACCELERATOR).strip() == "cpu" else []
        with serve(found.path, python, folder, flags) as server:
            if not server.get("/object_info/PerRoleAttentionConfig"):
                raise Stop(f"ComfyUI could not load the pack. The end of its log:\n{server.tail(60)}")
            try:
                seconds, _ = _run(server, workflow())
            except WorkflowError as error:
                raise Stop(f"The demo's workflow did not run: {error}") from None
            report = server.get("/attention_backends/last_run")
            say(f"Sampled in {seconds:.1f} s. What ran:")
            say()
            for run in report["runs"]:
                say(_what_ran(run))
            say("Now the embedded model, with the same seed on each backend.")
            try:
                _, record = _run(server, comparison())
            except WorkflowError as error:
                say(f"Not in this ComfyUI: {error}")
                record = None
        _keep(root / "demo_output", folder / "output", report)
    if record is None:
        return _compare_directly(root) or _make_films(root, python)
    say()
    say(record["outputs"]["table"]["text"][0])
    say(f"The picture: {root / 'demo_output' / record['outputs']['picture']['images'][0]['filename']}")
    return _make_films(root, python)


def _compare_directly(root: Path) -> int:
    """The same comparison without ComfyUI, by the command line, in our own environment."""
    command = [str(prepare(root)), str(root), "compare", "--repeat", "1", "--output", str(root / "demo_output")]
    return subprocess.run(command, env=_patient()).returncode


def _make_films(root: Path, python: Path) -> int:
    """Films of the embedded video model, where its weights are there."""
    if not (root / "demo" / "weights" / VIDEO).is_file():
        say(f"No film: demo/weights/{VIDEO} is not there.")
        return 0
    say("Now two films of the embedded video model, which take a minute or two on a CPU.")
    target = root / "demo_output"
    command = [str(python), str(INSIDE / "with_package.py"), str(INSIDE / "make_films.py"), str(target)]
    result = subprocess.run(command, env=_patient()).returncode
    if result == 0:
        say(f"The films: {target}")
    return result


def _patient() -> dict[str, str]:
    """Threads that wait by spinning slow each other down on a machine that is busy with something else."""
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}


def _run(server: Server, graph: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Queue a workflow and wait with progress; the seconds it took, and what the server recorded."""
    progress = Progress()

    def tick(seconds: float) -> None:
        # The sampler's own progress bar is in the log: "50%|#####     | 2/4 [00:00<00:00".
        steps = re.findall(r"(\d+/\d+) \[", server.tail(1))
        progress.show(f"{'step ' + steps[-1] if steps else 'loading'}, {seconds:.1f} s", seconds)

    start = time.monotonic()
    prompt = server.queue(graph)
    try:
        record = server.wait(prompt, tick=tick)
    finally:
        progress.end()
    return time.monotonic() - start, record


def _what_ran(run: dict[str, Any]) -> str:
    rows = []
    for row in run["rows"]:
        what = [str(row[key]) for key in ("role", "block", "backend", "calls")]
        rows.append([*what, "-" if row["ms"] is None else f"{row['ms']:.2f}", row.get("reason") or ""])
    text = f"{run['model']}, {run['steps']} steps\n"
    text += table(["role", "block", "backend", "calls", "ms", "why not what was asked"], rows) + "\n"
    return text + "".join(f"note: {note}\n" for note in run.get("notes", []))


def _keep(target: Path, output: Path, report: dict[str, Any]) -> None:
    target.mkdir(exist_ok=True)
    for made in (*output.glob("*.latent"), *output.glob("comparison*.png")):
        shutil.copy(made, target)
    (target / "last_run.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    (target / "workflow_api.json").write_text(json.dumps(workflow(), indent=2), encoding="utf-8")
    say(f"Written to {target}: " + ", ".join(sorted(path.name for path in target.iterdir())))


def _without_comfyui(root: Path) -> int:
    say("No ComfyUI was found. Looked in:")
    if not any(found_by == "COMFYUI_PATH" for found_by, _ in comfy.places(root)):
        say("  COMFYUI_PATH: not set")
    for found_by, path in comfy.places(root):
        say(f"  {path} ({found_by})")
    say(comfy.HOW_TO_GET_ONE)
    say()
    say("The library works without it. What this machine has:")
    status = doctor(root, [])
    say()
    return status or _compare_kernels(root) or _compare_directly(root) or _make_films(root, prepare(root))


def _compare_kernels(root: Path) -> int:
    command = [str(prepare(root)), str(INSIDE / "with_package.py"), str(INSIDE / "compare_kernels.py")]
    result = subprocess.run(command).returncode
    say()
    return result


def _run_inside(python: Path, *arguments: str) -> str:
    result = subprocess.run(
        [str(python), *arguments], capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    if result.returncode != 0:
        raise Stop(f"{python} could not run {Path(arguments[0]).name}:\n{result.stderr.strip()}")
    return result.stdout
