"""The environment that tests and benchmarks run in: `.venv` beside dev.py, with pinned needs.

A torch that the running interpreter has is used unchanged; otherwise the pinned one is installed, and before
everything else, because packages that depend on torch would pull another build. Nothing is installed
anywhere but in `.venv`. A second preparation with the same pins costs only the reading of a stamp.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from .console import Stop, say

TORCH = "torch==2.13.0"
# ComfyUI imports both at start, but they must not install another torch.
TORCH_COMPANIONS = ("torch", "torchvision", "torchaudio")
FAKE_OPERATORS = """

# Written by dev.py: this wheel's library does not load beside a CPU torch, and ComfyUI imports torchvision at
# start. The schemas let it be imported; the operators themselves stay absent.
import torch as _torch
_operators = _torch.library.Library("torchvision", "DEF")
_operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

PACKAGE = "attention_backends"
STAND_IN = """# Written by dev.py: the folder below is the package, whatever it is called.
__path__ = [{folder!r}]
__file__ = __path__[0] + "/__init__.py"
with open(__file__, encoding="utf-8") as source:
    exec(compile(source.read(), __file__, "exec"))
"""


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def prepare(root: Path, comfyui: Path | None = None) -> Path:
    """Returns the interpreter of `.venv`, with our needs and, if a ComfyUI is given, also with its own.

    Raises Stop where a virtual environment cannot be made or an installation fails.
    """
    venv = root / ".venv"
    if venv.is_symlink():
        raise Stop(f"{venv} is a link to {venv.resolve()}, which dev.py would change: remove the link")
    python = python_of(venv)
    stamp = venv / "prepared.json"
    needs = [root / "requirements.txt", root / "requirements-dev.txt"]
    wanted = {"ours": _digest(venv, *needs)}
    if comfyui is not None:
        wanted["comfyui"] = _digest(venv, comfyui / "requirements.txt")

    done = _read_stamp(stamp) if python.exists() else {}
    if wanted.items() <= done.items():
        offer_package(root, python)
        return python
    if not python.exists():
        _create(venv)
    if done.get("ours") != wanted["ours"]:
        done = {}
        torch = version_in(python, "torch")
        if torch is None:
            _install(python, TORCH)
        else:
            say(f"Using torch {torch}, which is there already")
        _install(python, *(part for path in needs for part in ("-r", str(path))))
        stamp.write_text(json.dumps(done := {"ours": wanted["ours"]}), encoding="utf-8")
    if comfyui is not None and done.get("comfyui") != wanted["comfyui"]:
        _install_for_comfyui(venv, comfyui / "requirements.txt")
        stamp.write_text(json.dumps(wanted), encoding="utf-8")
    offer_package(root, python)
    return python


def offer_package(root: Path, python: Path) -> None:
    """Make `import attention_backends` and `python -m attention_backends` mean this folder in `.venv`.

    A package of one line whose path is the folder: an editable install would need setuptools and leave files here.
    """
    place = _output_of(python, "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    package = Path(place, PACKAGE, "__init__.py")
    text = STAND_IN.format(folder=str(root))
    if not package.exists() or package.read_text(encoding="utf-8") != text:
        package.parent.mkdir(exist_ok=True)
        package.write_text(text, encoding="utf-8")


def version_in(python: Path, package: str) -> str | None:
    """The installed version of a package in another interpreter, without importing the package."""
    code = (
        "import importlib.metadata as m, importlib.util as u\n"
        f"print(m.version({package!r}) if u.find_spec({package!r}) else '')"
    )
    result = _output_of(python, code)
    return result.stdout.strip() or None


def _digest(venv: Path, *files: Path) -> str:
    # The folder is part of it: a .venv that was copied elsewhere is gone through once more.
    parts = [TORCH, str(venv), *(path.read_text(encoding="utf-8") for path in files)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read_stamp(stamp: Path) -> dict[str, str]:
    try:
        content = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _create(venv: Path) -> None:
    if importlib.util.find_spec("venv") is None:
        raise Stop(
            f"{sys.executable} has no venv module (an embedded Python): run dev.py with a full "
            "Python 3.10 or newer for this (on Windows: py dev.py ...)."
        )
    if importlib.util.find_spec("ensurepip") is None:
        package = f"python3.{sys.version_info.minor}-venv"
        raise Stop(f"python3-venv is missing: run `sudo apt install {package}` and start again.")
    say(f"Making {venv}")
    made = subprocess.run([sys.executable, "-m", "venv", str(venv)])
    if made.returncode != 0:
        raise Stop(f"Python could not make {venv}: see the message above.")
    if importlib.util.find_spec("torch") is not None:
        _share_packages(venv)


def _share_packages(venv: Path) -> None:
    """Makes the packages of the running interpreter visible in the new environment.

    `venv --system-site-packages` shows those of the base interpreter only, which misses a torch that lies in
    a virtual environment; a .pth file with the same folders works for both.
    """
    folders = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    place = _output_of(python_of(venv), "import sysconfig; print(sysconfig.get_path('purelib'))")
    shared = Path(place.stdout.strip(), "outer_interpreter.pth")
    shared.write_text("\n".join(folders) + "\n")  # in the locale's encoding, as Python reads it


def _install(python: Path, *what: str) -> None:
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    say("Installing " + " ".join(Path(part).name if os.sep in part else part for part in what))
    # Python compiles what is imported; pip would compile everything.
    lazily = [] if sys.dont_write_bytecode else ["--no-compile"]
    pip = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *lazily]
    if subprocess.run([*pip, *quiet, *what]).returncode != 0:
        raise Stop("pip could not install that: see its message above. Nothing outside .venv was changed.")


def _install_for_comfyui(venv: Path, requirements: Path) -> None:
    """Installs a ComfyUI's requirements around the torch that is there."""
    python = python_of(venv)
    torch = version_in(python, "torch")
    assert torch is not None, "torch is installed before ComfyUI's requirements"  # noqa: S101
    missing = [
        f"{name}=={release}"
        for name, release in zip(("torchvision", "torchaudio"), companions_of(torch), strict=True)
        if version_in(python, name) is None
    ]
    if missing:
        _install(python, "--no-deps", *missing)
    with tempfile.TemporaryDirectory() as folder:
        rest = Path(folder, "comfyui-requirements.txt")
        rest.write_text(without_torch(requirements.read_text(encoding="utf-8")), encoding="utf-8")
        keep = Path(folder, "keep-torch.txt")
        keep.write_text(f"torch=={torch}\n", encoding="utf-8")
        _install(python, "-r", str(rest), "-c", str(keep))
    _make_importable(venv)


def companions_of(torch: str) -> tuple[str, str]:
    """The torchvision and torchaudio for a torch release: 2.13.0 goes with 0.28.0 and 2.11.0, its last."""
    match = re.match(r"2\.(\d+)\.(\d+)", torch)
    if match is None:
        raise Stop(f"No torchvision is known for torch {torch}: install one beside it and start again.")
    minor, patch = int(match.group(1)), int(match.group(2))
    return f"0.{minor + 15}.{patch}", f"2.{minor}.{patch}" if minor <= 11 else "2.11.0"


def without_torch(requirements: str) -> str:
    def name(line: str) -> str:
        return re.split(r"[\s\[<>=~!;@]", line.strip(), maxsplit=1)[0].lower()

    return "\n".join(line for line in requirements.splitlines() if name(line) not in TORCH_COMPANIONS) + "\n"


def _make_importable(venv: Path) -> None:
    """Mends torchvision and torchaudio in `.venv` where their libraries do not load beside a CPU torch.

    PyPI's Linux wheels of both are linked to CUDA. ComfyUI needs only their Python part on a CPU.
    """
    python = python_of(venv)
    for name in ("torchvision", "torchaudio"):
        failed = _output_of(python, f"import {name}")
        if failed.returncode == 0:
            continue
        where = "import importlib.util as u; print(u.find_spec({!r}).submodule_search_locations[0])"
        folder = Path(_output_of(python, where.format(name)).stdout.strip())
        if not folder.is_relative_to(venv):
            raise Stop(f"{name} in {folder} cannot be imported; mend it there:\n{failed.stderr.strip()}")
        if name == "torchvision" and "torchvision::nms" in failed.stderr:
            with (folder / "extension.py").open("a", encoding="utf-8") as file:
                file.write(FAKE_OPERATORS)
        elif name == "torchaudio":
            for library in folder.glob("lib/*.so"):
                library.unlink()
        again = _output_of(python, f"import {name}")
        if again.returncode != 0:
            raise Stop(f"{name} cannot be imported in {venv}:\n{again.stderr.strip()}")
        say(f"{name}: its compiled part does not fit this torch and was left out (in .venv only)")


def _output_of(python: Path, code: str) -> subprocess.CompletedProcess[str]:
    # -I: the working folder may hold modules called like ComfyUI's or torch's.
    return subprocess.run(
        [str(python), "-I", "-c", code], capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
