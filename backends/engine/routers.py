"""The router of each device, for hosts that are not ComfyUI and for the Python API."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from ..config.names import COMFY
from ..kernels import BACKENDS
from ..kernels.comfy import Comfy
from ..kernels.registry import detect
from ..values.platform import Platform
from ..values.reasons import Reason
from .router import Router

if TYPE_CHECKING:
    import torch


class OutsideComfyUI(Comfy):
    """`comfy` is unavailable outside ComfyUI."""

    def unavailable_reasons(self, platform: Platform) -> list[Reason]:
        return [Reason("only_comfyui")]


def router_for(device: torch.device | None = None) -> Router:
    """The router of a device (default: the first accelerator, else the CPU), one per process.

    A new one after a library has switched cuDNN's attention on or off.
    """
    return _router(detect(device))


@lru_cache(maxsize=16)
def _router(platform: Platform) -> Router:
    return Router(platform, {**BACKENDS, COMFY: OutsideComfyUI()})
