"""Backends that can be named but are not built into this version: listed, and unavailable for that reason."""

from __future__ import annotations

from ..backend import Backend
from ..options import Option
from ..platform import Platform


class Planned(Backend):
    """A name without a kernel yet. It parses, shows in menus, and says why it cannot run."""

    def __init__(self, backend_id: str, accuracy: str, summary: str, options: tuple[Option, ...] = ()) -> None:
        self.id = backend_id  # type: ignore[misc]  # each instance is its own backend
        self.accuracy = accuracy  # type: ignore[misc]
        self.summary = summary  # type: ignore[misc]
        self.options = options  # type: ignore[misc]

    def unavailable_reasons(self, platform: Platform) -> list[str]:
        return ["not built into this version of attention-backends"]


PLANNED = (
    Planned("sage_fp16_cuda", "quantized", "SageAttention 2 with INT8 scores and FP16 values, CUDA kernel."),
    Planned("sage_fp8_cuda", "quantized", "SageAttention 2 with INT8 scores and FP8 values."),
    Planned("sage_fp8_sm90", "quantized", "SageAttention 2 with INT8 scores and FP8 values, Hopper kernel."),
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
)
