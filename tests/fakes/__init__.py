"""Stand-ins for kernel packages: real signatures, real refusals, real defects, arithmetic on the CPU.

They exist only inside a test: `machine` puts them into sys.modules through monkeypatch and describes the machine
that they pretend to be on. What each does was read in the package's sources; what could be run was compared with it
(test_sage_interpreter.py). A file that is named as the module of a backend's package (`Package.module`) is taken by
itself; `_modules` has those of which there are several, or that are more than one module.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from attention_backends.backends.engine.router import Router
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.sparse.executors import OF_PACKAGES
from attention_backends.backends.values.platform import Platform

from . import (
    amd_aiter,
    arithmetic,
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
    flashinfer,
    hub,
    sageattention_1,
    sageattention_2,
    torch_xla,
    xformers,
)

HERE = Path(__file__).parent


def machine(
    monkeypatch: pytest.MonkeyPatch, packages: str = "", capability: tuple[int, int] | None = (8, 9), os: str = "linux"
) -> Router:
    """A router on a CUDA machine with this card and these packages, e.g. `sageattention==2.2.0 triton==3.6.0`.

    The packages can be imported while the test runs, and take tensors on the CPU.
    """
    pairs = tuple(tuple(package.split("==")) for package in packages.split())
    platform = Platform("cuda", capability=capability, torch="2.11.0", cuda="13.0", cudnn=91002, packages=pairs, os=os)
    return on_platform(monkeypatch, platform)


def on_platform(monkeypatch: pytest.MonkeyPatch, platform: Platform) -> Router:
    """A router on any machine, with fakes of the packages that it has."""
    packages = dict(platform.packages)
    for name, module in _modules(packages).items():
        monkeypatch.setitem(sys.modules, name, module)
    as_torch_says = (11, 0) if platform.kind == "rocm" else platform.capability
    for fake in [module for name, module in sys.modules.items() if name.startswith(f"{__name__}.")]:
        if hasattr(fake, "CAPABILITY"):  # it asks which card it is on
            monkeypatch.setattr(fake, "CAPABILITY", as_torch_says)
    monkeypatch.setattr(sageattention_2, "FORK", "torch" in packages.get("sageattention", ""))
    monkeypatch.setattr(sageattention_2, "VERSION", packages.get("sageattention", "2.2.0"))
    monkeypatch.setattr(arithmetic, "CALLS", [])
    return Router(platform)


def _modules(packages: dict[str, str]) -> dict[str, ModuleType]:
    modules: dict[str, ModuleType] = {}
    if "flash-attn-4" in packages:
        # Alone it makes `flash_attn` importable: a bare folder, without flash_attn_func.
        modules["flash_attn"] = ModuleType("flash_attn")
        modules["flash_attn"].__path__ = []  # type: ignore[attr-defined]
        modules["flash_attn.cute"] = modules["flash_attn.cute.block_sparsity"] = flash_attn_4
    if "flash-attn" in packages:
        modules["flash_attn"] = flash_attn_2
    if "flash-attn-3" in packages:
        modules["flash_attn_interface"] = flash_attn_3
    if "flashinfer-python" in packages:
        modules["flashinfer"] = modules["flashinfer.prefill"] = flashinfer
    if "sageattention" in packages:
        modules["sageattention"] = sageattention_1 if packages["sageattention"].startswith("1") else sageattention_2
    if "xformers" in packages:
        modules.update(xformers.modules())
    if "amd-aiter" in packages:
        modules["aiter"] = amd_aiter
    elif "aiter" in packages:
        modules["aiter"] = ModuleType("aiter")  # the one for asyncio
    if "torch-xla" in packages:
        modules.update(torch_xla.modules(packages["torch-xla"]))
    if "kernels" in packages:
        modules["kernels"] = hub
    declared = (*BACKENDS.values(), *(executor.declared for executor in OF_PACKAGES))
    for package in {package for backend in declared for package in backend.packages}:
        if (
            package.distribution in packages
            and package.module not in modules
            and (HERE / f"{package.module}.py").exists()
        ):
            modules[package.module] = import_module(f"{__name__}.{package.module}")
    return modules
