"""What a mask costs: SDPA with the mask against the same call honoured by its plan (backends/engine/mask_reader.py).

For each form the plan is made once, as at the first block of a model call, and every call after it is timed; what
making it costs stands beside. `same` says whether both gave the same bits, else how far they are apart.

Run: python benchmarks/masks.py   (no ComfyUI needed; about three minutes)
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import conftest  # noqa: E402, F401  # loads this folder as the package attention_backends
import torch  # noqa: E402
from paired import machine, ratios  # noqa: E402

HEADS, HEAD_DIM = 8, 64
SIZES = (2048, 4096)


def forms(tokens: int) -> dict[str, torch.Tensor]:
    """Masks that ComfyUI's models make, for `tokens` queries and keys; the shapes are broadcastable to all heads."""
    keys, half = torch.arange(tokens), tokens // 2
    rows = keys[:, None]
    text_first = torch.zeros(1, 1, 1, tokens)
    text_first[..., 32 : 32 + half] = torch.finfo(torch.float32).min
    return {
        "nothing hidden": torch.ones(1, 1, 1, tokens, dtype=torch.bool),
        "nothing hidden, a row for each query": torch.ones(1, 1, tokens, tokens, dtype=torch.bool),
        "suffix of 50 %": (keys < half)[None, None, None],
        "suffix of 50 %, a row for each query": (keys < half).repeat(1, 1, tokens, 1),
        "gap of 50 %, most negative numbers": text_first,
        "1 key in the middle": (keys != half)[None, None, None],
        "four blocks on the diagonal": (rows // (tokens // 4) == keys // (tokens // 4))[None, None],
        "causal": (keys <= rows)[None, None],
    }


def measure(sizes: tuple[int, ...] = SIZES, rounds: int = 15) -> dict[str, Any]:
    """Each form at each size, batch 1, float32."""
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for tokens in sizes:
            tensors = inputs(tokens)
            for name, mask in forms(tokens).items():
                figures = compare(*tensors, mask, rounds)
                figures["reading_ms"] = round(reading(mask, tokens), 3)
                found[f"{name}, {tokens} tokens"] = figures
    return found


def inputs(tokens: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Query, key and value, (1, HEADS, tokens, HEAD_DIM) each."""
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, HEADS, tokens, HEAD_DIM, generator=random).to(device) for _ in range(3))


def compare(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, rounds: int
) -> dict[str, Any]:
    """SDPA with the mask beside SDPA on what its plan leaves of the call."""
    from attention_backends.backends.engine.mask_reader import inspect
    from attention_backends.backends.values.devices import synchronise
    from attention_backends.backends.values.mask_plan import write_part
    from attention_backends.backends.values.request import AttentionCall

    sdpa = torch.nn.functional.scaled_dot_product_attention
    plan = inspect(mask, key.shape[2])
    call = AttentionCall(query, key, value, mask)

    def stock() -> torch.Tensor:
        output = sdpa(query, key, value, mask)
        synchronise(query.device)
        return output

    def ours() -> torch.Tensor:
        outputs = [
            None if part is None else sdpa(part.query, part.key, part.value, part.attn_mask, is_causal=part.is_causal)
            for part in plan.calls(call)
        ]
        output = plan.empty_output(call)
        for part, found in zip(plan.sub_calls, outputs, strict=True):
            output = output if found is None else write_part(found, part, output)
        synchronise(query.device)
        return output

    one, other = stock(), ours()
    figures = ratios(stock, ours, rounds)
    figures["treatment"] = plan.strategy
    figures["same"] = True if torch.equal(one, other) else float((one - other).abs().max())
    return figures


def reading(mask: torch.Tensor, tokens: int) -> float:
    """Milliseconds to make the plan once, the median of five."""
    from attention_backends.backends.engine.mask_reader import inspect

    times = []
    for _ in range(5):
        start = time.perf_counter()
        inspect(mask, tokens)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    print(json.dumps({"machine": machine(), "torch": torch.__version__, "masks": measure()}, indent=2))
