"""Backends that can be named but are not built into this version: listed, and unavailable for that reason."""

from __future__ import annotations

from ..backend import Backend
from ..platform import Platform


class Planned(Backend):
    """A name without a kernel yet. It parses, shows in menus, and says why it cannot run."""

    def __init__(self, backend_id: str, accuracy: str, summary: str) -> None:
        self.id = backend_id  # type: ignore[misc]  # each instance is its own backend
        self.accuracy = accuracy  # type: ignore[misc]
        self.summary = summary  # type: ignore[misc]

    def unavailable_reasons(self, platform: Platform) -> list[str]:
        return ["not built into this version of attention-backends"]


PLANNED = (
    Planned("flash_attn", "exact", "FlashAttention, the best installed version for the card."),
    Planned("flash_attn_2", "exact", "FlashAttention 2, from the package flash-attn."),
    Planned("flash_attn_3", "exact", "FlashAttention 3, for Hopper cards."),
    Planned("flash_attn_4", "exact", "FlashAttention 4, from the package flash-attn-4."),
    Planned("flashinfer_attn", "exact", "FlashInfer's dense prefill kernels."),
    Planned("sage_attn", "quantized", "SageAttention, the best kernel of the installed version for the card."),
    Planned("sage_fp16_cuda", "quantized", "SageAttention 2 with INT8 scores and FP16 values, CUDA kernel."),
    Planned("sage_fp16_triton", "quantized", "SageAttention 2 with INT8 scores and FP16 values, Triton kernel."),
    Planned("sage_fp8_cuda", "quantized", "SageAttention 2 with INT8 scores and FP8 values."),
    Planned("sage_fp8_sm90", "quantized", "SageAttention 2 with INT8 scores and FP8 values, Hopper kernel."),
    Planned("sage_attn_3", "quantized", "SageAttention 3 in FP4, for Blackwell cards."),
    Planned("comfy_kitchen_int8", "quantized", "ComfyUI's own INT8 attention."),
    Planned("xformers", "exact", "xformers' memory-efficient attention."),
    Planned("flex_attn", "exact", "PyTorch's FlexAttention, compiled."),
    Planned("aiter", "exact", "AMD's AITER kernels, for ROCm."),
    Planned("npu_fusion", "exact", "Fused attention on Ascend NPUs."),
    Planned("xla_flash", "exact", "Flash attention on XLA devices."),
    Planned("sliding_tile_attn", "sparse", "Sliding Tile Attention for video."),
    Planned("video_sparse_attn", "sparse", "Video Sparse Attention."),
    Planned("vmoba_attn", "sparse", "VMoBA block attention for video."),
    Planned("sparse_video_gen_2_attn", "sparse", "Sparse VideoGen 2."),
    Planned("sparge_attn", "sparse", "SpargeAttention: sparse and quantised."),
    Planned("sol_attn", "sparse", "SOL sparse attention."),
    Planned("radial_attn", "sparse", "Radial Attention for video."),
    Planned("emulated_int8", "quantized", "What INT8 quantisation does to a picture, emulated on any machine."),
)
