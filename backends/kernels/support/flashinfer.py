"""The package flashinfer-python, of which several kernels are made."""

from __future__ import annotations

from ...values.package import Package
from ...values.platform import Platform
from ...values.versions import meets


def _pip_arguments(platform: Platform, machine: str) -> tuple[str, ...]:
    # It needs nccl4py, which has wheels for Linux only.
    if machine != "linux_x86_64" or not meets(platform.torch, ">=2.6"):
        return ()
    return ("flashinfer-python==0.7.2.post1", f"torch=={platform.torch}")


FLASHINFER = Package(
    "flashinfer-python",
    "flashinfer",
    "0.7.2.post1",
    "https://github.com/flashinfer-ai/flashinfer",
    how="see {page}; it has to fit {tags}",
    note="kernels are compiled at their first call, which takes nvcc (12.9 or newer for sm_120)",
    systems=("linux",),
    arguments=_pip_arguments,
)
