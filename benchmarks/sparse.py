"""Sparse attention on a CPU: what the executor `gather` gains and takes, and what that is in a model in ComfyUI.

- calls: random maps of blocks of 128, against dense SDPA on the same tensors.
- choosing: what choosing blocks costs, as a share of dense SDPA.
- memory: the peak of `gather` against that of dense SDPA, and the workspace that it states.
- model: attention of a tiny Wan of 8,192 tokens, a quarter kept, against the same model with `torch_sdpa`. Needs a
  ComfyUI. Every call of the model's self-attention is timed, choosing included.

All alternate in one process. Figures of a CPU say nothing about a card.

Run: OMP_NUM_THREADS=1 python benchmarks/sparse.py [calls] [choosing] [memory] [model] [--json FILE]   (five minutes)
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import conftest  # noqa: E402, F401  # loads this folder as the package attention_backends
import torch  # noqa: E402
from memory import peak_bytes  # noqa: E402
from paired import alternated, interval, machine, training_paused  # noqa: E402

HEADS, HEAD_DIM, BLOCK = 4, 64, 128
KEPT = {"a half": 0.5, "a quarter": 0.25, "3 of 32": 3 / 32}
GRIDS = {4096: (4, 32, 32), 8192: (8, 32, 32)}
ST = {"temporal_layer": 0, "spatial_layer": 0}
METHODS: dict[str, dict[str, Any]] = {
    "video_sparse_attn": {"sparsity": 0.75},
    "cube_attn": {"local_cube_size": [2, 8, 8], "topk": 0.25},
    "sparge_attn": {"topk": 0.25},
    "subblock_attn": {"sparsity": 0.75},
    "nabla_attn": {"P": 0.3, "wT": 1},
    "ssta_attn": {"topk": 0.25, "win_size": [1, 1, 1]},
    "radial_attn": {"decay_factor": 0.2},
    "sliding_tile_attn": {"window_size": [1, 1, 3]},
    "sparse_video_gen_attn": {},
    "sparse_video_gen_2_attn": {},
    "sparse_video_gen_2_attn, first use": {},
    "vmoba_attn, chunks of 256": {**ST, "st_chunk_size": [4, 8, 8]},
    "vmoba_attn, chunks of 96": ST,
    "sol_attn": {},
}
"""Options with which each method leaves out much of a grid of 8 x 32 x 32; what follows a comma is not its id."""


def tensors(tokens: int, dtype: torch.dtype) -> Any:
    from attention_backends.backends.values.request import AttentionCall

    torch.manual_seed(0)
    return AttentionCall(*(torch.randn(1, HEADS, tokens, HEAD_DIM).to(dtype) for _ in range(3)))


def random_map(tokens: int, share: float) -> Any:
    """Each query block of each head sees this share of all key blocks."""
    from attention_backends.backends.sparse.block_map import BlockMap
    from attention_backends.backends.sparse.blocks import in_order
    from attention_backends.backends.sparse.choose_blocks import highest

    blocks = in_order(tokens, BLOCK)
    count = round(share * blocks.count)
    seen = highest(torch.rand(1, HEADS, blocks.count, blocks.count), count)
    return BlockMap(blocks, blocks, seen, (count,) * blocks.count)


def dense(call: Any) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)


def faster(stock: list[float], ours: list[float]) -> dict[str, Any]:
    pairs = zip(stock, ours, strict=True)
    return {"ms": round(statistics.median(ours), 2), "faster": interval([one / other for one, other in pairs])}


def calls(rounds: int) -> dict[str, Any]:
    from attention_backends.backends.sparse.executors.gather import gather

    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in GRIDS:
            call = tensors(tokens, dtype)
            maps = {name: random_map(tokens, share) for name, share in KEPT.items()}
            kinds: dict[str, Callable[[], Any]] = {"dense": lambda call=call: dense(call)}
            kinds |= {name: lambda call=call, of=of: gather(call, of) for name, of in maps.items()}
            times = alternated(kinds, rounds)
            row = {name: faster(times["dense"], times[name]) for name in maps}
            found[f"{str(dtype).removeprefix('torch.')}, {tokens} tokens"] = {
                "dense_ms": round(statistics.median(times["dense"]), 2), **row
            }  # fmt: skip
    return found


def choosing(rounds: int) -> dict[str, Any]:
    from attention_backends.backends.kernels import BACKENDS
    from attention_backends.backends.kernels.registry import detect
    from attention_backends.backends.sparse.method import Where
    from attention_backends.backends.values.grid import TokenGrid

    load = os.getloadavg()[0]
    call, grid, here = tensors(8192, torch.float32), TokenGrid(*GRIDS[8192]), detect(torch.device("cpu"))
    kinds: dict[str, Callable[[], Any]] = {"dense": lambda: dense(call)}
    for name, options in METHODS.items():
        method: Any = BACKENDS[name.partition(",")[0]]
        values = method.load(here, **options).options
        where = Where(None, None, None, None, "self", () if "first use" in name else ("a sample",), kept={})
        kinds[name] = lambda method=method, values=values, where=where: method.select_blocks(call, grid, where, values)
    times = alternated(kinds, rounds)
    shares = {
        name: interval([one / other for one, other in zip(times[name], times["dense"], strict=True)], 4)
        for name in METHODS
    }
    return {"share of dense, float32, 8192 tokens": shares, "load": [load, os.getloadavg()[0]]}


def memory() -> dict[str, Any]:
    from attention_backends.backends.sparse.executors import gather as gathering

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        call = tensors(8192, dtype)
        stated = gathering.workspace_bytes(call.request(), call.query.element_size(), on_cpu=True)
        stock = peak_bytes(lambda call=call: dense(call))
        row: dict[str, Any] = {"dense_bytes": stock, "stated_workspace": stated}
        for name, share in KEPT.items():
            block_map = random_map(8192, share)

            def ours(call: Any = call, of: Any = block_map) -> torch.Tensor:
                output = gathering.gather(call, of)
                gathering._free.__dict__.clear()  # so that each call makes its buffers anew, and they are counted
                return output

            peak = peak_bytes(ours)
            row[name] = {"bytes": peak, "without_workspace": round((peak - stated) / stock, 2)}
        found[str(dtype).removeprefix("torch.")] = row
    return found


def model(rounds: int) -> dict[str, Any]:
    import comfy_location
    import tiny_sampling

    comfyui = comfy_location.find_comfyui()
    if comfyui is None:
        raise SystemExit(comfy_location.why_no_comfyui())
    tiny_sampling.prepare(comfyui, "--use-pytorch-cross-attention")
    logging.disable(logging.WARNING)
    from attention_backends.backends.config import AttentionConfig, AttentionSpec
    from attention_backends.backends.engine.session import Session
    from attention_backends.nodes.hook import patch

    family = tiny_sampling.FAMILIES["wan"]
    tiny_sampling.FAMILIES = {"wan": replace(family, latents=((1, 16, 8, 64, 64),))}  # 8 x 32 x 32 tokens
    patcher = tiny_sampling.build("wan")
    attention, spent = Session.attention, [0.0]

    def timed(self: Session, slot: Any, *rest: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        output = attention(self, slot, *rest, **named)
        if slot.plan.kind.role == "self":
            spent[0] += time.perf_counter() - begun
        return output

    Session.attention = timed  # type: ignore[method-assign]
    backends: dict[str, dict[str, Any]] = {"torch_sdpa": {}}
    backends |= {name: METHODS[name] for name in ("video_sparse_attn", "cube_attn", "sparge_attn")}
    of_self: dict[str, list[float]] = {name: [] for name in backends}
    kinds: dict[str, Callable[[], Any]] = {}
    found: dict[str, Any] = {}
    for name, extra in backends.items():
        config = AttentionConfig(AttentionSpec(name, extra), guard="off")
        patched = patch.set_config(patcher, config)

        def sampled(name: str = name, patched: Any = patched) -> None:
            spent[0] = 0.0
            tiny_sampling.sample(patched, "wan", steps=1)
            of_self[name].append(spent[0] * 1e3)

        kinds[name] = sampled
    times = alternated(kinds, rounds)
    for name in backends:
        found[name] = {
            "attention": faster(of_self["torch_sdpa"][2:], of_self[name][2:]),
            "whole run": faster(times["torch_sdpa"], times[name]),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="calls, choosing, memory, model; default: all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    timed = {"calls": calls, "choosing": choosing, "model": model}
    parts = arguments.parts or ["calls", "choosing", "memory", "model"]
    found: dict[str, Any] = {"machine": machine(), "torch": torch.__version__, "load_before": os.getloadavg()[0]}
    with torch.inference_mode():
        for part in parts:
            found[part] = memory() if part == "memory" else timed[part](arguments.rounds)
    found["load_after"] = os.getloadavg()[0]
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    with training_paused():
        main()
