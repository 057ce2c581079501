"""A name by which another system, or people, know a backend: a value for a backend's declaration."""

from __future__ import annotations

from typing import NamedTuple

PEOPLE = ""
"""Used instead of a system's id for a spelling that people write."""

VLLM_OMNI, SGLANG, DIFFUSERS, SMART_DIFFUSION = "vllm_omni", "sglang", "diffusers", "smart_diffusion"
"""The systems' ids (`config/systems.py`)."""

HUB = "the installed package first; the Hub's build only where it is missing and ATTENTION_BACKENDS_HUB=1 allows it"
LENGTHS = "one id for both: whether a call needs variable lengths follows from its mask"
LISTED = "listed in Smart-Diffusion's schema, but its start-up check stops on it"


class Alias(NamedTuple):
    """One name as its system publishes it, of the backend that declares it."""

    system: str
    """The system's id, or `PEOPLE`."""
    name: str
    line: str = ""
    """What differs here; empty where it means the same."""
