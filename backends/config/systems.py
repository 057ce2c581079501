"""The names that other systems publish for attention backends: one table for each system.

A row has the published name, its id here (None: refused), and a line: the reason for a refusal, or the difference.
Names of backends are declared by the backend (`values/aliases.py`), refused ones are listed here. `names.py` resolves
names by these tables, and
`docs/systems.md` is generated from them. A name is compared without regard to case.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from ..kernels import registry
from ..values.aliases import DIFFUSERS, LISTED, SGLANG, SMART_DIFFUSION, VLLM_OMNI


class Published(NamedTuple):
    """One published name."""

    name: str
    means: str | None
    """The id here; None: the name is refused."""
    line: str = ""
    """Reason of the refusal, or difference; empty: the same."""


class System(NamedTuple):
    id: str
    title: str
    about: str
    """Introduction for users of this system."""
    names: tuple[Published, ...]


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
_ADAPTER = "an adapter of vLLM-Omni newer than 0.30.0, for kernels that nothing here calls; not implemented"

_SYSTEMS: tuple[System, ...] = (
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
            Published("vdnh3", None, "for MiniMax-H3, with an adapter's weights of its own; not implemented"),
            Published("VDNH3_ATTN", None, "for MiniMax-H3, with an adapter's weights of its own; not implemented"),
            Published("b12x", None, _ADAPTER),
            Published("flashinfer_sm120", None, f"{_ADAPTER}; flashinfer_attn is FlashInfer's dense attention"),
        ),
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
    ),
)
"""The systems, with their refused names and `auto`."""


@lru_cache(maxsize=1)
def systems() -> tuple[System, ...]:
    """The systems with all their names: declared ones in the order of backends, then the others."""
    declared: dict[str, list[Published]] = {}
    for backend in registry.BACKENDS.values():
        for alias in backend.aliases:
            declared.setdefault(alias.system, []).append(Published(alias.name, backend.id, alias.line))
    return tuple(system._replace(names=(*declared.get(system.id, ()), *system.names)) for system in _SYSTEMS)


def key_of(name: str) -> str:
    """A name in its form for comparison: lower case, stripped, `_` for `-`."""
    return name.strip().lower().replace("-", "_")


def rows_of(name: str, system: str = "") -> Iterator[tuple[System, Published]]:
    """The rows of a name, those of `system` (an id) first."""
    yield from sorted(_rows().get(key_of(name), ()), key=lambda row: row[0].id != system)


@lru_cache(maxsize=1)
def _rows() -> dict[str, list[tuple[System, Published]]]:
    """Rows by `key_of` their name."""
    rows: dict[str, list[tuple[System, Published]]] = {}
    for publisher in systems():
        for row in publisher.names:
            rows.setdefault(key_of(row.name), []).append((publisher, row))
    return rows


def line_of(name: str, system: str = "") -> str:
    """The line of an accepted name for messages, or an empty text.

    `system`: id of the system that the name comes from; if unknown, the first system with a line for the name is used.
    """
    for publisher, row in rows_of(name, system):
        if row.means is not None and row.line:
            return f"{row.name} ({publisher.title}) means {row.means} here: {row.line}"
        if publisher.id == system:
            return ""
    return ""
