"""The ordered list of backends: one file each, and one line here. A new kernel is added in these two places."""

from __future__ import annotations

from ..backend import Backend
from .comfy import Comfy
from .cudnn_attn import CudnnAttn
from .planned import PLANNED
from .reference import Reference
from .sdpa_efficient import SDPAEfficient
from .sdpa_flash import SDPAFlash
from .sdpa_math import SDPAMath
from .torch_sdpa import TorchSDPA

BACKENDS: dict[str, Backend] = {
    backend.id: backend
    for backend in (
        TorchSDPA(),
        CudnnAttn(),
        SDPAFlash(),
        SDPAEfficient(),
        SDPAMath(),
        Comfy(),
        Reference(),
        *PLANNED,
    )
}
