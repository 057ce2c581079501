"""Measured choices for tests: of this machine and of another one."""

from __future__ import annotations

from typing import Any

import torch
from attention_backends.backends.kernels.registry import detect
from attention_backends.backends.measure.call_key import TuningKey
from attention_backends.backends.measure.environment import environment_of
from attention_backends.backends.observe.autotune.entry import Entry

ELSEWHERE = "cuda NVIDIA GeForce RTX 4090 sm89 | driver 580.65.06 | torch 2.9.0+cu130 | sageattention 2.2.0"
MS = {"torch_sdpa": 4.25, "sdpa_flash": 3.125, "sdpa_math": 12.5}


def key(role: str = "self", **facts: Any) -> TuningKey:
    usual = {
        "dtype": "bfloat16", "batch": 2, "num_heads": 24, "num_kv_heads": 24, "q_len": 4096, "kv_len": 4096,
        "head_dim": 128, "v_head_dim": 128, "mask": "none", "is_causal": False, "exact_only": False,
    }  # fmt: skip
    return TuningKey(role=role, **{**usual, **facts})


def entry(kind: TuningKey, environment: str | None = None, ms: dict[str, float] = MS, **more: Any) -> Entry:
    """The fastest one wins; `torch_sdpa` is what auto would take."""
    here = environment_of(detect(torch.device("cpu"))) if environment is None else environment
    usual = {
        "accuracy": "exact", "winner": min(ms, key=lambda name: ms[name]), "incumbent": "torch_sdpa", "ms": ms,
        "rejected": {}, "deferred": {}, "written": 1.75e9,
    }  # fmt: skip
    return Entry(key=kind, environment=here, **{**usual, **more})


def some() -> list[Entry]:
    """Three kinds of call of this machine, one of another."""
    refused = {"flash_attn": "package flash-attn is not installed", "emulated_int8": "relative L2 0.21 > 0.1"}
    return [
        entry(key(), written=1.75e9 + 3),
        entry(
            key("cross", kv_len=80, mask="key_padding"), ms={"torch_sdpa": 0.5, "sdpa_math": 0.75}, rejected=refused,
            accuracy="quantized", written=1.75e9 + 2,
        ),
        entry(
            key("ltx2.audio_to_video", num_kv_heads=8, v_head_dim=64, is_causal=True, exact_only=True),
            deferred={"sdpa_math": 2}, ms={"torch_sdpa": 123.4, "sdpa_flash": 130.0}, written=1.75e9 + 1,
        ),
        entry(key("joint"), ELSEWHERE, ms={"sage_fp8_cuda": 1.5, "torch_sdpa": 2.75}, accuracy="quantized"),
    ]  # fmt: skip
