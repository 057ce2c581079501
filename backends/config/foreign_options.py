"""Options of other systems that belong to no backend here: recognised, checked, and refused with the reason.

vLLM-Omni 0.30 writes them beside `backend`, Smart-Diffusion's documents under `attn_config`. A backend that declares
an option of the same name takes it, and then nothing here is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..values.options import Option, problems

_SKIP_SOFTMAX = Option(
    "skip_softmax",
    dict,
    None,
    "vLLM-Omni's Skip-Softmax for TRTLLM_ATTN",
    fields=(
        Option("target_sparsity", float, None, "Share of the softmax to skip.", minimum=0, maximum=1, also=(None,)),
        Option("threshold", float, None, "Threshold below which a block is skipped.", minimum=0, also=(None,)),
        Option("disabled_until_timestep", float, None, "Normalised timestep.", minimum=0, maximum=1, also=(None,)),
    ),
)
_QUANT = Option(
    "quant",
    dict,
    None,
    "vLLM-Omni's quantisation for TRTLLM_ATTN, since 0.32 for FLASHINFER_ATTN too",
    fields=(
        Option("dtype_qk", str, None, "Type of queries and keys.", also=(None,)),
        Option("dtype_vo", str, None, "Type of values and output.", also=(None,)),
        Option("q_block_size", int, None, "Queries that share a factor.", choices=(1, 4, 16), also=(None,)),
        Option("k_block_size", int, None, "Keys that share a factor.", minimum=1, also=(None,)),
        Option("flashinfer_backend", str, None, "FlashInfer's name of the kernel.", also=(None,)),
    ),
)
_BLOCK_SPARSE = Option(
    "block_sparse",
    dict,
    None,
    "vLLM-Omni's block sparsity for RAINFUSION_ATTN on Ascend NPUs",
    fields=(
        Option("sparsity", float, 0.8, "Share of blocks left out.", minimum=0, maximum=1),
        Option("start_step", int, None, "First sparse step.", minimum=0, also=(None,)),
        Option("end_step", int, None, "Last sparse step.", minimum=0, also=(None,)),
        Option("precision", str, None, "Arithmetic.", choices=("bf16", "fp8", "mix"), also=(None,)),
        Option("skip_layers", str, None, "Dense layers, such as 0-3,38.", also=(None,)),
    ),
)
_TOPK = Option("fastvideo_vsa_topk", int, 64, "vLLM-Omni's number of tiles kept by FASTVIDEO_VSA", minimum=1)

_PROVIDER = Option(
    "fastvideo_vsa_provider", str, "auto", "vLLM-Omni 0.32's package for FASTVIDEO_VSA",
    choices=("auto", "fastvideo", "flashinfer"),
)  # fmt: skip
_PRECISION = Option(
    "fastvideo_vsa_precision", str, "bf16", "vLLM-Omni 0.32's arithmetic of FASTVIDEO_VSA", choices=("bf16", "sage")
)

BESIDE_BACKEND: tuple[str, ...] = (
    *("skip_softmax", "quant", "block_sparse", "fastvideo_vsa_topk", "fastvideo_vsa_provider"),
    "fastvideo_vsa_precision",
)
"""Names that vLLM-Omni 0.30, and 0.32, writes beside `backend`; read as if they stood under `extra`."""

FOREIGN_OPTIONS: Mapping[str, Option] = MappingProxyType(
    {
        option.name: option
        for option in (
            _SKIP_SOFTMAX,
            _QUANT,
            _BLOCK_SPARSE,
            _TOPK,
            _PROVIDER,
            _PRECISION,
            Option("quant_bits", int, 8, "Smart-Diffusion's documents name it, its code does not", choices=(4, 8)),
            Option("quant_symmetric", bool, True, "Smart-Diffusion's documents name it, its code does not"),
            Option(
                "sparsity_ratio", float, 0.5, "Smart-Diffusion's documents name it, its code does not",
                minimum=0, maximum=1,
            ),
            Option(
                "block_size", int, 64, "Smart-Diffusion's and vLLM-Omni's documents name it, their code does not",
                minimum=1,
            ),
        )
    }
)  # fmt: skip
"""By name; the summary says where it comes from, as part of the message that refuses it."""


def foreign_problems(given: Mapping[str, object]) -> list[str]:
    """What there is to say against each of these options: a wrong value, or that it is not implemented."""
    wrong = problems(tuple(FOREIGN_OPTIONS.values()), given)
    return wrong or [f"{name}: understood, but not implemented ({FOREIGN_OPTIONS[name].summary})" for name in given]
