"""Stand-ins for kernel packages: real signatures, real refusals, real defects, arithmetic on the CPU.

They exist only inside a test: `machine` puts them into sys.modules through monkeypatch and describes the machine
that they pretend to be on. What each does was read in the package's sources; what could be run was compared with it
(test_sage_interpreter.py).
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from attention_backends.backends.platform import Platform
from attention_backends.backends.router import Router

from . import (
    arithmetic,
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
    flashinfer,
    sageattention_1,
    sageattention_2,
    sageattn3,
)

CARD = (flash_attn_3, flash_attn_4, sageattention_2, sageattn3)
"""Fakes that ask which card they are on."""


def machine(
    monkeypatch: pytest.MonkeyPatch, packages: str = "", capability: tuple[int, int] | None = (8, 9), os: str = "linux"
) -> Router:
    """A router on a CUDA machine with this card and these packages, e.g. `sageattention==2.2.0 triton==3.6.0`.

    The packages can be imported while the test runs, and take tensors on the CPU.
    """
    pairs = tuple(tuple(package.split("==")) for package in packages.split())
    for name, module in _modules(dict(pairs)).items():
        monkeypatch.setitem(sys.modules, name, module)
    for fake in CARD:
        monkeypatch.setattr(fake, "CAPABILITY", capability)
    monkeypatch.setattr(sageattention_2, "FORK", "torch" in dict(pairs).get("sageattention", ""))
    monkeypatch.setattr(arithmetic, "CALLS", [])
    return Router(
        Platform("cuda", capability=capability, torch="2.11.0", cuda="13.0", cudnn=91002, packages=pairs, os=os)
    )


def _modules(packages: dict[str, str]) -> dict[str, ModuleType]:
    modules: dict[str, ModuleType] = {}
    if "flash-attn-4" in packages:
        # Alone it makes `flash_attn` importable: a bare folder, without flash_attn_func.
        modules["flash_attn"] = ModuleType("flash_attn")
        modules["flash_attn"].__path__ = []  # type: ignore[attr-defined]
        modules["flash_attn.cute"] = flash_attn_4
    if "flash-attn" in packages:
        modules["flash_attn"] = flash_attn_2
    if "flash-attn-3" in packages:
        modules["flash_attn_interface"] = flash_attn_3
    if "flashinfer-python" in packages:
        modules["flashinfer"] = flashinfer
    if "sageattention" in packages:
        modules["sageattention"] = sageattention_1 if packages["sageattention"].startswith("1") else sageattention_2
    if "sageattn3" in packages:
        modules["sageattn3"] = sageattn3
    return modules
