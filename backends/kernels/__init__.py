"""The ordered list of backends: one file each, and one line here.

A new kernel is added in these two places, and its id in `config/names.py`; docs/adding_a_kernel.md has the rest.
"""

from __future__ import annotations

from collections.abc import Iterable

from .aiter import Aiter
from .backend import Backend
from .comfy import Comfy
from .comfy_kitchen_int8 import ComfyKitchenInt8
from .cudnn_attn import CudnnAttn
from .emulated_int8 import EmulatedInt8
from .flash_attn import flash_attn
from .flash_attn_2 import FlashAttn2
from .flash_attn_3 import FlashAttn3
from .flash_attn_4 import FlashAttn4
from .flashinfer_attn import FlashInferAttn
from .flex_attn import FlexAttn
from .npu_fusion import NpuFusion
from .planned import PLANNED
from .reference import Reference
from .sage_attn import SageAttn
from .sage_attn_3 import SageAttn3
from .sage_fp8_cuda import SageFP8Cuda
from .sage_fp8_sm90 import SageFP8SM90
from .sage_fp16_cuda import SageFP16Cuda
from .sage_fp16_triton import SageFP16Triton
from .sdpa_efficient import SDPAEfficient
from .sdpa_flash import SDPAFlash
from .sdpa_math import SDPAMath
from .torch_sdpa import TorchSDPA
from .trtllm_attn import TRTLLMAttn
from .xformers import Xformers
from .xla_flash import XlaFlash

_flash_2, _flash_3, _flash_4, _aiter = FlashAttn2(), FlashAttn3(), FlashAttn4(), Aiter()

BACKENDS: dict[str, Backend] = {
    backend.id: backend
    for backend in (
        TorchSDPA(),
        CudnnAttn(),
        flash_attn(_flash_2, _flash_3, _flash_4, _aiter),
        _flash_2,
        _flash_3,
        _flash_4,
        FlashInferAttn(),
        SageAttn(),
        SageFP16Cuda(),
        SageFP16Triton(),
        SageFP8Cuda(),
        SageFP8SM90(),
        SageAttn3(),
        ComfyKitchenInt8(),
        Xformers(),
        FlexAttn(),
        SDPAFlash(),
        SDPAEfficient(),
        SDPAMath(),
        _aiter,
        NpuFusion(),
        XlaFlash(),
        Comfy(),
        EmulatedInt8(),
        Reference(),
        TRTLLMAttn(),
        *PLANNED,
    )
}


def distributions(ids: Iterable[str]) -> list[str]:
    """The distributions of the packages behind these backends, each once; an id that is none here has none."""
    backends = (BACKENDS[one] for one in ids if one in BACKENDS)
    return list(dict.fromkeys(package.distribution for backend in backends for package in backend.packages))
