"""HunyuanVideo 1.5 in Diffusers with tiny random weights: entries by category, and `strict`, which allows no fallback.

    python integrations/examples/diffusers_hunyuan_video_15.py

The pipeline adds 729 masked image tokens to each call. The tiny autoencoder only gives the sizes of latents.
"""

import torch
from attention_backends.integrations.diffusers import apply, reset
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)


def tiny_pipeline() -> HunyuanVideo15Pipeline:
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=12,
        rope_axes_dim=(4, 4, 8), task_type="t2v",
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, spatial_compression_ratio=2,
        temporal_compression_ratio=2,
    )  # fmt: skip
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return HunyuanVideo15Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(),
        guider=ClassifierFreeGuidance(enabled=False), **parts,
    )  # fmt: skip


def main() -> str:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    applied = apply(pipe, {"per_role": {"joint": "sdpa_math", "self": "reference"}}, strict=True)
    pipe(
        prompt_embeds=torch.zeros(1, 6, 16), prompt_embeds_mask=torch.ones(1, 6), prompt_embeds_2=torch.zeros(1, 3, 8),
        prompt_embeds_mask_2=torch.ones(1, 3), height=8, width=8, num_frames=3, num_inference_steps=2,
        output_type="latent",
    )  # fmt: skip
    summary = applied.summary()
    reset(pipe)
    return summary


if __name__ == "__main__":
    print(main())
