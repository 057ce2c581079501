"""The machine and the versions that a measurement belongs to, in words; and waiting for a device.

Boundary: torch and the standard library; read-only.
"""

from __future__ import annotations

import os
import platform as python_platform
import re
from pathlib import Path
from typing import Any

import torch

from ..backends.measure.environment import own_version
from ..backends.values.platform import Platform


def describe(platform: Platform) -> str:
    """Device, processor and operating system in one line."""
    card = ", ".join(filter(None, (platform.kind, platform.name, platform.sm or platform.gfx)))
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} in use by torch"
    system = f"{python_platform.system()} {python_platform.machine()}"
    return ", ".join([card, _processor(), threads, system])


def versions(platform: Platform) -> dict[str, str]:
    """Version of each thing that computes: Python, torch, this pack, the card's libraries, the kernel packages."""
    found = {
        "python": python_platform.python_version(),
        "torch": torch.__version__,
        "attention-backends": own_version(),
    }
    found |= {"cuda": platform.cuda} if platform.cuda else {}
    found |= {"cudnn": str(platform.cudnn)} if platform.cudnn else {}
    return found | dict(platform.packages)


def module_of(device: torch.device) -> Any:
    """torch's module of a device, such as torch.cuda; None for the CPU, whose calls return when they are done."""
    return None if device.type == "cpu" else getattr(torch, device.type, None)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return python_platform.processor() or "unknown processor"
    named = re.search(r"^model name\s*:\s*(.+)$", lines, re.MULTILINE)
    return " ".join(named[1].split()) if named else python_platform.machine()
