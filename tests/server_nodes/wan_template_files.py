"""For a running ComfyUI in tests: files for the Wan 2.2 14B templates, so that they run as they are opened.

Models, LoRAs and VAE are tiny real ones that ComfyUI's own loaders read. Its text encoder has no tiny size: the loader
gives one that answers each prompt with random numbers.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, os.environ["ATTENTION_BACKENDS_TESTS"])

import comfy.ldm.wan.vae
import folder_paths
import tiny_sampling
import torch
from safetensors.torch import save_file
from tiny_models import FAMILIES
from workflow_families import wan22_14b_4_steps

import nodes

NODE_CLASS_MAPPINGS = {}
VAE = {
    "dim": 4, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
    "temperal_downsample": [False, True, True], "dropout": 0.0,
}  # fmt: skip


class RandomText:
    def tokenize(self, text, **_):
        return text

    def encode_from_tokens_scheduled(self, text):
        generator = torch.Generator().manual_seed(len(text))
        return [[torch.randn(1, *FAMILIES["wan"].text, generator=generator), {}]]


def write(path):
    if path.parent.name == "text_encoders":
        path.touch()
    elif path.parent.name == "vae":
        torch.manual_seed(0)
        save_file(comfy.ldm.wan.vae.WanVAE(**VAE).state_dict(), path)
    elif path.parent.name == "loras":
        shapes = {"lora_A": (1, 256), "lora_B": (256, 1)}
        key = "diffusion_model.blocks.0.self_attn.q"
        save_file({f"{key}.{part}.weight": torch.full(shape, 0.01) for part, shape in shapes.items()}, path)
    else:
        tiny_sampling.save(tiny_sampling.build("wan", "low" in path.name), "wan", path)


for file in wan22_14b_4_steps().files:
    target = Path(folder_paths.models_dir) / file
    target.parent.mkdir(exist_ok=True)
    write(target)
nodes.CLIPLoader.load_clip = lambda self, *_, **__: (RandomText(),)
