"""Where a mask's plan stops to pay: how few hidden keys, and how many blocks, are worth calls of their own.

The limits of the planner (`CPU_KEPT` and `MOST_BLOCKS` in backends/engine/mask_reader.py) are lifted, and SDPA with
the mask is timed against the same call honoured by its plan, on both sides of them.

Run: python benchmarks/mask_limits.py [--device cuda] [--json FILE]   (no ComfyUI needed; about six minutes)
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import masks  # loads this folder as the package attention_backends
import torch
from paired import machine, training_paused

SIZES = (1024, 2048, 4096)
HIDDEN = (2, 4, 8, 16, 32, 64)
"""One in so many keys is hidden, in one gap behind the first 32."""
BLOCKS = (2, 4, 8, 16, 32, 64)


def gap(tokens: int, one_in: int) -> torch.Tensor:
    """A mask as text padding is where the text comes first."""
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
    mask[..., 32 : 32 + tokens // one_in] = False
    return mask


def diagonal(tokens: int, blocks: int) -> torch.Tensor:
    """Each block of tokens sees itself."""
    block = torch.arange(tokens) // (tokens // blocks)
    return (block[:, None] == block)[None, None]


def measure(device: str, rounds: int = 25) -> dict[str, Any]:
    """Ratios, above 1 where the plan is faster, by form and tokens; batch 1, float32 on the CPU, else bfloat16."""
    from attention_backends.backends.engine import mask_reader as plan

    found: dict[str, Any] = {}
    with torch.inference_mode(), patch.object(plan, "CPU_KEPT", 1.0), patch.object(plan, "MOST_BLOCKS", math.inf):
        for tokens in SIZES:
            tensors = masks.inputs(tokens, device)
            if device != "cpu":
                tensors = tuple(tensor.bfloat16() for tensor in tensors)
            forms = {f"1 key in {one_in} hidden": gap(tokens, one_in) for one_in in HIDDEN}
            forms |= {f"{blocks} blocks": diagonal(tokens, blocks) for blocks in BLOCKS}
            for name, mask in forms.items():
                found[f"{name}, {tokens} tokens"] = masks.mask_cost(*tensors, mask.to(device), rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    where = machine() if given.device == "cpu" else torch.cuda.get_device_name(given.device)
    result = {"machine": where, "torch": torch.__version__, "threads": 1, "ratios": measure(given.device)}
    text = json.dumps(result, indent=2)
    print(text)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    with training_paused():
        main()
