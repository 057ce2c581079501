"""Backends that can be named but are not built into this version: listed, and unavailable for that reason."""

from __future__ import annotations

from ..values.aliases import PEOPLE, SGLANG, SMART_DIFFUSION, VLLM_OMNI, Alias
from ..values.options import Option
from ..values.platform import Platform
from .backend import Backend
from .support import planned_options as sparse_options


class Planned(Backend):
    """A name without a kernel yet. It parses, shows in menus, and says why it cannot run."""

    built = False
    sparse = True
    asks_for = ("spas-sage-attn", "fastvideo-kernel")

    def __init__(
        self, backend_id: str, arithmetic: str, summary: str, options: tuple[Option, ...], aliases: tuple[Alias, ...]
    ) -> None:
        self.id = backend_id  # type: ignore[misc]  # each instance is its own backend
        self.arithmetic = arithmetic  # type: ignore[misc]
        self.summary = summary  # type: ignore[misc]
        self.options = options  # type: ignore[misc]
        self.aliases = aliases  # type: ignore[misc]

    def unavailable_reasons(self, platform: Platform) -> list[str]:
        return ["not built into this version of attention-backends"]


NOT_BUILT = "not built yet here: calls fall back, counted, or stop with strict"

BACKENDS = (
    Planned(
        "sliding_tile_attn",
        "half",
        "Sliding Tile Attention for video.",
        sparse_options.SLIDING_TILE,
        (Alias(SGLANG, "sliding_tile_attn", NOT_BUILT),),
    ),
    Planned(
        "video_sparse_attn",
        "half",
        "Video Sparse Attention.",
        sparse_options.VIDEO_SPARSE,
        (
            Alias(
                VLLM_OMNI,
                "FASTVIDEO_VSA",
                f"vLLM runs dense attention where it does not apply, even if named; {NOT_BUILT}",
            ),
            Alias(SGLANG, "video_sparse_attn", NOT_BUILT),
        ),
    ),
    Planned(
        "vmoba_attn",
        "half",
        "VMoBA block attention for video.",
        sparse_options.VMOBA,
        (Alias(SGLANG, "vmoba_attn", NOT_BUILT),),
    ),
    Planned(
        "sparse_video_gen_2_attn",
        "half",
        "Sparse VideoGen 2.",
        sparse_options.SPARSE_VIDEO_GEN_2,
        (Alias(SGLANG, "sparse_video_gen_2_attn", NOT_BUILT),),
    ),
    Planned(
        "sparge_attn",
        "int8",
        "SpargeAttention: sparse and quantised.",
        sparse_options.SPARGE,
        (
            Alias(VLLM_OMNI, "SPARGE", NOT_BUILT),
            Alias(SGLANG, "sparge_attn", NOT_BUILT),
            Alias(SMART_DIFFUSION, "sparge", f"under this name Smart-Diffusion runs FlashAttention 2; {NOT_BUILT}"),
            Alias(SMART_DIFFUSION, "spas_sage", f"Smart-Diffusion's inner name for sparge; {NOT_BUILT}"),
            Alias(PEOPLE, "sparge_attn_backend"),
        ),
    ),
    Planned(
        "sol_attn",
        "half",
        "SOL sparse attention.",
        sparse_options.SOL,
        (
            Alias(VLLM_OMNI, "SOL_ATTN", NOT_BUILT),
            Alias(SGLANG, "sol_attn", NOT_BUILT),
        ),
    ),
    Planned("radial_attn", "half", "Radial Attention for video.", sparse_options.RADIAL, ()),
)
