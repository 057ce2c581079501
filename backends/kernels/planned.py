"""Backends that can be named but are not built into this version: listed, and unavailable for that reason."""

from __future__ import annotations

from ..values.options import Option
from ..values.platform import Platform
from . import planned_options as sparse_options
from .backend import Backend


class Planned(Backend):
    """A name without a kernel yet. It parses, shows in menus, and says why it cannot run."""

    sparse = True

    def __init__(self, backend_id: str, arithmetic: str, summary: str, options: tuple[Option, ...] = ()) -> None:
        self.id = backend_id  # type: ignore[misc]  # each instance is its own backend
        self.arithmetic = arithmetic  # type: ignore[misc]
        self.summary = summary  # type: ignore[misc]
        self.options = options  # type: ignore[misc]

    def unavailable_reasons(self, platform: Platform) -> list[str]:
        return ["not built into this version of attention-backends"]


BACKENDS = (
    Planned("sliding_tile_attn", "half", "Sliding Tile Attention for video.", sparse_options.SLIDING_TILE),
    Planned("video_sparse_attn", "half", "Video Sparse Attention.", sparse_options.VIDEO_SPARSE),
    Planned("vmoba_attn", "half", "VMoBA block attention for video.", sparse_options.VMOBA),
    Planned("sparse_video_gen_2_attn", "half", "Sparse VideoGen 2.", sparse_options.SPARSE_VIDEO_GEN_2),
    Planned("sparge_attn", "int8", "SpargeAttention: sparse and quantised.", sparse_options.SPARGE),
    Planned("sol_attn", "half", "SOL sparse attention.", sparse_options.SOL),
    Planned("radial_attn", "half", "Radial Attention for video.", sparse_options.RADIAL),
)
