"""The names a person may write for a backend, and the one id each of them means.

The ids are public for ever: workflows and configuration files hold them. The aliases are the spellings of
vLLM-Omni, SGLang diffusion, Diffusers and Smart-Diffusion, so that a configuration written for one of them
pastes unchanged. Only names live here; what each backend can do is in `kernels/`.
"""

from __future__ import annotations

import difflib

AUTO = "auto"
"""Take the first exact backend of the platform's route that can run the call."""

MEASURED = "measured"
"""Take the backend that was measured fastest on this machine for this kind of call."""

COMFY = "comfy"
"""Run what ComfyUI would have run by itself."""

BACKEND_IDS: tuple[str, ...] = (
    "torch_sdpa",
    "cudnn_attn",
    "flash_attn",
    "flash_attn_2",
    "flash_attn_3",
    "flash_attn_4",
    "flashinfer_attn",
    "sage_attn",
    "sage_fp16_cuda",
    "sage_fp16_triton",
    "sage_fp8_cuda",
    "sage_fp8_sm90",
    "sage_attn_3",
    "comfy_kitchen_int8",
    "xformers",
    "flex_attn",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa_math",
    "aiter",
    "npu_fusion",
    "xla_flash",
    "sliding_tile_attn",
    "video_sparse_attn",
    "vmoba_attn",
    "sparse_video_gen_2_attn",
    "sparge_attn",
    "sol_attn",
    "radial_attn",
    COMFY,
    "emulated_int8",
    "reference",
)
"""Every backend that can be named, in the order in which menus show them. New ids are appended."""

CHOICES: tuple[str, ...] = (AUTO, MEASURED, *BACKEND_IDS)
"""What a menu offers: the two ways to let the pack choose, then each backend."""

ALIASES: dict[str, str] = {
    # vLLM-Omni; its names are compared without regard to case, so FLASH_ATTN and the like need no entry.
    "sdpa": "torch_sdpa",
    "flash_attn_hub": "flash_attn_2",
    "flash_attn_3_hub": "flash_attn_3",
    "fastvideo_vsa": "video_sparse_attn",
    # SGLang diffusion; there fa3 and fa4 are the family, not a version.
    "fa": "flash_attn",
    "fa2": "flash_attn_2",
    "fa3": "flash_attn",
    "fa4": "flash_attn",
    "cudnn_sdpa": "cudnn_attn",
    "torch_cudnn_sdpa": "cudnn_attn",
    "sparge_attn_backend": "sparge_attn",
    # Diffusers
    "native": "torch_sdpa",
    "_native_cudnn": "cudnn_attn",
    "_native_efficient": "sdpa_efficient",
    "_native_flash": "sdpa_flash",
    "_native_math": "sdpa_math",
    "_native_npu": "npu_fusion",
    "_native_xla": "xla_flash",
    "flash": "flash_attn_2",
    "flash_hub": "flash_attn_2",
    "flash_varlen": "flash_attn_2",
    "flash_varlen_hub": "flash_attn_2",
    "flash_4_hub": "flash_attn_4",
    "_flash_3": "flash_attn_3",
    "_flash_varlen_3": "flash_attn_3",
    "_flash_3_hub": "flash_attn_3",
    "_flash_3_varlen_hub": "flash_attn_3",
    "aiter_fa2_hub": "aiter",
    "flex": "flex_attn",
    "sage": "sage_attn",
    "sage_hub": "sage_attn",
    "sage_varlen": "sage_attn",
    "sage_blackwell_hub": "sage_attn_3",
    "_sage_qk_int8_pv_fp8_cuda": "sage_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90": "sage_fp8_sm90",
    "_sage_qk_int8_pv_fp16_cuda": "sage_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton": "sage_fp16_triton",
    # Smart-Diffusion
    "sparge": "sparge_attn",
    "spas_sage": "sparge_attn",
    "flash_infer": "flashinfer_attn",
    "npu": "npu_fusion",
    "ref": "reference",
    # How people write them
    "cudnn": "cudnn_attn",
    "flashinfer": "flashinfer_attn",
    "sageattn": "sage_attn",
    "sageattn3": "sage_attn_3",
    "pytorch": "torch_sdpa",
}


class UnknownBackendError(ValueError):
    """A name that no backend and no alias has."""


def canonical(name: str) -> str:
    """Return the id that `name` means; case, surrounding space and `-` for `_` do not matter.

    Raises:
        UnknownBackendError: nothing has that name; the message gives the nearest names and the whole list.
    """
    key = name.strip().lower().replace("-", "_")
    if key in CHOICES:
        return key
    if key in ALIASES:
        return ALIASES[key]
    near = difflib.get_close_matches(key, [*CHOICES, *ALIASES], n=3, cutoff=0.6)
    hint = f" did you mean {' or '.join(near)}?" if near else ""
    raise UnknownBackendError(f"unknown attention backend {name!r};{hint} the names are: {', '.join(CHOICES)}")
