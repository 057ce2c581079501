"""Backends that can be named but are not built into this version: listed, and unavailable for that reason.

Their options are as their systems publish them, recognised and type-checked. From SGLang diffusion 0.5.23 (its
documents and the readers in its attention backends). When a backend is implemented, its options move from here into its
file.
"""

from __future__ import annotations

from ..values.aliases import (
    COMFYUI,
    SGLANG,
    VLLM_OMNI,
    Alias,
)
from ..values.options import Option
from ..values.platform import Platform
from ..values.reasons import Reason
from .backend import Backend

SOL = (
    Option("tau", float, 1.0, "Threshold."),
    Option("thresh_type", str, "diag", "What the threshold is compared with."),
    Option("kv_splits", int, "auto", "Parts of the keys.", minimum=1, also=("auto", None)),
    Option("sink_tokens", int, 0, "Tokens that are always kept.", minimum=0),
    Option("sink_start", int, 0, "Where they begin.", minimum=0, also=(None,)),
    Option("dense_steps", int, 10, "Dense steps at the beginning.", minimum=0),
    Option("dense_layers", str, "0,1", "Dense layers, such as 0-3,38.", also=(int, None)),
    Option("dense_backend", str, "fa", "What runs them.", choices=("fa", "sage_attn")),
)


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

    def unavailable_reasons(self, platform: Platform) -> list[Reason]:
        return [Reason("not_built")]


NOT_BUILT = "not built yet here: calls fall back, counted, or stop with strict"

BACKENDS = (
    Planned(
        "sol_attn",
        "half",
        "SOL sparse attention.",
        SOL,
        (
            Alias(VLLM_OMNI, "SOL_ATTN", NOT_BUILT),
            Alias(SGLANG, "sol_attn", NOT_BUILT),
            Alias(COMFYUI, "sol-attn", f"a method of newer ComfyUI's node Model Sparse Attention; {NOT_BUILT}"),
        ),
    ),
)
