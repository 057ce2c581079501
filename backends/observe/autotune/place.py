"""Where measured choices are kept, and the text of what they depend on beside the call."""

from __future__ import annotations

import os
import platform as python_platform
from pathlib import Path

from ...kernels.registry import MODULES, environments
from ...measure import remembered
from ...values.platform import Platform

VARIABLE = "ATTENTION_BACKENDS_AUTOTUNE"
"""Names another file than the usual one."""
OLD_VARIABLE = "ATTENTION_BACKENDS_MEASURED"
"""Its older name; `VARIABLE` wins where both are set."""
FILE = "measured.sqlite3"


def environment_of(platform: Platform) -> str:
    """What measured times depend on beside the call, readable: machine, driver, versions of torch and of kernels."""
    card = " ".join(filter(None, (platform.kind, platform.name, platform.sm or platform.gfx)))
    if platform.kind == "cpu":
        card = f"cpu {python_platform.machine()}, {os.cpu_count()} cores"
    parts = (
        card,
        f"driver {remembered.driver() or 'unknown'}" if platform.kind in ("cuda", "rocm") else "",
        f"torch {platform.torch}",
        f"CUDA {platform.cuda}" if platform.cuda else "",
        f"cuDNN {platform.cudnn}" if platform.cudnn else "",
        "" if platform.cudnn_sdp_enabled else "cuDNN's attention off in torch",
        *environments(MODULES, platform),
        *sorted(f"{name} {version}" for name, version in platform.packages),
        f"attention-backends {remembered.own_version()}",
    )
    return " | ".join(filter(None, parts))


def default_path() -> Path:
    """The file of programs other than ComfyUI: as the variables say, else in the user's cache folder."""
    return _given() or remembered.path().with_name(FILE)


def path_in(user_directory: str | Path) -> Path:
    """The file in ComfyUI's user directory, unless a variable names another."""
    return _given() or Path(user_directory) / "attention_backends" / FILE


def _given() -> Path | None:
    """The file that one of the variables names; None where neither is set."""
    given = os.environ.get(VARIABLE, "").strip() or os.environ.get(OLD_VARIABLE, "").strip()
    return Path(os.path.expanduser(given)) if given else None  # a home that is not there stays as it is written
