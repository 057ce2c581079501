"""SDXL in Diffusers with tiny random weights: exact kernels for cross-attention, INT8 arithmetic for the rest.

    python integrations/examples/diffusers_sdxl.py

`emulated_int8` computes on any device what INT8 kernels round; on a card choose `sage_attn`.
"""

import torch
from attention_backends.integrations.diffusers import apply, reset
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel


def tiny_pipeline() -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=64,
        cross_attention_dim=16, norm_num_groups=8,
    )  # fmt: skip
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline(unet=unet, scheduler=EulerDiscreteScheduler(), **parts)


def main() -> str:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    applied = apply(pipe, {"unet": {"default": "emulated_int8", "per_role": {"cross": "torch_sdpa"}}})
    pipe(
        prompt_embeds=torch.zeros(1, 6, 16), pooled_prompt_embeds=torch.zeros(1, 16),
        negative_prompt_embeds=torch.zeros(1, 6, 16), negative_pooled_prompt_embeds=torch.zeros(1, 16),
        height=64, width=64, num_inference_steps=2, output_type="latent",
    )  # fmt: skip
    summary = applied.summary()
    reset(pipe)
    return summary


if __name__ == "__main__":
    print(main())
