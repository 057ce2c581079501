"""The packages behind backends: where each comes from, and what pip is told where a command is known to be safe.

Data. What becomes of it on one machine is in `doctor/install.py`. Versions and declared needs were read from each
package's metadata in November 2026.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..values.platform import Platform
from ..values.versions import meets


@dataclass(frozen=True)
class Package:
    """A package that backends are made of. `version` is the one that `arguments` and the notes are about."""

    distribution: str
    module: str
    version: str
    page: str
    how: str = "take a wheel for {tags} from {page}, then: {pip} --no-deps WHEEL"
    """What to do where `arguments` gives no command; may use {page}, {tags}, {pip} and {torch}."""
    note: str = ""
    systems: tuple[str, ...] = ("linux", "win32")
    arguments: Callable[[Platform, str], tuple[str, ...]] = lambda platform, machine: ()
    """What follows `pip install` on a platform whose wheels are tagged so; empty where no command is known to work."""


def _sage_1(platform: Platform, machine: str) -> tuple[str, ...]:
    # Pure Python over Triton, without declared needs. On Windows version 2 has wheels and is the better choice.
    on_linux = platform.os == "linux" and platform.version("triton") is not None
    return ("--no-deps", "sageattention==1.0.6") if on_linux else ()


def _xformers(platform: Platform, machine: str) -> tuple[str, ...]:
    # PyPI's wheels are built with CUDA 12.8; up to 0.0.34 each declares one exact torch.
    if not (platform.cuda or "").startswith("12.") or machine not in ("linux_x86_64", "win_amd64"):
        return ()
    declared = (("==2.8.0", "0.0.32.post2"), ("==2.9.1", "0.0.33.post2"), (">=2.10", "0.0.35"))
    fitting = [version for torch, version in declared if meets(platform.torch, torch)]
    return ("--no-deps", f"xformers=={fitting[0]}") if fitting else ()


def _flashinfer(platform: Platform, machine: str) -> tuple[str, ...]:
    # It needs nccl4py, which has wheels for Linux only.
    if machine != "linux_x86_64" or not meets(platform.torch, ">=2.6"):
        return ()
    return ("flashinfer-python==0.7.2.post1", f"torch=={platform.torch}")


def _flash_4(platform: Platform, machine: str) -> tuple[str, ...]:
    if machine != "linux_x86_64" or not meets(platform.torch, ">=2.6"):
        return ()
    extra = "[cu13]" if (platform.cuda or "").startswith("13.") else ""
    return (f"flash-attn-4{extra}==4.0.0b36", f"torch=={platform.torch}")


def _aiter(platform: Platform, machine: str) -> tuple[str, ...]:
    return ("amd-aiter==0.1.7.post2.dev18",) if platform.os == "linux" else ()


FLASH_ATTENTION = "https://github.com/Dao-AILab/flash-attention"
SAGE = "https://github.com/thu-ml/SageAttention"

FLASH_2 = Package(
    "flash-attn",
    "flash_attn",
    "2.8.3",
    f"{FLASH_ATTENTION}/releases",
    note="PyPI has only its sources: building them takes nvcc (hipcc on AMD) and up to hours, and fails on Windows",
)
FLASH_3 = Package(
    "flash-attn-3",
    "flash_attn_interface",
    "3.0.0",
    f"{FLASH_ATTENTION}/tree/main/hopper",
    how="build it from {page}, with nvcc of the CUDA that torch has, for {tags}",
    systems=("linux",),
)
FLASH_4 = Package(
    "flash-attn-4",
    "flash_attn.cute",
    "4.0.0b36",
    f"{FLASH_ATTENTION}/tree/main/flash_attn/cute",
    how="see {page}; it has to fit {tags}",
    note="a pre-release; pip keeps torch {torch} or stops",
    systems=("linux",),
    arguments=_flash_4,
)
FLASHINFER = Package(
    "flashinfer-python",
    "flashinfer",
    "0.7.2.post1",
    "https://github.com/flashinfer-ai/flashinfer",
    how="see {page}; it has to fit {tags}",
    note="kernels are compiled at their first call, which takes nvcc (12.9 or newer for sm_120)",
    systems=("linux",),
    arguments=_flashinfer,
)
SAGE_1 = Package(
    "sageattention",
    "sageattention",
    "1.0.6",
    SAGE,
    note=f"version 1, in Triton; version 2 is faster and is built from {SAGE} with nvcc",
    systems=("linux",),
    arguments=_sage_1,
)
SAGE_2 = Package(
    "sageattention",
    "sageattention",
    "2.2.0",
    SAGE,
    how="build version 2 from {page} for {tags}, then: {pip} --no-deps WHEEL",
    note="building it takes nvcc: 12.0, for sm_90 12.3, for sm_89 12.4, for sm_120 12.8",
    systems=("linux",),
)
SAGE_2_WINDOWS = Package(
    "sageattention",
    "sageattention",
    "2.2.0+cu130torch2.10.0andhigher.post6",
    "https://github.com/woct0rdho/SageAttention/releases",
    note="of CUDA only the first number counts, and a wheel named 'torch2.10.0andhigher' fits every later torch; "
    "wheels before post5 take head_dim to 128",
    systems=("win32",),
)
SAGE_3 = Package(
    "sageattn3",
    "sageattn3",
    "1.0.0",
    f"{SAGE}/tree/main/sageattention3_blackwell",
    how="build it from {page}, with nvcc 12.8 or newer, for {tags}",
)
XFORMERS = Package(
    "xformers",
    "xformers",
    "0.0.35",
    "https://github.com/facebookresearch/xformers",
    how="see {page} for the wheel whose declared torch is yours; the tags are {tags}; then: {pip} --no-deps WHEEL",
    arguments=_xformers,
)
COMFY_KITCHEN = Package(
    "comfy-kitchen",
    "comfy_kitchen",
    "0.2.40",
    "https://github.com/Comfy-Org/comfy-kitchen",
    how="ComfyUI's requirements.txt names the version that fits it: {pip} --no-deps comfy-kitchen==THAT_VERSION",
)
AITER = Package(
    "amd-aiter",
    "aiter",
    "0.1.7.post2.dev18",
    "https://github.com/ROCm/aiter",
    how="see {page}; it has to fit {tags}",
    note="kernels are compiled with hipcc at their first call; PyPI's 'aiter' is an unrelated package",
    systems=("linux",),
    arguments=_aiter,
)
TORCH_NPU = Package(
    "torch-npu",
    "torch_npu",
    "2.13.0",
    "https://gitcode.com/ascend/pytorch",
    how="take the release made for torch {torch} from {page}; its tags are {tags}",
    systems=("linux",),
)
TORCH_XLA = Package(
    "torch-xla",
    "torch_xla",
    "2.9.0",
    "https://github.com/pytorch/xla",
    how="take the release made for torch {torch} from {page}; its tags are {tags}",
    systems=("linux",),
)

PACKAGES_OF: Mapping[str, tuple[Package, ...]] = MappingProxyType(
    {
        "flash_attn": (FLASH_2, FLASH_3, FLASH_4, AITER),
        "flash_attn_2": (FLASH_2,),
        "flash_attn_3": (FLASH_3,),
        "flash_attn_4": (FLASH_4,),
        "flashinfer_attn": (FLASHINFER,),
        "trtllm_attn": (FLASHINFER,),
        "sage_attn": (SAGE_1, SAGE_2, SAGE_2_WINDOWS),
        "sage_fp16_cuda": (SAGE_2, SAGE_2_WINDOWS),
        "sage_fp16_triton": (SAGE_2, SAGE_2_WINDOWS),
        "sage_fp8_cuda": (SAGE_2, SAGE_2_WINDOWS),
        "sage_fp8_sm90": (SAGE_2, SAGE_2_WINDOWS),
        "sage_attn_3": (SAGE_3,),
        "xformers": (XFORMERS,),
        "comfy_kitchen_int8": (COMFY_KITCHEN,),
        "aiter": (AITER,),
        "npu_fusion": (TORCH_NPU,),
        "xla_flash": (TORCH_XLA,),
    }
)
"""The packages that can make a backend available, best first; a backend without an entry is part of torch or of us."""
