"""Options of other systems, where a backend does not have them: recognised, and refused with who takes them here.

vLLM-Omni 0.30 writes them beside `backend`, Smart-Diffusion under `attn_config`. An option of the same name that a
backend declares has precedence. Values are not checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from ..kernels import BACKENDS

_SUBBLOCK = "SGLang, for its block-sparse backends"
_UNREAD = "Smart-Diffusion, whose documents name it and whose code does not"

BESIDE_BACKEND: tuple[str, ...] = (
    *("skip_softmax", "quant", "block_sparse", "fastvideo_vsa_topk", "fastvideo_vsa_provider"),
    "fastvideo_vsa_precision",
)
"""Names that vLLM-Omni 0.30 and 0.32 write beside `backend`; read like entries of `extra`."""

FOREIGN_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "skip_softmax": "vLLM-Omni, Skip-Softmax for TRTLLM_ATTN",
        "quant": "vLLM-Omni, quantisation for TRTLLM_ATTN, since 0.32 for FLASHINFER_ATTN too",
        "block_sparse": "vLLM-Omni, block sparsity for RAINFUSION_ATTN on Ascend NPUs",
        "fastvideo_vsa_topk": "vLLM-Omni, number of tiles kept by FASTVIDEO_VSA",
        "fastvideo_vsa_provider": "vLLM-Omni 0.32, package for FASTVIDEO_VSA",
        "fastvideo_vsa_precision": "vLLM-Omni 0.32, arithmetic of FASTVIDEO_VSA",
        **dict.fromkeys(
            ("compute_mode", "skip_first_steps", "skip_first_layers", "n_k", "n_q", "min_seq_len"), _SUBBLOCK
        ),
        **dict.fromkeys(("quant_bits", "quant_symmetric"), _UNREAD),
        "sparsity_ratio": _UNREAD,
        "block_size": "Smart-Diffusion and vLLM-Omni, whose documents name it and whose code does not",
    }
)
"""Name -> its system and its meaning there."""


def taken_by(name: str) -> list[str]:
    """The backends that have an option of this name."""
    return [backend.id for backend in BACKENDS.values() if any(option.name == name for option in backend.options)]


def foreign_problems(given: Iterable[str]) -> list[str]:
    """The reason against each of these options, for a backend that is implemented."""
    found = []
    for name in given:
        takes = taken_by(name)
        here = f"here one of {', '.join(takes)}: name that backend too" if takes else "not implemented here"
        found.append(f"{name} is an option of {FOREIGN_OPTIONS[name]}; {here}")
    return found
