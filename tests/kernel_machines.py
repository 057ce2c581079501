"""The machines on which each backend is tested through its fake, and how exact it must be there."""

from __future__ import annotations

from typing import NamedTuple

TRITON = "triton==3.6.0"
OLD_TRITON = "triton==3.2.0"
SAGE_1 = f"sageattention==1.0.6 {TRITON}"
SAGE_2 = f"sageattention==2.2.0 {TRITON}"
SAGE_FORK = f"sageattention==2.2.0+cu130torch2.10.0andhigher.post6 {TRITON}"


class Machine(NamedTuple):
    """A backend on a card with packages. `arithmetic` is a class of tolerance.py."""

    backend: str
    packages: str
    capability: tuple[int, int]
    arithmetic: str = "exact"

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
    Machine("sage_attn", f"sageattention==1.0.6 {OLD_TRITON}", (7, 5), "int8"),
    Machine("sage_attn", SAGE_1, (8, 9), "int8"),
    Machine("sage_attn", f"sageattention==2.1.1 {TRITON}", (8, 9), "fp8"),
    Machine("sage_attn", SAGE_2, (8, 0), "int8"),
    Machine("sage_attn", SAGE_2, (8, 6), "int8"),
    Machine("sage_attn", SAGE_2, (8, 9), "fp8"),
    Machine("sage_attn", SAGE_2, (9, 0), "fp8"),
    Machine("sage_attn", SAGE_2, (12, 0), "fp8"),
    Machine("sage_attn", SAGE_FORK, (8, 6), "int8"),
    Machine("sage_attn", SAGE_FORK, (9, 0), "fp8"),
    Machine("sage_attn", SAGE_FORK, (10, 0), "fp8"),
    Machine("sage_fp16_cuda", f"sageattention==2.1.1 {TRITON}", (8, 0), "int8"),
    Machine("sage_fp16_cuda", SAGE_2, (8, 6), "int8"),
    Machine("sage_fp16_cuda", SAGE_2, (12, 0), "int8"),
    Machine("sage_fp16_cuda", SAGE_FORK, (8, 7), "int8"),
    Machine("sage_fp8_cuda", f"sageattention==2.1.1 {TRITON}", (8, 9), "fp8"),
    Machine("sage_fp8_cuda", SAGE_2, (8, 9), "fp8"),
    Machine("sage_fp8_cuda", SAGE_2, (12, 0), "fp8"),
    Machine("sage_fp8_cuda", SAGE_FORK, (10, 0), "fp8"),
    Machine("sage_fp8_sm90", SAGE_2, (9, 0), "fp8"),
    Machine("sage_fp8_sm90", SAGE_FORK, (9, 0), "fp8"),
    Machine("sage_fp16_triton", f"sageattention==2.1.1 {TRITON}", (8, 9), "int8"),
    Machine("sage_fp16_triton", SAGE_2, (8, 9), "int8"),
    Machine("sage_fp16_triton", SAGE_FORK, (8, 6), "int8"),
    Machine("sage_attn_3", f"sageattn3==1.0.0 {TRITON}", (12, 0), "fp4"),
    Machine("xformers", "xformers==0.0.29", (6, 1)),
    Machine("xformers", "xformers==0.0.35", (7, 5)),
    Machine("xformers", "xformers==0.0.35", (8, 6)),
    Machine("xformers", "xformers==0.0.35", (9, 0)),
    Machine("xformers", "xformers==0.0.35", (12, 0)),
    Machine("comfy_kitchen_int8", "comfy-kitchen==0.2.31", (7, 5), "int8"),
    Machine("comfy_kitchen_int8", "comfy-kitchen==0.2.40", (12, 0), "int8"),
)
