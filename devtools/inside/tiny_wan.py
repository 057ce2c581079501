"""Writes a Wan 2.1 text-to-video model with random weights and two small blocks, for the demo and the tests.

    python tiny_wan.py FILE.safetensors

The names and shapes are those of a real checkpoint, so that ComfyUI's UNETLoader recognises it.
Run by the interpreter that runs ComfyUI: needs torch and safetensors, imports nothing of ComfyUI.
"""

import sys

import torch
from safetensors.torch import save_file

DIM, FFN, LAYERS = 256, 512, 2  # heads are DIM / 128, as ComfyUI reads them from the width
CHANNELS, TEXT, FREQUENCIES = 16, 4096, 256
PATCH = 1 * 2 * 2


def shapes() -> dict[str, tuple[int, ...]]:
    """The name of each tensor -> its shape."""
    found: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (DIM, CHANNELS, 1, 2, 2),
        "patch_embedding.bias": (DIM,),
        "head.modulation": (1, 2, DIM),
    }

    def linear(name: str, width_in: int, width_out: int) -> None:
        found[f"{name}.weight"] = (width_out, width_in)
        found[f"{name}.bias"] = (width_out,)

    linear("text_embedding.0", TEXT, DIM)
    linear("text_embedding.2", DIM, DIM)
    linear("time_embedding.0", FREQUENCIES, DIM)
    linear("time_embedding.2", DIM, DIM)
    linear("time_projection.1", DIM, 6 * DIM)
    linear("head.head", DIM, CHANNELS * PATCH)
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"{block}.{attention}.{part}", DIM, DIM)
            found[f"{block}.{attention}.norm_q.weight"] = (DIM,)
            found[f"{block}.{attention}.norm_k.weight"] = (DIM,)
        found[f"{block}.norm3.weight"] = (DIM,)
        found[f"{block}.norm3.bias"] = (DIM,)
        linear(f"{block}.ffn.0", DIM, FFN)
        linear(f"{block}.ffn.2", FFN, DIM)
        found[f"{block}.modulation"] = (1, 6, DIM)
    return found


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes().items():
        if "norm" in name:
            tensors[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        elif name.endswith("bias"):
            tensors[name] = torch.zeros(shape)
        else:
            fan_in = torch.Size(shape[1:]).numel() if name.endswith("weight") else shape[-1]
            tensors[name] = torch.randn(shape, generator=generator) * fan_in**-0.5
    return tensors


if __name__ == "__main__":
    save_file(weights(), sys.argv[1])
