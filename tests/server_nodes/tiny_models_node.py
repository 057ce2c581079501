"""A test-only node for a running ComfyUI: a tiny model of any family with conditioning and an empty latent."""

import os
import sys

sys.path.insert(0, os.environ["ATTENTION_BACKENDS_TESTS"])

import tiny_sampling
import torch
from comfy_api.latest import ComfyExtension, io
from tiny_models import FAMILIES

_built = {}  # one model per family, as a loader's cache would keep it: patches must not leak through it


class TinyModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TinyModel",
            category="testing",
            inputs=[io.Combo.Input("family", options=list(FAMILIES))],
            outputs=[io.Model.Output(), io.Conditioning.Output(), io.Conditioning.Output(), io.Latent.Output()],
        )

    @classmethod
    def execute(cls, family):
        if family not in _built:
            _built[family] = tiny_sampling.build(family)
        positive, negative = tiny_sampling.conditioning(family)
        latents = [torch.zeros(shape) for shape in FAMILIES[family].latents]
        samples = latents[0]
        if len(latents) > 1:
            import comfy.nested_tensor

            samples = comfy.nested_tensor.NestedTensor(latents)
        return io.NodeOutput(_built[family], positive, negative, {"samples": samples})


class KeepLatent(io.ComfyNode):
    """Saves every tensor of a latent, also of latents with several parts, which SaveLatent cannot."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="KeepLatent",
            category="testing",
            is_output_node=True,
            inputs=[io.Latent.Input("samples"), io.String.Input("path")],
            outputs=[],
        )

    @classmethod
    def execute(cls, samples, path):
        latent = samples["samples"]
        torch.save(list(latent.unbind()) if latent.is_nested else [latent], path)
        return io.NodeOutput()


class Tiny(ComfyExtension):
    async def get_node_list(self):
        return [TinyModel, KeepLatent]


async def comfy_entrypoint():
    return Tiny()
