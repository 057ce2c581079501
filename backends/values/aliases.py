"""`Alias`: another system's name of a backend, for the backend's declaration."""

from __future__ import annotations

from typing import NamedTuple

PEOPLE = ""
"""Instead of a system's id: a common spelling."""

VLLM_OMNI, SGLANG, DIFFUSERS, SMART_DIFFUSION = "vllm_omni", "sglang", "diffusers", "smart_diffusion"
COMFYUI, KJNODES, WAN_WRAPPER, YUNCHANG = "comfyui", "kjnodes", "wan_wrapper", "yunchang"
XFUSER, FASTVIDEO = "xfuser", "fastvideo"
"""The systems' ids (`config/published.py`)."""

HUB = "the installed package first; the Hub's build only where it is missing and ATTENTION_BACKENDS_HUB=1 allows it"
LENGTHS = "one id for both: whether a call needs variable lengths follows from its mask"
HALF_V4 = "AITER's mha_v4 in half precision there; here its flash_attn_func, half precision too"
LISTED = "listed in Smart-Diffusion's schema, but its start-up check stops on it"


class Alias(NamedTuple):
    """One published name of the backend that declares it."""

    system: str
    """The system's id, or `PEOPLE`."""
    name: str
    line: str = ""
    """The difference here; empty: the same."""
    options: tuple[tuple[str, object], ...] = ()
    """Options that the name includes; one that a person gives has precedence."""
