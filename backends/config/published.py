"""The systems whose names of backends are understood here, with the names that are refused.

A row has the published name, its id here (None: refused), and a line: the reason for the refusal, or the difference.
Accepted names are declared by the backend (`values/aliases.py`) and joined in `systems.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from ..values.aliases import (
    COMFYUI,
    DIFFUSERS,
    FASTVIDEO,
    KJNODES,
    LISTED,
    SGLANG,
    SMART_DIFFUSION,
    VLLM_OMNI,
    WAN_WRAPPER,
    XFUSER,
    YUNCHANG,
)


class Published(NamedTuple):
    """One published name."""

    name: str
    means: str | None
    """The id here; None: the name is refused."""
    line: str = ""
    """Reason of the refusal, or difference; empty: the same."""
    options: tuple[tuple[str, object], ...] = ()
    """Options that the name includes."""


class System(NamedTuple):
    """One system and its names."""

    id: str
    title: str
    about: str
    """Introduction for users of this system."""
    names: tuple[Published, ...]
    entry: str = ""
    """The configuration's entry that has this system's name of the default backend, and so says the system."""
    newest: str = ""
    """The newest release with names that are listed here, where that is later than the title's."""


_ASCEND = "its kernels exist for Ascend NPUs only, and this pack has no sparse kernel for them"
_INSIDE_SGLANG = "its kernels are a part of SGLang and come in no package of their own; not implemented here"
_VSA_H3 = (
    "it runs fastvideo-kernel's kernels as MiniMax H3 needs them; what SGLang does around them is not implemented here"
)
_WINDOW = (
    "it runs FlashAttention's variable-length kernel over windows that SGLang makes for MiniMax H3; that is not "
    "implemented here"
)
_SLA = "Sparse-Linear Attention adds weights, so a model must be trained for it; not implemented"
_NO_ATTENTION = "it means a model without attention; there is no kernel to choose"
_CORE_SPARSE = (
    "a method of newer ComfyUI's node Model Sparse Attention, with comfy-kitchen's kernels; use that node, no backend "
    "here is the same"
)
_CORE_START = "a start-up choice of ComfyUI's; start it with {flag} and choose comfy"
_MHA_V4 = "AITER's mha_v4 with {operands}, on gfx942 and gfx950; not called here. aiter is AITER in half precision"
_MHA_V4_SPARGE = f"{_MHA_V4}, over blocks that xfuser chooses"
_AITER_SAGE = "AITER's quantised kernels for AMD cards; not implemented. aiter is AITER in half precision"
_BLOCKS = "over blocks that xfuser chooses; that choice is not implemented here"
_ADAPTER = "an adapter of vLLM-Omni newer than 0.30.0, for kernels that nothing here calls; not implemented"
_AITER_OPERANDS = {
    "BF16FP8": "FP8 values",
    "I8FP8": "INT8 scores and FP8 values",
    "FP8": "FP8 operands",
    "MXFP8": "MXFP8 operands",
    "F8F6": "FP8 scores and MXFP6 values",
    "MXFP6": "MXFP6 scores and FP8 values",
    "F6F4": "MXFP6 scores and MXFP4 values",
    "MXFP4": "MXFP4 scores and FP8 values",
    "F4F4": "MXFP4 operands",
}

SYSTEMS: tuple[System, ...] = (
    System(
        VLLM_OMNI,
        "vLLM-Omni 0.30.0",
        "A backend that is named there must run or raises. The same here: `strict: true`; without it a call that the "
        "backend cannot run falls back, counted and with its reason.",
        (
            Published("RAINFUSION_ATTN", None, _ASCEND),
            Published(
                "SPARSE_BLOCK",
                None,
                "it stands in an example of vLLM-Omni's documents, but 0.30 has no such backend; not implemented here",
            ),
            # Newer than 0.30.0
            Published("SPARSE_ATTN", None, "it dispatches to plugins of vLLM-Omni, which cannot be loaded here"),
            Published("SLA_ATTN", None, _SLA),
            Published("MINDIE_SLA", None, _ASCEND),
            Published("aiter_quant", None, f"{_ADAPTER}; aiter is AITER in half precision"),
            Published("vdnh3", None, "for MiniMax-H3, with weights from a separate adapter; not implemented"),
            Published("VDNH3_ATTN", None, "for MiniMax-H3, with weights from a separate adapter; not implemented"),
            Published("b12x", None, _ADAPTER),
            Published("flashinfer_sm120", None, f"{_ADAPTER}; flashinfer_attn is FlashInfer's dense attention"),
        ),
        "diffusion_attention_backend",
        "0.32.0rc1",
    ),
    System(
        SGLANG,
        "SGLang diffusion 0.5.23",
        "A missing package sends a named backend to another one there, with a log line at most. Here it is counted "
        "with its reason, and `strict: true` stops instead.",
        (
            Published("aiter_sage", None, "AITER's quantised kernels for AMD cards; not implemented"),
            Published("video_sparse_attn_h3", None, _VSA_H3),
            Published("hybrid_window_attn_h3", None, _WINDOW),
            Published("fp8_fa_sm120", None, f"{_INSIDE_SGLANG}; sage_fp8_cuda and sage_attn_3 are the nearest"),
            Published("sla_attn", None, _SLA),
            Published("sage_sla_attn", None, _SLA),
            Published("laser_attn", None, _ASCEND),
            Published("block_sparse_attn", None, _ASCEND),
            Published("rain_fusion_attn", None, _ASCEND),
            Published("no_attention", None, _NO_ATTENTION),
        ),
        "attention_backend",
    ),
    System(
        DIFFUSERS,
        "Diffusers 0.42.1",
        "Its setting belongs to the process and leaks from one model to the next; here it belongs to one model. Names "
        "with `_hub` download only where `ATTENTION_BACKENDS_HUB=1` allows it.",
        (),
    ),
    System(
        SMART_DIFFUSION,
        "Smart-Diffusion (b67588d)",
        "Its choice covers self-attention only; here the default covers every role, so add `per_role.cross` to match "
        "it.",
        (
            Published(
                "auto",
                "auto",
                "Smart-Diffusion prefers lossy kernels (sparge, sage, then flash_attn); here auto takes exact ones "
                "only, unless accuracy allows more",
            ),
            Published("triton", None, f"{LISTED}, and it does not say which kernel is meant"),
            Published("flash_mla", None, f"{LISTED}; MLA is the latent attention of language models"),
        ),
        "attn_type",
    ),
    System(
        COMFYUI,
        "ComfyUI",
        "The names under which 0.33.0 registers its attention functions, words of its nodes, and its start-up flags: "
        "`python main.py --use-sage-attention` pastes too. They run ComfyUI's function there and this pack's kernel "
        "here; `comfy` is ComfyUI's function.",
        (
            Published("sub_quad", None, _CORE_START.format(flag="--use-quad-cross-attention")),
            Published("sub-quadratic", None, _CORE_START.format(flag="--use-quad-cross-attention")),
            Published("split", None, _CORE_START.format(flag="--use-split-cross-attention")),
            Published("vsa", None, f"{_CORE_SPARSE}. It is for MiniMax H3 alone"),
            Published("block_sparse", None, _CORE_SPARSE),
            Published(
                "draft", None, "proposed for ComfyUI's node Model Sparse Attention, in no release; no kernel here"
            ),
            Published("draft_attention", None, "proposed for ComfyUI and comfy-kitchen, in no release; no kernel here"),
        ),
    ),
    System(
        KJNODES,
        "KJNodes",
        "The menu of Patch Sage Attention KJ and of its model loaders. Write `sage_attention: auto` for its `auto`.",
        (),
        "sage_attention",
    ),
    System(
        WAN_WRAPPER,
        "WanVideoWrapper",
        "The `attention_mode` of its model loader. Its models do not run through ComfyUI's attention, so the nodes "
        "here do not reach them; the names are for ComfyUI's own models.",
        (
            Published(
                "sageattn_ultravico",
                None,
                "a kernel of the wrapper's own that lets distant frames decay, for longer videos; sageattn is "
                "SageAttention without that",
            ),
        ),
        "attention_mode",
    ),
    System(
        YUNCHANG,
        "raylight and yunchang 0.6.4",
        "The `XFuser_attention` of raylight's nodes, older ones too, and yunchang's AttnType. They split a call over "
        "several cards; here it runs on one.",
        (),
        "XFuser_attention",
    ),
    System(
        XFUSER,
        "xfuser 0.7.0",
        "`--attention_backend`, `--cross_attention_backend` and both forms of the hybrid schedule paste unchanged.",
        (
            Published(
                "FLASH_3_FP8",
                None,
                "FlashAttention 3 in FP8; flash_attn_3 is its half precision, sage_fp8_sm90 has FP8 values on the same "
                "cards",
            ),
            Published(
                "NVTE_FP8", None, "TransformerEngine's FP8 attention; not called here, sage_fp8_cuda is the nearest"
            ),
            Published(
                "FLASH_4_FP4", None, "FlashAttention 4 with FP4 scores; not called here, sage_attn_3 is the nearest"
            ),
            Published("FLEX_BLOCK_ATTN", None, f"flex_block_attn's kernel, {_BLOCKS}"),
            Published("FLEX_BLOCK_SPARGE", None, f"flex_block_attn's kernel, {_BLOCKS}"),
            Published("FLEX_VSA_H3", None, f"FlexAttention for MiniMax H3, {_BLOCKS}"),
            Published("TRITON_VSA_H3", None, f"Triton kernels for MiniMax H3, {_BLOCKS}"),
            *(
                Published(f"AITER_{name}", None, _MHA_V4.format(operands=operands))
                for name, operands in _AITER_OPERANDS.items()
            ),
            Published(
                "AITER_MLA", None, "an older name of AITER_FP8 there, which is not called here; aiter is the nearest"
            ),
            *(
                Published(f"AITER_{name}_SPARGE", None, _MHA_V4_SPARGE.format(operands=operands))
                for name, operands in _AITER_OPERANDS.items()
                if name != "BF16FP8"
            ),
            *(
                Published(f"AITER_{name}", None, _AITER_SAGE)
                for name in ("SAGE", "SAGE_V2", "SPARSE_SAGE", "SPARSE_SAGE_V2", "SPARGE", "SPARGE_V2")
            ),
            Published("AITER_VSA", None, f"AITER's block-sparse kernel, {_BLOCKS}"),
            Published("AITER_FLYDSL", None, "AITER's FlyDSL kernels in half precision; not called here"),
            Published("AITER_FLYDSL_FP8", None, "AITER's FlyDSL kernels in FP8; not called here"),
        ),
    ),
    System(
        FASTVIDEO,
        "FastVideo 0.2.1",
        "`FASTVIDEO_ATTENTION_BACKEND=...`, alone or before a command, is read from text; the variable of ComfyUI's "
        "own process is not.",
        (
            Published(
                "ATTN_QAT_INFER",
                None,
                "FP4 kernels for checkpoints that were trained for them, in no package of their own; sage_attn_3 is "
                "the nearest",
            ),
            Published("ATTN_QAT_TRAIN", None, "it is for training alone; nothing is trained here"),
            Published(
                "VIDEO_SPARSE_ATTN_H3", None, "fastvideo-kernel's kernels as MiniMax H3 needs them; not implemented"
            ),
            Published(
                "BSA_ATTN",
                None,
                "Bidirectional Sparse Attention, which leaves out queries too; a part of FastVideo, not "
                "implemented here",
            ),
            Published("SLA_ATTN", None, _SLA),
            Published("SAGE_SLA_ATTN", None, _SLA),
            Published("NO_ATTENTION", None, _NO_ATTENTION),
        ),
        "FASTVIDEO_ATTENTION_BACKEND",
    ),
)
"""The systems, with their refused names and `auto`."""
