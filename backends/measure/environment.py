"""Texts of the environment that a result belongs to: measured times, a probe's outcome, a recorded run.

Stored keys contain these texts: rewording them would orphan stored results.
"""

from __future__ import annotations

import os
import platform as python_platform
import re
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ..kernels.registry import MODULES, any_compiled, distributions, environments
from ..values.platform import Platform

COMPILERS = ("triton", "triton-windows")
"""Packages with which torch compiles kernels such as flex_attn."""


def environment_of(platform: Platform) -> str:
    """The environment that measured times depend on."""
    card = f"cpu {python_platform.machine()}, {os.cpu_count()} cores" if platform.kind == "cpu" else ""
    return _key(
        *_head(platform, card),
        "" if platform.cudnn_sdp_enabled else "cuDNN's attention off in torch",
        *environments(MODULES, platform),
        *_packages(platform, (name for name, _ in platform.packages)),
        f"attention-backends {own_version()}",
    )


def probe_key(backend_id: str, platform: Platform) -> str:
    """The key of a probe's outcome: the backend, then the environment."""
    return _key(
        backend_id,
        *_head(platform),
        *_packages(platform, (*distributions((backend_id,)), *COMPILERS)),
        *environments((backend_id,), platform),
        f"attention-backends {own_version()}",
        f"Python {sys.version_info[0]}.{sys.version_info[1]} in {sys.prefix}",
    )


def machine_of(platform: Platform, backends: Iterable[str]) -> dict[str, Any]:
    """Facts of a machine that can change the results of these backends, as plain data."""
    names = set(distributions(backends))
    names.update(COMPILERS if names or any_compiled(backends) else ())
    facts = {
        "kind": platform.kind,
        "card": platform.name,
        "architecture": platform.sm or platform.gfx or "",
        "driver": driver_of(platform),
        "cpu": _instructions() if platform.kind == "cpu" and not platform.described else "",
        "torch": platform.torch,
        "cuda": platform.cuda or "",
        "cudnn": str(platform.cudnn or ""),
        "os": platform.os,
    }
    packages = {name: version for name, version in platform.packages if name in names}
    return {**{name: value for name, value in facts.items() if value}, "packages": packages}


def in_words(platform: Platform) -> str:
    """Device, processor and operating system in one line, for reports."""
    import torch

    card = ", ".join(filter(None, (platform.kind, platform.name, platform.sm or platform.gfx)))
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} in use by torch"
    return ", ".join([card, _processor(), threads, f"{python_platform.system()} {python_platform.machine()}"])


def versions(platform: Platform) -> dict[str, str]:
    """Versions of Python, torch, this pack, the card's libraries and the kernel packages."""
    import torch

    return {
        "python": python_platform.python_version(),
        "torch": torch.__version__,
        "attention-backends": own_version(),
        **({"cuda": platform.cuda} if platform.cuda else {}),
        **({"cudnn": str(platform.cudnn)} if platform.cudnn else {}),
        **dict(platform.packages),
    }


def driver_of(platform: Platform) -> str:
    """The version of a card's graphics driver; empty if unknown."""
    return driver() if platform.kind in ("cuda", "rocm") and not platform.described else ""


@lru_cache(maxsize=1)
def driver() -> str:
    """The version of the graphics driver from its file on Linux, else an empty string."""
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            text = Path(file).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        match = re.search(r"\d+(\.\d+)+", text)
        return match[0] if match else ""
    return ""


@lru_cache(maxsize=1)
def own_version() -> str:
    """Our version, from pyproject.toml in the folder, else from the installed distribution."""
    try:
        text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        text = ""
    stated = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    if stated:
        return stated[1]
    try:
        return metadata.version("attention-backends")
    except metadata.PackageNotFoundError:
        return "unknown"


def _key(*parts: str) -> str:
    return " | ".join(filter(None, parts))


def _head(platform: Platform, card: str = "") -> tuple[str, ...]:
    """Card, driver, and versions of torch, CUDA and cuDNN."""
    return (
        card or " ".join(filter(None, (platform.kind, platform.name, platform.sm or platform.gfx))),
        f"driver {driver_of(platform) or 'unknown'}" if platform.kind in ("cuda", "rocm") else "",
        f"torch {platform.torch}",
        f"CUDA {platform.cuda}" if platform.cuda else "",
        f"cuDNN {platform.cudnn}" if platform.cudnn else "",
    )


def _packages(platform: Platform, names: Iterable[str]) -> list[str]:
    wanted = set(names)
    return sorted(f"{name} {version}" for name, version in platform.packages if name in wanted)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return python_platform.processor() or "unknown processor"
    named = re.search(r"^model name\s*:\s*(.+)$", lines, re.MULTILINE)
    return " ".join(named[1].split()) if named else python_platform.machine()


def _instructions() -> str:
    """The vector instructions that torch uses on this CPU, such as AVX2."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())
