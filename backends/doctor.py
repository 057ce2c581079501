"""The state of every backend on this machine as rows: available or why not, version, file, how to get it.

Live on purpose: asking loads each kernel's package, and whatever it raises is a row. Printing is the command
line's business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .backend import Backend
from .install import Advice, Interpreter, how_to_get
from .names import COMFY
from .packages import PACKAGES_OF
from .platform import Platform, detect, installed_packages
from .router import Router

NO_TORCH = "run this with the interpreter that runs ComfyUI: this one has no torch that can be imported"


@dataclass(frozen=True)
class Row:
    """One backend. `reasons` is empty when it is available; `advice` says how to get it when it is not."""

    id: str
    accuracy: str
    reasons: tuple[str, ...]
    version: str | None
    """Name and version of the package that computes, e.g. `flash-attn 2.8.3`; None when it is not installed."""
    file: str | None
    advice: Advice | None

    @property
    def available(self) -> bool:
        return not self.reasons

    def as_dict(self) -> dict[str, object]:
        """The row as plain data. `install` is a command, or where to look, or why nothing would help."""
        return {
            "id": self.id,
            "accuracy": self.accuracy,
            "available": self.available,
            "reasons": list(self.reasons),
            "version": self.version,
            "file": self.file,
            "install": self.advice.text if self.advice else None,
            "note": (self.advice.note or None) if self.advice else None,
        }


def this_machine() -> tuple[Platform, str | None]:
    """The running machine, and why torch cannot be used there if it cannot."""
    try:
        return detect(), None
    except Exception as error:  # a missing or damaged torch is the finding, not a crash
        return Platform("cpu", packages=installed_packages()), f"torch: {type(error).__name__}: {error}"


def why_no_card(platform: Platform) -> str | None:
    """Why torch sees only the CPU here, which no kernel package can change; None where it sees more."""
    if platform.kind != "cpu" or platform.os == "darwin":
        return None
    import torch

    built_for = torch.version.cuda or torch.version.hip
    if built_for is None:
        return "this torch is built for the CPU alone; a graphics card needs the torch that ComfyUI's guide names"
    return f"this torch is built for {'CUDA' if torch.version.cuda else 'ROCm'} {built_for} but finds no card"


def examine(
    router: Router, interpreter: Interpreter, ids: Iterable[str] = (), without_torch: str | None = None
) -> list[Row]:
    """A row for each backend of `ids`, or for all of them.

    Args:
        without_torch: why torch cannot be imported; then nothing is available and nothing is asked.
    """
    rows = []
    for backend_id in tuple(ids) or tuple(router.backends):
        backend = router.backends[backend_id]
        if without_torch is None:
            reasons, advice = _ask(router, backend_id, interpreter)
        else:
            reasons, advice = (without_torch,), Advice("nothing", NO_TORCH)
        version, module = _made_of(backend, router.platform)
        rows.append(Row(backend_id, backend.accuracy, reasons, version, module and file_of(module), advice))
    return rows


def _ask(router: Router, backend_id: str, interpreter: Interpreter) -> tuple[tuple[str, ...], Advice | None]:
    try:
        reasons = router.unavailable(backend_id)
        if not reasons:
            return (), None
        return reasons, how_to_get(router.backends[backend_id], router.platform, interpreter)
    except Exception as error:  # a check that itself fails is a row too
        return (f"asking failed: {type(error).__name__}: {error}",), None


def _made_of(backend: Backend, platform: Platform) -> tuple[str | None, str | None]:
    """The installed package that computes, with its version, and the module to look for."""
    for package in PACKAGES_OF.get(backend.id, ()):
        version = platform.version(package.distribution)
        if version is not None:
            return f"{package.distribution} {version}", package.module
    if backend.id == COMFY or backend.id in PACKAGES_OF:
        return None, None
    return (f"torch {platform.torch}" if platform.torch else None), "torch"


def file_of(module: str) -> str | None:
    """The file that importing `module` would read, found without importing anything; None when there is none."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest and spec.origin:
        return spec.origin
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *rest)
        for candidate in (path / "__init__.py", path.with_suffix(".py"), path):
            if candidate.exists():
                return str(candidate)
    return None
