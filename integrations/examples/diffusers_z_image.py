"""Z-Image in Diffusers with tiny random weights: INT8 arithmetic for joint attention, watched by the guard.

    python integrations/examples/diffusers_z_image.py

`emulated_int8` computes on any device what INT8 kernels round; on a card choose `sage_attn`.
"""

import torch
from attention_backends.integrations.diffusers import apply, reset
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel


def tiny_pipeline() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[128, 16, 16],
    )  # fmt: skip
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    return ZImagePipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts)


def main() -> str:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    applied = apply(pipe, {"default": "torch_sdpa", "per_role": {"joint": "emulated_int8"}}, guard="watch")
    pipe(
        prompt_embeds=[torch.zeros(7, 16)], guidance_scale=0.0, height=64, width=64, num_inference_steps=2,
        output_type="latent",
    )  # fmt: skip
    summary = applied.summary()
    reset(pipe)
    return summary


if __name__ == "__main__":
    print(main())
