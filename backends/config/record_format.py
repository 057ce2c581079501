"""What a record of a run is known by, and how it names a request and a machine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..kernels.registry import any_compiled, distributions
from ..measure.remembered import COMPILERS, driver
from ..values.request import AttentionRequest

if TYPE_CHECKING:
    from ..values.platform import Platform

MARK = "attention_backends_record"
"""The entry by which a mapping is known as a record; its value is the format."""
FORMAT = 1


def machine_of(platform: Platform, backends: Iterable[str]) -> dict[str, Any]:
    """What of a machine can change the numbers that these backends compute."""
    names = set(distributions(backends))
    names.update(COMPILERS if names or any_compiled(backends) else ())
    facts = {
        "kind": platform.kind,
        "card": platform.name,
        "architecture": platform.sm or platform.gfx or "",
        "driver": driver() if platform.kind in ("cuda", "rocm") and not platform.described else "",
        "cpu": _instructions() if platform.kind == "cpu" and not platform.described else "",
        "torch": platform.torch,
        "cuda": platform.cuda or "",
        "cudnn": str(platform.cudnn or ""),
        "os": platform.os,
    }
    packages = {name: version for name, version in platform.packages if name in names}
    return {**{name: value for name, value in facts.items() if value}, "packages": packages}


def _instructions() -> str:
    """The vector instructions that torch computes with on this CPU, such as AVX2."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def normal(request: AttentionRequest) -> AttentionRequest:
    """The request with `num_kv_heads` and `v_head_dim` filled in where they are 0."""
    return request._replace(
        num_kv_heads=request.num_kv_heads or request.num_heads, v_head_dim=request.v_head_dim or request.head_dim
    )
