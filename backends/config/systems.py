"""The names that other systems publish for attention backends, as data: one table for each system.

Each row is a published name, the id that it means here (or None, where it is refused) and one line: for a refused
name the true reason, for another what is different here and why. `names.py` resolves names by these tables and
`docs/systems.md` is generated from them. A name is compared without regard to case.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from .foreign_options import FOREIGN_OPTIONS


class Published(NamedTuple):
    """One name as its system publishes it."""

    name: str
    means: str | None
    """The id here; None where the name is recognised and refused."""
    line: str = ""
    """Why it is refused, or what differs here; empty where it means the same."""


class System(NamedTuple):
    """One system and its names."""

    id: str
    title: str
    about: str
    """What a person who comes from this system should know before anything else."""
    names: tuple[Published, ...]


_HUB = "the installed package first; the Hub's build only where it is missing and ATTENTION_BACKENDS_HUB=1 allows it"
_SAGE_HUB = (
    "the installed package only, never the Hub's build: which of its kernels runs on which card is not published for "
    "the version that Diffusers pins"
)
_FAMILY = "the FlashAttention family, as there: the best installed member for the card, whatever the number says"
_AITER = "the package amd-aiter, for AMD cards; aiter on PyPI is another package, for asyncio"
_LENGTHS = "one id for both: whether a call needs variable lengths follows from its mask"
_ASCEND = "its kernels exist for Ascend NPUs only, and this pack has no sparse kernel for them"
_INSIDE_SGLANG = "its kernels are a part of SGLang and come in no package of their own; not implemented here"
_FLEX = "it runs PyTorch's FlexAttention over blocks that SGLang chooses; that choice is not implemented here"
_SUBBLOCK = (
    "it runs FlashInfer's block-sparse kernels over blocks that SGLang chooses; that choice is not implemented here"
)
_VSA_H3 = (
    "it runs fastvideo-kernel's kernels as MiniMax H3 needs them; what SGLang does around them is not implemented here"
)
_WINDOW = (
    "it runs FlashAttention's variable-length kernel over windows that SGLang makes for MiniMax H3; that is not "
    "implemented here"
)
_SLA = "Sparse-Linear Attention has weights of its own, so a model must be trained for it; not implemented"
_NOT_BUILT = "not built yet here: calls fall back, counted, or stop with strict"
_ADAPTER = "an adapter of vLLM-Omni newer than 0.30.0, for kernels that nothing here calls; not implemented"
_LISTED = "listed in Smart-Diffusion's schema, but its start-up check stops on it"

VLLM_OMNI = System(
    "vllm_omni",
    "vLLM-Omni 0.30.0",
    "A backend that is named there must run or raises. The same here: `strict: true`; without it a call that the "
    "backend cannot run falls back, counted and with its reason.",
    (
        Published(
            "FLASH_ATTN",
            "flash_attn",
            "only installed packages count, not the kernels that vLLM bundles. On Blackwell version 4 only, as there: "
            "plain flash-attn (version 2) is not taken, flash_attn_2 asks for it. On AMD AITER before flash-attn, as "
            "there. On NPUs vLLM runs mindiesd's kernels; here it falls back",
        ),
        Published("CUDNN_ATTN", "cudnn_attn"),
        Published("FLASHINFER_ATTN", "flashinfer_attn"),
        Published("TORCH_SDPA", "torch_sdpa"),
        Published("SDPA", "torch_sdpa"),
        Published("SAGE_ATTN", "sage_attn"),
        Published("SAGE_ATTN_3", "sage_attn_3"),
        Published("TRTLLM_ATTN", "trtllm_attn", "only where it is named; auto does not take it, as vLLM may on sm_10x"),
        Published(
            "FASTVIDEO_VSA",
            "video_sparse_attn",
            f"vLLM runs dense attention where it does not apply, even if named; {_NOT_BUILT}",
        ),
        Published("FLASH_ATTN_HUB", "flash_attn_2", _HUB),
        Published("FLASH_ATTN_3_HUB", "flash_attn_3", _HUB),
        Published("RAINFUSION_ATTN", None, _ASCEND),
        Published(
            "SPARSE_BLOCK",
            None,
            "it stands in an example of vLLM-Omni's documents, but 0.30 has no such backend; not implemented here",
        ),
        # Newer than 0.30.0
        Published("SPARSE_ATTN", None, "it dispatches to plugins of vLLM-Omni, which cannot be loaded here"),
        Published("SOL_ATTN", "sol_attn", _NOT_BUILT),
        Published("SPARGE", "sparge_attn", _NOT_BUILT),
        Published("SLA_ATTN", None, _SLA),
        Published("MINDIE_SLA", None, _ASCEND),
        Published("aiter_quant", None, f"{_ADAPTER}; aiter is AITER in half precision"),
        Published("vdnh3", None, "for MiniMax-H3, with an adapter's weights of its own; not implemented"),
        Published("VDNH3_ATTN", None, "for MiniMax-H3, with an adapter's weights of its own; not implemented"),
        Published("b12x", None, _ADAPTER),
        Published("flashinfer_sm120", None, f"{_ADAPTER}; flashinfer_attn is FlashInfer's dense attention"),
    ),
)

SGLANG = System(
    "sglang",
    "SGLang diffusion 0.5.23",
    "A missing package sends a named backend to another one there, with a log line at most. Here it is counted with "
    "its reason, and `strict: true` stops instead.",
    (
        Published(
            "fa", "flash_attn", "on compute capability 12.x SGLang runs SDPA; here version 4, where it has kernels"
        ),
        Published("fa2", "flash_attn_2", "plain flash-attn on every card, Blackwell too; fa takes version 4 there"),
        Published("fa3", "flash_attn", _FAMILY),
        Published("fa4", "flash_attn", _FAMILY),
        Published("torch_sdpa", "torch_sdpa"),
        Published("torch_cudnn_sdpa", "cudnn_attn"),
        Published("cudnn_sdpa", "cudnn_attn"),
        Published(
            "dynamic_cudnn_sdpa",
            "cudnn_attn",
            "SGLang gives causal, grouped and some very long calls to FlashAttention; here cuDNN takes every call that "
            "it can run, and the platform's route the rest",
        ),
        Published("sage_attn", "sage_attn"),
        Published("sage_attn_3", "sage_attn_3"),
        Published("sparge_attn", "sparge_attn", _NOT_BUILT),
        Published("sliding_tile_attn", "sliding_tile_attn", _NOT_BUILT),
        Published("video_sparse_attn", "video_sparse_attn", _NOT_BUILT),
        Published("vmoba_attn", "vmoba_attn", _NOT_BUILT),
        Published("sparse_video_gen_2_attn", "sparse_video_gen_2_attn", _NOT_BUILT),
        Published("sol_attn", "sol_attn", _NOT_BUILT),
        Published(
            "aiter",
            "aiter",
            f"{_AITER}. SGLang takes it by itself on AMD, and vLLM runs it there as FLASH_ATTN; "
            "SGLANG_DIFFUSION_AITER_FP8_ATTN is not read: half precision only",
        ),
        Published("aiter_sage", None, "AITER's quantised kernels for AMD cards; not implemented"),
        Published("video_sparse_attn_h3", None, _VSA_H3),
        Published("hybrid_window_attn_h3", None, _WINDOW),
        Published("subblock_sparse_attn", None, _SUBBLOCK),
        Published("cube_sparse_attn", None, _FLEX),
        Published("fp8_fa_sm120", None, f"{_INSIDE_SGLANG}; sage_fp8_cuda and sage_attn_3 are the nearest"),
        Published("sla_attn", None, _SLA),
        Published("sage_sla_attn", None, _SLA),
        Published("laser_attn", None, _ASCEND),
        Published("block_sparse_attn", None, _ASCEND),
        Published("rain_fusion_attn", None, _ASCEND),
        Published("no_attention", None, "it stands for a model without attention; there is no kernel to choose"),
    ),
)

DIFFUSERS = System(
    "diffusers",
    "Diffusers 0.42.1",
    "Its setting belongs to the process and leaks from one model to the next; here it belongs to one model. Names with "
    "`_hub` download only where `ATTENTION_BACKENDS_HUB=1` allows it.",
    (
        Published("native", "torch_sdpa"),
        Published("_native_cudnn", "cudnn_attn"),
        Published("_native_efficient", "sdpa_efficient"),
        Published("_native_flash", "sdpa_flash"),
        Published("_native_math", "sdpa_math"),
        Published(
            "_native_npu",
            "npu_fusion",
            "for Ascend NPUs with torch_npu only, and only where it is named: auto runs SDPA there, as SGLang does; "
            "vLLM runs mindiesd's kernels, which this pack does not call",
        ),
        Published("_native_xla", "xla_flash", "for XLA devices with torch_xla only"),
        Published("flash", "flash_attn_2", "version 2 on Blackwell too; only flash_attn takes version 4 there"),
        Published("flash_hub", "flash_attn_2", _HUB),
        Published("flash_varlen", "flash_attn_2", _LENGTHS),
        Published("flash_varlen_hub", "flash_attn_2", f"{_HUB}; {_LENGTHS}"),
        Published("flash_4_hub", "flash_attn_4", _HUB),
        Published("_flash_3", "flash_attn_3"),
        Published("_flash_varlen_3", "flash_attn_3", _LENGTHS),
        Published("_flash_3_hub", "flash_attn_3", _HUB),
        Published("_flash_3_varlen_hub", "flash_attn_3", f"{_HUB}; {_LENGTHS}"),
        Published("aiter", "aiter", _AITER),
        Published("aiter_fa2_hub", "aiter", f"{_HUB}; {_AITER}"),
        Published("flex", "flex_attn"),
        Published("sage", "sage_attn"),
        Published("sage_hub", "sage_attn", _SAGE_HUB),
        Published("sage_varlen", "sage_attn", _LENGTHS),
        Published("sage_blackwell_hub", "sage_attn_3", _HUB),
        Published("_sage_qk_int8_pv_fp8_cuda", "sage_fp8_cuda"),
        Published("_sage_qk_int8_pv_fp8_cuda_sm90", "sage_fp8_sm90"),
        Published("_sage_qk_int8_pv_fp16_cuda", "sage_fp16_cuda"),
        Published("_sage_qk_int8_pv_fp16_triton", "sage_fp16_triton"),
        Published("xformers", "xformers"),
    ),
)

SMART_DIFFUSION = System(
    "smart_diffusion",
    "Smart-Diffusion (b67588d)",
    "Its choice covers self-attention only; here the default covers every role, so add `per_role.cross` to match it.",
    (
        Published(
            "auto",
            "auto",
            "Smart-Diffusion prefers lossy kernels (sparge, sage, then flash_attn); here auto takes exact ones only, "
            "unless accuracy allows more",
        ),
        Published("flash_attn", "flash_attn"),
        Published("sage", "sage_attn"),
        Published("sparge", "sparge_attn", f"under this name Smart-Diffusion runs FlashAttention 2; {_NOT_BUILT}"),
        Published("spas_sage", "sparge_attn", f"Smart-Diffusion's inner name for sparge; {_NOT_BUILT}"),
        Published("flash_infer", "flashinfer_attn", f"{_LISTED}; here it runs FlashInfer"),
        Published("npu", "npu_fusion", f"{_LISTED}; here it is for Ascend NPUs with torch_npu only"),
        Published("ref", "reference", f"{_LISTED}; here it is the slow double-precision reference"),
        Published("triton", None, f"{_LISTED}, and it does not say which kernel is meant"),
        Published("flash_mla", None, f"{_LISTED}; MLA is the latent attention of language models"),
    ),
)

SYSTEMS: tuple[System, ...] = (VLLM_OMNI, SGLANG, DIFFUSERS, SMART_DIFFUSION)


def key_of(name: str) -> str:
    """The form in which names are compared: lower case, no space around, `_` for `-`."""
    return name.strip().lower().replace("-", "_")


def rows_of(name: str, system: str = "") -> Iterator[tuple[System, Published]]:
    """Every row of a name, those of `system` (its id) first."""
    yield from sorted(_rows().get(key_of(name), ()), key=lambda found: found[0].id != system)


@lru_cache(maxsize=1)
def _rows() -> dict[str, list[tuple[System, Published]]]:
    """Every row by the form in which names are compared."""
    found: dict[str, list[tuple[System, Published]]] = {}
    for one in SYSTEMS:
        for row in one.names:
            found.setdefault(key_of(row.name), []).append((one, row))
    return found


def line_of(name: str, system: str = "") -> str:
    """The line of an accepted name for messages, or an empty text; `system` (its id) is where the name comes from.

    Where its system is not known, the first of them that has something to say about the name says it. A system that
    has the name and nothing to say means the same by it.
    """
    for one, row in rows_of(name, system):
        if row.means is not None and row.line:
            return f"{row.name} ({one.title}) means {row.means} here: {row.line}"
        if one.id == system:
            return ""
    return ""


def systems_page() -> str:
    """The text of docs/systems.md."""
    lines = [
        "# Names of other systems",
        "",
        "<!-- Generated from backends/config/systems.py. A test fails when this page is stale. -->",
        "",
        "A configuration that was written for one of these systems pastes unchanged. Every name that they publish "
        "means the id beside it, or is refused with the reason beside it. A line that says what differs is also "
        "logged when the name is read, and `explain` prints it.",
    ]
    for system in SYSTEMS:
        lines += ["", f"## {system.title}", "", system.about, "", "| name | here | what to know |", "|---|---|---|"]
        lines += [
            f"| `{row.name}` | {f'`{row.means}`' if row.means else 'refused'} | {row.line} |" for row in system.names
        ]
    lines += [
        "",
        "## Roles",
        "",
        "In these systems `joint` is a role of its own, so in a configuration that is read from text, a mapping or the "
        "environment `per_role.self` does not cover joint attention over text and picture (FLUX, SD3, "
        "HunyuanVideo): that takes the default. `joint_is_self: true` makes it cover it, and a `per_role.joint` entry "
        "names another backend. In the nodes, and in an `AttentionConfig` made in Python, `self` covers joint "
        "attention where nothing is said about `joint`. `explain` says so where it matters.",
        "",
        "## Components",
        "",
        "SGLang's component map reaches the diffusion model only: `transformer`, or `transformer_2` for the second "
        "expert of a pipeline such as Wan 2.2 (`component` of the node and of `explain`). `transformer_2` takes what "
        "stands under `transformer` where nothing stands under its own name. Text encoders and autoencoders are named "
        "in a note and left as they are.",
        "",
        "## Options",
        "",
        "Options stand under `extra` and are checked when they are read. Those of a backend that is not built yet are "
        "treated as its name is: calls fall back, counted, and a note says so. These belong to no backend here: beside "
        "one that can run they are understood, and refused as not implemented.",
        "",
        "| option | what it is |",
        "|---|---|",
        *(f"| `{option.name}` | {option.summary} |" for option in FOREIGN_OPTIONS.values()),
    ]
    return "\n".join(lines) + "\n"
