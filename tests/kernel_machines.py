"""The machines on which each backend is tested: with fakes of its packages and of CUDA's operators, or for real.

A new backend is tested on every machine here that its declarations say it runs on (`places`). One that none fits, as
its package is on none of them, fails test_declared_numerics.py until a machine with its fake (fakes/) is added here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from attention_backends.backends.config.names import COMFY
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.backend import Backend
from attention_backends.backends.kernels.planned import Planned
from attention_backends.backends.values.platform import Platform

CARD = Platform("cuda", capability=(8, 9), torch="2.12.0", cuda="13.0", cudnn=91002, os="linux")

TRITON = "triton==3.6.0"
OLD_TRITON = "triton==3.2.0"
SAGE_1 = f"sageattention==1.0.6 {TRITON}"
SAGE_2 = f"sageattention==2.2.0 {TRITON}"
SAGE_FORK = f"sageattention==2.2.0+cu130torch2.10.0andhigher.post6 {TRITON}"


class Machine(NamedTuple):
    """A backend on a card with packages."""

    backend: str
    packages: str
    capability: tuple[int, int]

    @property
    def platform(self) -> Platform:
        pairs = tuple(tuple(package.split("==")) for package in self.packages.split())
        return replace(CARD, capability=self.capability, packages=pairs)

    @property
    def arithmetic(self) -> str:
        """What it declares to compute in there."""
        return BACKENDS[self.backend].arithmetic_on(self.platform)

    def __str__(self) -> str:
        packages = " ".join(part for part in self.packages.split() if not part.startswith("triton"))
        return f"{self.backend} on {self.capability[0]}.{self.capability[1]} with {packages}"


MACHINES = (
    Machine("flash_attn_2", "flash-attn==2.8.3", (8, 0)),
    Machine("flash_attn_2", "flash-attn==2.8.3", (12, 0)),
    Machine("flash_attn_3", "flash-attn-3==3.0.0", (9, 0)),
    Machine("flash_attn_4", "flash-attn-4==4.0.0b36", (8, 9)),
    Machine("flash_attn_4", "flash-attn-4==4.0.0b36", (9, 0)),
    Machine("flash_attn_4", "flash-attn-4==4.0.0b36", (10, 0)),
    Machine("flash_attn_4", "flash-attn-4==4.0.0b36", (12, 0)),
    Machine("flash_attn", "flash-attn==2.8.3", (8, 6)),
    Machine("flash_attn", "flash-attn==2.8.3 flash-attn-3==3.0.0 flash-attn-4==4.0.0b36", (9, 0)),
    Machine("flash_attn", "flash-attn==2.8.3 flash-attn-4==4.0.0b36", (10, 3)),
    Machine("flashinfer_attn", "flashinfer-python==0.7.2.post1", (7, 5)),
    Machine("flashinfer_attn", "flashinfer-python==0.7.2.post1", (12, 0)),
    Machine("trtllm_attn", "flashinfer-python==0.7.2.post1 flashinfer-cubin==0.6.13", (10, 0)),
    Machine("trtllm_attn", "flashinfer-python==0.6.0 flashinfer-cubin==0.6.0", (10, 3)),
    Machine("sage_attn", f"sageattention==1.0.6 {OLD_TRITON}", (7, 5)),
    Machine("sage_attn", SAGE_1, (8, 9)),
    Machine("sage_attn", f"sageattention==2.1.1 {TRITON}", (8, 9)),
    Machine("sage_attn", SAGE_2, (8, 0)),
    Machine("sage_attn", SAGE_2, (8, 6)),
    Machine("sage_attn", SAGE_2, (8, 9)),
    Machine("sage_attn", SAGE_2, (9, 0)),
    Machine("sage_attn", SAGE_2, (12, 0)),
    Machine("sage_attn", SAGE_FORK, (8, 6)),
    Machine("sage_attn", SAGE_FORK, (9, 0)),
    Machine("sage_attn", SAGE_FORK, (10, 0)),
    Machine("sage_fp16_cuda", f"sageattention==2.1.1 {TRITON}", (8, 0)),
    Machine("sage_fp16_cuda", SAGE_2, (8, 6)),
    Machine("sage_fp16_cuda", SAGE_2, (12, 0)),
    Machine("sage_fp16_cuda", SAGE_FORK, (8, 7)),
    Machine("sage_fp8_cuda", f"sageattention==2.1.1 {TRITON}", (8, 9)),
    Machine("sage_fp8_cuda", SAGE_2, (8, 9)),
    Machine("sage_fp8_cuda", SAGE_2, (12, 0)),
    Machine("sage_fp8_cuda", SAGE_FORK, (10, 0)),
    Machine("sage_fp8_sm90", SAGE_2, (9, 0)),
    Machine("sage_fp8_sm90", SAGE_FORK, (9, 0)),
    Machine("sage_fp16_triton", f"sageattention==2.1.1 {TRITON}", (8, 9)),
    Machine("sage_fp16_triton", SAGE_2, (8, 9)),
    Machine("sage_fp16_triton", SAGE_FORK, (8, 6)),
    Machine("sage_attn_3", f"sageattn3==1.0.0 {TRITON}", (12, 0)),
    Machine("xformers", "xformers==0.0.29", (6, 1)),
    Machine("xformers", "xformers==0.0.35", (7, 5)),
    Machine("xformers", "xformers==0.0.35", (8, 6)),
    Machine("xformers", "xformers==0.0.35", (9, 0)),
    Machine("xformers", "xformers==0.0.35", (12, 0)),
    Machine("comfy_kitchen_int8", "comfy-kitchen==0.2.31", (7, 5)),
    Machine("comfy_kitchen_int8", "comfy-kitchen==0.2.40", (12, 0)),
)


def _with(platform: Platform, *packages: tuple[str, str]) -> Platform:
    return replace(platform, packages=packages, os="linux")


ROCM = Platform("rocm", gfx="gfx942", torch="2.11.0")
OTHERS = (
    _with(Platform("cpu", torch="2.13.0")),
    _with(CARD),
    _with(CARD, ("triton", "3.6.0")),
    _with(ROCM, ("flash-attn", "2.8.3")),
    _with(ROCM, ("amd-aiter", "0.1.7"), ("flash-attn", "2.8.3")),
    _with(replace(ROCM, gfx="gfx1100"), ("comfy-kitchen", "0.2.40")),
    _with(Platform("xpu", torch="2.11.0")),
    _with(Platform("mps", torch="2.11.0")),
    _with(Platform("npu", torch="2.13.0"), ("torch-npu", "2.13.0")),
    _with(Platform("xla", torch="2.9.0"), ("torch-xla", "2.9.0")),
    _with(Platform("xla", torch="2.2.0"), ("torch-xla", "2.2.0")),
)
"""Machines for every kind of device, beside the cards of `MACHINES`."""


def places(backend: Backend) -> Iterator[Platform]:
    """The machines that it is tested on: its own of `MACHINES`, and one of each other kind that fits it."""
    own = [machine.platform for machine in MACHINES if machine.backend == backend.id]
    yield from dict.fromkeys(own)
    kinds = {platform.kind for platform in own}
    for platform in OTHERS:
        is_older = platform.kind == "xla" and platform.kind in kinds  # two versions with different functions
        if (platform.kind not in kinds or is_older) and not backend.unavailable_reasons(
            replace(platform, described=True)  # whatever this very machine lacks
        ):
            kinds.add(platform.kind)
            yield platform


def running_on(kind: str) -> list[str]:
    """The backends that compute on a kind of device by themselves; `comfy` hands each call to ComfyUI.

    Without `flex_attn`, which is compiled for each kind of call: test_flex_attn.py, with -m compile.
    """
    return [
        name
        for name, backend in BACKENDS.items()
        if kind in backend.kinds and not isinstance(backend, Planned) and name not in (COMFY, "flex_attn")
    ]
