"""What the SageAttention kernels have in common: which release is installed, on which cards, in what state.

Two libraries share the name `sageattention`: 1.0.6 on PyPI is Triton only, 2.x is built from its sources and has
CUDA kernels. Their limits and their defects differ, so the version decides. The algorithm: arXiv:2410.02367.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from .backend import HALF, Limits, package_reason
from .layout import INT32_ELEMENTS
from .platform import Platform

if TYPE_CHECKING:
    from packaging.version import Version

REQUIREMENT = "sageattention>=1.0.6,!=2.0.*,!=2.1.0"
"""2.0.x and 2.1.0 were betas with faults of their own; Diffusers too begins at 2.1.1."""

SECOND_LIMITS = Limits(
    dtypes=HALF,
    max_head_dim=128,
    masks=("none",),
    max_elements=INT32_ELEMENTS,
    padded_head_dims=(64, 128),
    max_batch=65535,
    max_heads=65535,
)
"""2.1.1 and 2.2.0, sageattention/core.py: head sizes are padded to 64 or 128, offsets are 32 bits wide, batch and
heads are grid dimensions."""

SECOND_ONLY = "sageattn_qk_int8_pv_fp16_cuda"
"""A name that 1.x does not have."""


def installed(platform: Platform) -> Version:
    """The installed version of sageattention; 0 where it is missing or unreadable."""
    from packaging.version import InvalidVersion, Version

    try:
        return Version(platform.version("sageattention") or "0")
    except InvalidVersion:
        return Version("0")


def is_second(platform: Platform) -> bool:
    """True for 2.x, false for 1.x."""
    return installed(platform).major >= 2


def is_fork(platform: Platform) -> bool:
    """True for the wheels of https://github.com/woct0rdho/SageAttention, e.g. 2.2.0+cu130torch2.9.0andhigher.post4."""
    return "torch" in (installed(platform).local or "")


def triton_reasons(platform: Platform) -> list[str]:
    """Why Triton, which every sageattention imports, cannot run its kernels on this card.

    sm75 works with Triton 3.0 to 3.2 and fails with 3.3 (https://github.com/thu-ml/SageAttention/issues/197);
    Blackwell needs 3.3, the first that knows it.
    """
    name = "triton" if platform.version("triton") else "triton-windows"
    if platform.version(name) is None:
        return [f"package {'triton-windows' if platform.os == 'win32' else 'triton'} is not installed"]
    need = {"Turing": "<3.3", "Blackwell": ">=3.3"}.get(platform.architecture, "")
    reason = package_reason(name + need, platform)
    return [f"{reason}, which {platform.sm} needs"] if reason else []


def import_second() -> ModuleType:
    """Import sageattention 2.x.

    Raises:
        ImportError: what is imported is another release than its metadata says.
    """
    import sageattention

    module: ModuleType = sageattention
    if not hasattr(module, SECOND_ONLY):
        raise ImportError(f"metadata says sageattention 2.x, but {module.__file__} has no {SECOND_ONLY}")
    return module
