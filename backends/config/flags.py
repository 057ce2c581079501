"""Parses command lines, flags and `name=value` pairs to a nested mapping.

`tokens.py` splits them; `mapping.py` reads the mapping.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from ..values.errors import ConfigError
from ..values.plain_data import MAX_DEPTH
from .foreign_entries import COMFYUI_FLAGS, SWITCHES, XFUSER_ENTRIES
from .tokens import at_commas, scalar, with_assignments, words_of

CONFIG_FLAGS = ("diffusion_attention_config", "dac", "attention_config")
"""vLLM-Omni's structured configuration."""
COMPONENT_FLAG = "component_attention_backends"
MAIN_FLAGS = (*CONFIG_FLAGS, "diffusion_attention_backend", "attention_backend", "attention_backend_config",
              "diffusion_attention_schedule", COMPONENT_FLAG)  # fmt: skip
"""Flags that messages name."""
COMMAND_FLAGS = (*MAIN_FLAGS, *XFUSER_ENTRIES, *COMFYUI_FLAGS, "fastvideo_vsa_topk")
"""Flags that are read from a whole command line; others are the program's."""
COMPONENT_NAME = re.compile(
    r"(transformer|unet|text_encoder|image_encoder|vision_encoder|vae|audio_vae|video_vae|vocoder|connectors)(_\d+)?"
)

_PARALLEL = "splits each attention call over several cards"
ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "diffusion_kv_cache_dtype": "sets the arithmetic of attention in vLLM-Omni: fp8 is FP8 attention of FLASH_ATTN "
        "on CUDA since 0.32, before only on NPUs; sage_fp8_cuda is the nearest here",
        "diffusion_kv_cache_skip_steps": "names steps that keep the arithmetic of attention in vLLM-Omni",
        "diffusion_kv_cache_skip_layers": "names layers that keep the arithmetic of attention in vLLM-Omni",
        "diffusion_kv_cache_dtype_skip_steps": "names steps that keep the arithmetic of attention in vLLM-Omni",
        "diffusion_kv_cache_dtype_skip_layers": "names layers that keep the arithmetic of attention in vLLM-Omni",
        **dict.fromkeys(
            ("ulysses_degree", "ring_degree", "sp_degree", "sp_size", "usp", "ulysses_mode", "allgather_kv"), _PARALLEL
        ),
        "diffusion_attention_quant": "quantises attention in vLLM-Omni since 0.32; sage_attn is the nearest here",
        **dict.fromkeys(
            (
                *("spargeattn_simthreshold", "spargeattn_cdfthreshold", "spargeattn_reorder_sequence"),
                *("use_spargeattn_static_block_mask", "use_spargeattn_head_balance", "use_ssta_sparse_text_to_image"),
                *("no_spargeattn_reorder_sequence", "no_use_spargeattn_static_block_mask"),
                *("vsa_block_size", "vsa_top_k", "vsa_top_k_ratio", "vsa_drop_rates", "vsa_prob_threshold"),
            ),
            "sets sparse kernels of xfuser's own, whose names are refused here",
        ),
        "vsa_sparsity": "sets what video_sparse_attn leaves out in FastVideo, as its option sparsity does here",
        "sta_mode": "sets the mode of sliding_tile_attn in FastVideo, as its option sta_mode does here",
        "fastvideo_fa4": "chooses FlashAttention 4 in FastVideo; flash_attn_4 asks for it here",
        "force_upcast_attention": "upcasts attention in ComfyUI; start ComfyUI with it, then it counts here too",
        "dont_upcast_attention": "leaves out upcasts in ComfyUI; give it to ComfyUI when it starts",
        "sglang_use_sage_attention_impl": "chooses among SGLang's Sage kernels; here each has a separate name",
        "sglang_diffusion_aiter_fp8_attn": "runs AITER's FP8 kernels in SGLang; here aiter is half precision only",
    }
)
"""Flags and variables that change attention in other systems, and have no effect here."""

_ASSIGNMENT = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)", re.DOTALL)
_PROGRAM = re.compile(
    r"([\w.-]*/.*|.*\.(py|sh|exe)|python[\d.]*|py|vllm|vllm-omni|sglang|fastvideo|torchrun|accelerate|uv|uvx|env|sudo|srun|docker)"
)
_FLAGS = re.compile(rf"(\$\s+)?(export\s|--?[A-Za-z]|[A-Za-z_][\w.-]*\s*=|({_PROGRAM.pattern})\s)")


class Flags(NamedTuple):
    """A parsed text of flags."""

    nested: dict[str, Any]
    environment: dict[str, str]
    """Environment variables before the command."""
    skipped: tuple[str, ...]
    """Flags without effect here: not about attention, or in `ELSEWHERE`."""


def notes_on(skipped: Sequence[str]) -> list[str]:
    """A note for each skipped flag that changes attention in its own system, one note for all others."""
    about = {flag: flag.lstrip("-").replace("-", "_").lower() for flag in skipped}
    known = [
        f"{flag}: there it {ELSEWHERE[name]}; without effect here" for flag, name in about.items() if name in ELSEWHERE
    ]
    others = [flag for flag, name in about.items() if name not in ELSEWHERE]
    return known + ([f"{', '.join(others)}: not about attention; without effect here"] if others else [])


def elsewhere_problem(names: Iterable[str]) -> str:
    """The reason against a configuration of only these entries; empty: none of them is in `ELSEWHERE`."""
    told = [f"{name}: there it {ELSEWHERE[name.lower()]}" for name in names if name.lower() in ELSEWHERE]
    return f"{'; '.join(told)}. Nothing here reads it; name a backend" if told else ""


def looks_like_flags(text: str) -> bool:
    """Whether the first line that is neither empty nor a comment is a flag, an assignment or a command."""
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return _FLAGS.match(first) is not None


def parse_flags(text: str, source: str) -> Flags:
    """Read flags, pairs, or a whole command line.

    Raises:
        ConfigError: a word is not understood; the message quotes it.
    """
    words = with_assignments(words_of(text, source))
    environment: dict[str, str] = {}
    while words and (words[0] in ("$", "export") or _ASSIGNMENT.fullmatch(words[0])):
        match = _ASSIGNMENT.fullmatch(words.pop(0))
        if match:
            environment[match[1]] = match[2]
    command = bool(words) and _PROGRAM.fullmatch(words[0]) is not None
    while command and words and not words[0].startswith("-") and not _is_attention(words[0]):
        words.pop(0)
    nested: dict[str, Any] = {}
    skipped = []
    while words:
        word = words.pop(0)
        if command and not _is_attention(word):
            _refuse_near(word, source)
            skipped += [word.partition("=")[0]] if re.match("--?[A-Za-z]", word) else []
            continue
        for name, value in _pairs(word, words, source):
            _take(nested, name, value, source)
    if command and not nested and not environment:
        raise ConfigError(f"{source}: nothing in this command line is about attention; known: {_known()}")
    return Flags(nested, environment, tuple(skipped))


def parse_pairs(text: str, source: str) -> dict[str, Any]:
    """Read `name=value` pairs to a nested mapping; dots in names nest."""
    nested: dict[str, Any] = {}
    words = with_assignments(words_of(text, source))
    while words:
        word = words.pop(0)
        for name, value in _pairs(word, words, source):
            _take(nested, name, value, source)
    return nested


def _pairs(text: str, rest: list[str], source: str) -> list[tuple[str, object]]:
    """(name, value) pairs of one word; a flag without `=` uses the next word as value."""
    if text.startswith("-"):
        name, equals, value = text.lstrip("-").partition("=")
        if not equals and name.replace("-", "_") in SWITCHES:
            value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{source}: {text!r} is not name=value: its value is missing")
            value = rest.pop(0)
        return [(name, scalar(value))]
    pieces: list[str] = []
    for piece in at_commas(text):
        if "=" in piece or not pieces:
            pieces.append(piece)
        else:  # a comma inside a value, as in dense_layers=0,1
            pieces[-1] += f",{piece}"
    settings: list[tuple[str, object]] = []
    for piece in pieces:
        name, equals, value = piece.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"{source}: {piece!r} is not name=value")
        settings.append((name.strip(), scalar(value)))
    return settings


def _take(nested: dict[str, Any], name: str, value: object, source: str) -> None:
    """Put one setting into `nested`; SGLang's map by component, so that several flags are merged."""
    inner: dict[str, Any] = {}
    if name.replace("-", "_") == COMPONENT_FLAG:
        if isinstance(value, dict):
            inner = value
        elif isinstance(value, str) and "=" in value:
            inner = parse_pairs(value, f"{source}.{COMPONENT_FLAG}")
            inner = {**inner.pop(COMPONENT_FLAG, {}), **inner}
    entries = {f"{COMPONENT_FLAG}.{component}": entry for component, entry in inner.items()} or {name: value}
    for full, entry in entries.items():
        _put(nested, full, entry, source)


def _put(nested: dict[str, Any], name: str, value: object, source: str) -> None:
    """Put `a.b.c` into nested dicts; names of components keep their dots.

    Raises:
        ConfigError: it conflicts with an earlier setting, or is nested too deeply.
    """
    conflict = f"{source}: {name!r} conflicts with an earlier entry"
    head, _, tail = name.partition(".")
    head = head.replace("-", "_")
    if COMPONENT_NAME.fullmatch(head):
        head, tail = COMPONENT_FLAG, name
    parts = [head, tail] if head == COMPONENT_FLAG and tail else [head, *tail.split(".")] if tail else [head]
    if len(parts) > MAX_DEPTH:
        raise ConfigError(f"{source}: {name!r} has {len(parts)} parts: nested too deeply")
    *parents, last = parts
    for parent in parents:
        nested = nested.setdefault(parent, {})
        if not isinstance(nested, dict):
            raise ConfigError(conflict)
    if last in nested:
        raise ConfigError(conflict)
    nested[last] = value


def _head(word: str) -> str:
    return re.split(r"[.=]", word.lstrip("-"), maxsplit=1)[0].replace("-", "_")


def _is_attention(word: str) -> bool:
    if not word.startswith("-"):
        return re.match(r"(args\.)?infer\.attn_(type|config\b)[\w.]*=", word) is not None
    return _head(word) in COMMAND_FLAGS


def _refuse_near(word: str, source: str) -> None:
    """Refuse an unknown flag of a command line that has attention or attn in its name.

    Raises:
        ConfigError: it has.
    """
    head = _head(word)
    if word.startswith("--") and re.search("attention|attn", head) and head not in ELSEWHERE:
        name = word.partition("=")[0]
        raise ConfigError(f"{source}: flag {name} is about attention and not known here; known: {_known()}")


def _known() -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in MAIN_FLAGS)
