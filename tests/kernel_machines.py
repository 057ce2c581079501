"""The machines on which each backend is tested: with fakes of its packages and of CUDA's operators, or for real.

A backend is tested on the machines that its file names (`Backend.tested_on`), with the fakes of fakes/, and on one of
each other kind that it runs on (`places`). One that runs on a kind of which there is none fails
test_declared_numerics.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from attention_backends.backends.config.names import COMFY
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.backend import Backend
from attention_backends.backends.values.platform import Platform, parse_platform

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


def machine_of(text: str) -> Platform:
    """A machine as `Backend.tested_on` describes it, of which the test makes a real one by fakes."""
    described = parse_platform(text)
    torch = CARD.torch if described.kind == "cuda" and "torch=" not in text else described.torch
    return replace(described, torch=torch, described=False)


def _cards() -> Iterator[Machine]:
    for backend in BACKENDS.values():
        for platform in map(machine_of, backend.tested_on):
            if platform.capability is not None and backend.packages:
                packages = " ".join(f"{name}=={version}" for name, version in platform.packages)
                yield Machine(backend.id, packages, platform.capability)


MACHINES = tuple(_cards())
"""Every card on which a backend with a package is tested."""

OTHERS = (
    Platform("cpu", torch="2.13.0", os="linux"),
    CARD,
    Platform("rocm", gfx="gfx942", torch="2.11.0", os="linux"),
    Platform("xpu", torch="2.11.0", os="linux"),
    Platform("mps", torch="2.11.0", os="linux"),
    Platform("npu", torch="2.13.0", os="linux"),
    Platform("xla", torch="2.9.0", os="linux"),
)
"""A machine of each kind, without packages."""


def places(backend: Backend) -> Iterator[Platform]:
    """The machines that it is tested on: those that it declares, and one of each other kind that fits it."""
    own = dict.fromkeys(map(machine_of, backend.tested_on))
    yield from own
    kinds = {platform.kind for platform in own}
    for platform in OTHERS:
        described = replace(platform, described=True)  # whatever this very machine lacks
        if platform.kind not in kinds and not backend.unavailable_reasons(described):
            kinds.add(platform.kind)
            yield platform


def running_on(kind: str) -> list[str]:
    """The dense backends that compute on a kind of device by themselves; `comfy` hands each call to ComfyUI.

    Without what is compiled for each kind of call: test_flex_attn.py, with -m compile. Sparse methods compute their own
    maps: test_sparse_methods.py.
    """
    return [
        name
        for name, backend in BACKENDS.items()
        if kind in backend.kinds and name != COMFY
        if not backend.compiled and not backend.sparse
    ]
