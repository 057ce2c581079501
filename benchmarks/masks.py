"""What a mask costs: SDPA with the mask against the same call honoured by its plan (backends/engine/mask_reader.py).

For each form the plan is made once, as at the first block of a model call, and every call after it is timed; what
making it costs stands beside. `same` says whether both gave the same bits, else how far they are apart.

Run: python benchmarks/masks.py   (no ComfyUI needed; about three minutes)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import conftest  # noqa: E402, F401  # loads this folder as the package attention_backends
import torch  # noqa: E402
from attention_backends.comparison.card.costs import mask_cost, mask_forms  # noqa: E402
from paired import machine, training_paused  # noqa: E402

HEADS, HEAD_DIM = 8, 64
SIZES = (2048, 4096)


def measure(sizes: tuple[int, ...] = SIZES, rounds: int = 15) -> dict[str, Any]:
    """Each form at each size, batch 1, float32."""
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for tokens in sizes:
            tensors = inputs(tokens)
            for name, mask in mask_forms(tokens).items():
                found[f"{name}, {tokens} tokens"] = mask_cost(*tensors, mask, rounds)
    return found


def inputs(tokens: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Query, key and value, (1, HEADS, tokens, HEAD_DIM) each."""
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, HEADS, tokens, HEAD_DIM, generator=random).to(device) for _ in range(3))


if __name__ == "__main__":
    with training_paused():
        print(json.dumps({"machine": machine(), "torch": torch.__version__, "masks": measure()}, indent=2))
