"""The ordered list of backends: one file each, and one line here. A new kernel is added in these two places."""

from __future__ import annotations

from ..backend import Backend
from .comfy import Comfy
from .cudnn_attn import CudnnAttn
from .emulated_int8 import EmulatedInt8
from .flash_attn import flash_attn
from .flash_attn_2 import FlashAttn2
from .flash_attn_3 import FlashAttn3
from .flash_attn_4 import FlashAttn4
from .flashinfer_attn import FlashInferAttn
from .planned import PLANNED
from .reference import Reference
from .sage_attn import SageAttn
from .sage_attn_3 import SageAttn3
from .sage_fp16_triton import SageFP16Triton
from .sdpa_efficient import SDPAEfficient
from .sdpa_flash import SDPAFlash
from .sdpa_math import SDPAMath
from .torch_sdpa import TorchSDPA

_flash_2, _flash_3, _flash_4 = FlashAttn2(), FlashAttn3(), FlashAttn4()

BACKENDS: dict[str, Backend] = {
    backend.id: backend
    for backend in (
        TorchSDPA(),
        CudnnAttn(),
        flash_attn(_flash_2, _flash_3, _flash_4),
        _flash_2,
        _flash_3,
        _flash_4,
        FlashInferAttn(),
        SageAttn(),
        SageFP16Triton(),
        SageAttn3(),
        SDPAFlash(),
        SDPAEfficient(),
        SDPAMath(),
        Comfy(),
        EmulatedInt8(),
        Reference(),
        *PLANNED,
    )
}
