"""How much memory a backend takes for one call, in bytes: reported to a host that plans memory.

Only what goes beyond query, key, value, mask and output counts, as these are there whichever kernel runs. Each
backend declares it (`Backend.workspace_bytes`) from what its kernel allocates. Everything follows from the facts of a
call: no tensor is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from ...values.platform import Platform
from ...values.request import AttentionRequest

if TYPE_CHECKING:
    from ..backend import Backend

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1}
)


def item_bytes(request: AttentionRequest) -> int:
    """Bytes of one number of query, key and value."""
    return ITEM_BYTES[request.dtype]


def query_size(request: AttentionRequest) -> int:
    """Numbers in the query."""
    return request.batch * request.num_heads * request.q_len * request.head_dim


def key_size(request: AttentionRequest, heads: int = 0) -> int:
    """Numbers in the key; in one with `heads` heads where that is given."""
    return request.batch * (heads or request.num_kv_heads or request.num_heads) * request.kv_len * request.head_dim


def value_size(request: AttentionRequest, heads: int = 0) -> int:
    """Numbers in the value; in one with `heads` heads where that is given."""
    head_dim = request.v_head_dim or request.head_dim
    return request.batch * (heads or request.num_kv_heads or request.num_heads) * request.kv_len * head_dim


def output_size(request: AttentionRequest) -> int:
    """Numbers in the output."""
    return request.batch * request.num_heads * request.q_len * (request.v_head_dim or request.head_dim)


def score_size(request: AttentionRequest) -> int:
    """Numbers in the matrix of all scores: one for each query, key and head."""
    return request.batch * request.num_heads * request.q_len * request.kv_len


def mask_size(request: AttentionRequest) -> int:
    """Numbers in the mask, taken to differ between samples but not between heads: a request does not say."""
    if request.mask == "none":
        return 0
    return request.batch * request.kv_len * (1 if request.mask == "key_padding" else request.q_len)


def inputs_bytes(request: AttentionRequest) -> int:
    """Bytes of query, key and value."""
    return (query_size(request) + key_size(request) + value_size(request)) * item_bytes(request)


def expanded_bytes(request: AttentionRequest) -> int:
    """Bytes of key and value with a head for each query head, where they have fewer (`sdpa.expand_kv`)."""
    if not request.grouped:
        return 0
    return (key_size(request, request.num_heads) + value_size(request, request.num_heads)) * item_bytes(request)


def rounded_bytes(request: AttentionRequest) -> int:
    """Bytes of query and key as 8-bit numbers; their scales are left out, a few for each block of tokens."""
    return query_size(request) + key_size(request)


def lacking_memory(backend: Backend, request: AttentionRequest, platform: Platform) -> str | None:
    """The reason if a backend's scores exceed the computer's free memory; None if they fit or it is unknown.

    Only for the CPU, where the system kills the process instead of raising an error.
    """
    if platform.kind != "cpu" or not backend.holds_scores:
        return None
    need = backend.workspace_bytes(request, platform)
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    available = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    if available is None or need <= int(available[1]) * 1024:
        return None
    return f"its scores need {need / 1e9:.1f} GB > {int(available[1]) * 1024 / 1e9:.1f} GB of free memory"
