"""A test-only node for a running ComfyUI: a model that is slow, runs out of memory, or is cancelled between runs."""

import time

import comfy.model_management
import comfy.patcher_extension
import torch
from comfy_api.latest import ComfyExtension, io


class ShakyModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ShakyModel",
            category="testing",
            inputs=[
                io.Model.Input("model"),
                io.Float.Input("seconds", default=0.0, tooltip="Of each model call."),
                io.Int.Input("no_memory_at", default=0, tooltip="Number of the model call that runs out of memory."),
                io.Int.Input(
                    "cancel_after", default=0, tooltip="Number of the sampling run after which Cancel is hit."
                ),
            ],
            outputs=[io.Model.Output()],
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, model, seconds, no_memory_at, cancel_after):
        calls = 0

        def call(apply_model, given):
            nonlocal calls
            calls += 1
            time.sleep(seconds)
            if calls == no_memory_at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return apply_model(given["input"], given["timestep"], **given["c"])

        runs = 0

        def run(executor, *args, **kwargs):
            nonlocal runs
            runs += 1
            output = executor(*args, **kwargs)
            if runs == cancel_after:
                comfy.model_management.interrupt_current_processing()
            return output

        clone = model.clone()
        clone.set_model_unet_function_wrapper(call)
        clone.add_wrapper(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, run)
        return io.NodeOutput(clone)


class Shaky(ComfyExtension):
    async def get_node_list(self):
        return [ShakyModel]


async def comfy_entrypoint():
    return Shaky()
