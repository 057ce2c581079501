"""`comfy`: what ComfyUI would have run by itself for this call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..backend import FLOATING, Backend, Kernel, Limits
from ..platform import KINDS, Platform
from ..request import AttentionCall

if TYPE_CHECKING:
    import torch


class Comfy(Backend):
    """Exists only inside ComfyUI, which hands over its own function with each call.

    Its accuracy is that of ComfyUI's start-up flags and of the checkpoint's own preference.
    """

    id = "comfy"
    summary = "Whatever ComfyUI would run by itself, its start-up flags and the checkpoint's preference included."
    kinds = KINDS
    # A causal call is a mask that was read as such; the host has the mask itself.
    limits = Limits(dtypes=(*FLOATING, "float8_e4m3fn", "float8_e5m2"), causal_cross=True, mixed_head_dims=True)

    def load(self, platform: Platform) -> Kernel:
        return run_host


def run_host(call: AttentionCall) -> torch.Tensor:
    """Run the host's own attention.

    Raises:
        RuntimeError: the call did not come from ComfyUI.
    """
    if call.host is None:
        raise RuntimeError("the backend 'comfy' runs only inside ComfyUI; this call came from elsewhere")
    return call.host(call)
